"""The state that a run needs to resume as if it had never stopped, and the checkpoint it resumes from."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.model import LLM
from src.model_utils import checkpoint_utils
from src.model_utils.adamw_opt import learning_rate, load_optimizer_tensors, optimizer_tensors
from src.model_utils.checkpoint_utils import Checkpoint
from src.model_utils.load_model import load_weights
from src.params import Config, from_dict, to_dict
from src.utils.errors import UserError, cause_of
from src.utils.files import set_aside
from src.utils.handle_ddp import Processes
from src.utils.logger import RunLogger

START_OVER = "--resume never, which sets the run aside and starts from scratch"


@dataclass
class Progress:
    """The position of a run in its schedule, and sums for the next training line."""

    step: int = 0
    """Completed steps, including skipped ones; determines which data come next."""
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0
    """This and the next two: over the steps since the last training line, without skipped ones."""
    loss_steps: int = 0
    seconds: float = 0.0
    """Time of training steps, without evaluations and saves."""
    recent_losses: list[float] = field(default_factory=list)
    """The spike guard's memory."""

    def add_loss(self, loss: float, seconds: float) -> None:
        self.skipped_in_a_row = 0
        self.loss_sum += loss
        self.loss_steps += 1
        self.seconds += seconds

    def start_line(self) -> None:
        self.loss_sum, self.loss_steps, self.seconds = 0.0, 0, 0.0


@dataclass
class TrainingState:
    model: LLM
    optimizers: list[torch.optim.Optimizer]
    progress: Progress

    def parts(self, procs: Processes) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint by file, not copied. A collective: all processes call it."""
        random_state = {"cpu": torch.get_rng_state()}
        if procs.device.type != "cpu":
            random_state[procs.device.type] = torch.get_device_module(procs.device).get_rng_state()
        random_states = procs.gather(random_state)
        return {
            "model": {name: p.detach() for name, p in self.model.named_parameters()},  # a shared weight once
            "optimizer": optimizer_tensors(self.model, self.optimizers),
            **{f"rank_{rank:05d}": tensors for rank, tensors in enumerate(random_states)},
        }

    def plain(self, config: Config, dataset_sha256: str, precision: torch.dtype, world_size: int) -> dict[str, Any]:
        """The rest of a checkpoint as plain data: progress, and the settings that a resume compares."""
        return {
            "progress": asdict(self.progress),
            "config": to_dict(config),
            "dataset_sha256": dataset_sha256,
            "precision": str(precision),
            "world_size": world_size,
            "torch": torch.__version__,
        }

    def restore(self, checkpoint: Checkpoint, seed: int, procs: Processes) -> None:
        """Restores everything from the checkpoint. Only the main process reads its files.

        Dropout gets new seeds if the number of processes changed, or if the device's random state was not saved.
        """
        state = checkpoint.state
        names = ["model", "optimizer", *(f"rank_{rank:05d}" for rank in range(state["world_size"]))]
        to_read = names if procs.is_main else []
        parts = procs.together(lambda: {name: checkpoint.tensors(name) for name in to_read})
        known = {field.name for field in fields(Progress)}
        self.progress = Progress(**{name: value for name, value in state["progress"].items() if name in known})
        seed_random_state(seed, procs.rank, self.progress.step)  # replaced below if this process's state was saved
        for name in names:  # of every rank: all processes receive each file, because the broadcast is collective
            tensors = procs.tensors_from_main(parts.get(name, {}))
            try:
                if name == "model":
                    load_weights(self.model, tensors, "the checkpoint")
                elif name == "optimizer":
                    load_optimizer_tensors(self.model, self.optimizers, tensors)
                elif name == f"rank_{procs.rank:05d}" and state["world_size"] == procs.world_size:
                    torch.set_rng_state(tensors["cpu"])
                    if (kind := procs.device.type) != "cpu" and kind in tensors:
                        torch.get_device_module(kind).set_rng_state(tensors[kind])
            except (UserError, torch.OutOfMemoryError):
                raise
            except (LookupError, TypeError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"Cannot resume: {checkpoint.path / name}.safetensors does not fit: {cause_of(error)}. Restore it "
                    "from a copy, or resume from an earlier step with --resume STEP."
                ) from error


def seed_random_state(seed: int, rank: int, step: int = 0) -> None:
    """Seeds dropout, differently in each process."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0]) >> 1)


def requested_dir(root: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of `step` among those in `root`. Raises UserError if there is none."""
    path = checkpoint_utils.step_dir(root, step)
    if not path.is_dir():
        steps = ", ".join(map(str, checkpoint_utils.checkpoint_steps(root))) or "none"
        raise UserError(
            f"Cannot resume from step {step}: {path} does not exist. Steps with a checkpoint: {steps}. Leave out "
            "--resume to take the newest."
        )
    return path


def resume_point(
    root: Path, config: Config, dataset_sha256: str, precision: torch.dtype
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint under `root` to resume from, or None, and notes on what was set aside or removed.

    Raises UserError, and changes nothing, if the requested checkpoint or all of them are damaged or missing, or if it
    belongs to another configuration. A precision of "auto" becomes the checkpoint's.
    """
    notes = []
    if config.resume == "auto":
        checkpoint, damaged = checkpoint_utils.newest_checkpoint(root, f", or use {START_OVER}")
        if checkpoint is None:
            refuse_lost(root)
        notes += [f"skipped a damaged checkpoint: {reason}" for reason in damaged]
    else:
        checkpoint = checkpoint_utils.open_checkpoint(requested_dir(root, int(config.resume)))
    if checkpoint is not None:
        ours = checkpoint.state["precision"] if config.train.precision == "auto" else str(precision)
        check_settings(checkpoint, config, dataset_sha256, ours)
        for later in (step for step in checkpoint_utils.checkpoint_steps(root) if step > checkpoint.step):
            moved = set_aside(checkpoint_utils.step_dir(root, later))  # so that the run can save that step
            notes.append(f"kept a checkpoint after step {checkpoint.step} as {moved.name}")
    for name in checkpoint_utils.remove_leftovers(root):
        notes.append(f"removed {name}, left by an interrupted save")
    return checkpoint, notes


def refuse_lost(root: Path) -> None:
    """Raises UserError if the checkpoints folder `root` is empty although the run's log says that it saved some.

    Perhaps a disk is not mounted, or someone deleted them. Starting over would hide that and lose the log.
    """
    log = RunLogger(root.parent, is_main=False)
    saved = max((step for kind, step in log.recorded() if kind == "checkpoint"), default=None)
    if root.is_symlink() and not root.exists():
        cause = f"{root} is a link to {root.readlink()}, which does not exist"
    elif saved is not None:
        cause = f"{root} holds no checkpoint, but metrics.jsonl says that the run saved one at step {saved}"
    elif log.status().get("state") == "done":
        cause = f"{root} holds no checkpoint, but status.json says that the run is done"
    else:
        return
    raise UserError(
        f"Cannot resume: {cause}. Nothing was changed. Restore the checkpoints from a copy, mount their disk, or use "
        f"{START_OVER}."
    )


def check_settings(
    checkpoint: Checkpoint, config: Config, dataset_sha256: str | None = None, precision: str | None = None
) -> None:
    """Raises UserError listing every setting that would change the results of the rest of the run.

    Data and precision are compared if given.
    """
    state = checkpoint.state
    saved = _deciding(from_dict(state["config"]), state["dataset_sha256"], state["precision"])
    now = _deciding(config, dataset_sha256 or state["dataset_sha256"], precision or state["precision"])
    names = [name for name in now if saved[name] != now[name]]
    only_length = set(names) <= {"train.total_steps", "optim.warmup_steps"}
    reason = _cannot_change_length(checkpoint, config) if only_length else ""
    if reason or not only_length:
        raise UserError(
            f"Cannot resume from {checkpoint.path}: it belongs to another configuration:"
            + "".join(f"\n  - {name}: checkpoint {saved[name]}, now {now[name]}" for name in names)
            + f"\n{reason}Use the old settings, another --run-name, or {START_OVER}."
        )


def _cannot_change_length(checkpoint: Checkpoint, config: Config) -> str:
    """The reason why a run cannot continue with another number of steps, or "".

    It can if every step so far would have had the same learning rate.
    """
    before, done = from_dict(checkpoint.state["config"]), checkpoint.step
    if config.total_steps < done:
        return f"The run has done {done} steps already. "
    pairs = [(each.total_steps, each.warmup_steps, each.optim) for each in (before, config)]
    for step in range(done):  # not only the last one: two schedules may cross
        if learning_rate(step, *pairs[0]) == learning_rate(step, *pairs[1]):
            continue
        if config.warmup_steps != before.warmup_steps:
            return f"Keep the warm-up of the steps done: --optim.warmup-steps {before.warmup_steps}. "
        steps = [each for each in checkpoint_utils.checkpoint_steps(checkpoint.path.parent) if each <= step]
        earlier = f"Go back to an earlier step with --resume {steps[-1]}, or " if steps else ""
        train = f"{earlier or 'No checkpoint up to that step is kept: '}train a new run from these weights"
        return (
            f"The learning rate fell from step {step} on, because the run was planned to end at step "
            f"{before.total_steps}. {train} with --init-from {before.run_name} --run-name OTHER. "
        )
    return ""


def _deciding(config: Config, dataset_sha256: str, precision: str) -> dict[str, Any]:
    """The settings that determine a run's losses, by their names on the command line."""
    groups = to_dict(config)
    settings = {f"{group}.{name}": value for group in ("model", "optim") for name, value in groups[group].items()}
    settings |= {f"train.{name}": groups["train"][name] for name in ("seed", "batch_tokens")}
    settings["init_from"] = config.init_from or "none"
    settings |= {"train.total_steps": config.total_steps, "optim.warmup_steps": config.warmup_steps}
    return settings | {"data (sha256 of its manifest)": dataset_sha256, "train.precision": precision}
