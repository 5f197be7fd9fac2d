"""From a configuration to everything that the training loop works with: data, model, optimizer, and where to go on."""

import hashlib
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.data_processing.shards import Manifest
from src.data_processing.tokenizer import load_tokenizer
from src.data_processing.training_data_loader import WindowDataset
from src.model import LLM
from src.model_assessment.hellaswag_items import Item
from src.model_assessment.periodic_evaluation import Assessment
from src.model_assessment.watching import Watching
from src.model_utils.adamw_opt import build_adamw
from src.model_utils.autotune import settle
from src.model_utils.checkpoint_saver import CheckpointSaver
from src.model_utils.checkpoint_utils import Checkpoint, checkpoint_steps
from src.model_utils.run_records import run_settings, settings_in_words
from src.model_utils.spike_guard import SpikeGuard
from src.model_utils.step_numbers import StepClock, StepNumbers
from src.model_utils.training_state import Progress, TrainingState, resume_point, seed_random_state
from src.model_utils.weight_init import init_weights
from src.params import Config, DataConfig, to_dict
from src.utils import hardware
from src.utils.errors import UserError
from src.utils.files import set_aside
from src.utils.handle_ddp import Processes
from src.utils.logger import RunLogger

SETTING_GROUPS = ("model", "optim", "train", "eval", "checkpoint")


@dataclass(frozen=True)
class Run:
    """What the parts of a run share."""

    config: Config
    procs: Processes
    log: RunLogger
    watching: Watching
    manifest: Manifest
    state: TrainingState
    guard: SpikeGuard
    saver: CheckpointSaver
    """Of the main process; the others' stay idle."""
    forward: nn.Module
    """The model as training calls it: gradients averaged over the processes."""
    precision: torch.dtype
    """Of matmuls."""
    reads_late: bool
    """Whether the numbers of a step are read once the next is under way."""
    unread: deque[StepNumbers] = field(default_factory=deque)
    """Of steps taken, the oldest first."""
    clock: StepClock = field(default_factory=StepClock)


def check_alike(
    config: Config, procs: Processes, manifest: Manifest, precision: torch.dtype, items: Sequence[Item]
) -> None:
    """Raises UserError where a process was started with other settings or data than the first."""
    groups = to_dict(replace(config, data=DataConfig()))  # a dataset may lie elsewhere on another machine
    mine = {
        **{f"{group}.{name}": value for group in SETTING_GROUPS for name, value in groups[group].items()},
        "run_name": config.run_name,
        "resume": config.resume,
        "matmuls in": str(precision),
        "dataset (sha256 of its manifest)": manifest.sha256,
        "multiple-choice items (sha256)": hashlib.sha256(repr(items).encode()).hexdigest(),
    }
    mains = procs.from_main(mine)
    different = [f"{name}: {value}, in process 0 {mains[name]}" for name, value in mine.items() if value != mains[name]]

    def refuse() -> None:
        if different:
            raise UserError("the processes of a run need the same settings and data:\n  - " + "\n  - ".join(different))

    procs.together(refuse)


def check_machines(run_dir: Path, claim: Path, procs: Processes) -> str:
    """What is to be known where some machine does not share `run_dir` with the main process's, else "".

    `claim` is a file that the main process has written there. Raises UserError where such a machine holds later
    checkpoints than the main process's: the run would go back, or start anew, without a word.
    """
    text = procs.from_main(claim.read_text(encoding="utf-8") if procs.is_main else "")
    root = run_dir / "checkpoints"
    newest = max(checkpoint_steps(root), default=-1)
    mains_newest = procs.from_main(newest)
    apart = procs.is_machines_first and not _appears(claim, text)
    machine = socket.gethostname()

    def refuse_later() -> None:
        if apart and newest > mains_newest:
            raise UserError(
                f"{machine} has checkpoints up to step {newest} in {root}, but the machine of process 0 does not see "
                f"them; its own end at step {max(mains_newest, 0)}. Start with NODE_RANK=0 on {machine}, copy its run "
                "directory, or remove it there"
            )

    procs.together(refuse_later)
    others = [name for name in procs.gather(machine if apart else "") if name]
    if not others:
        return ""
    return (
        f"{run_dir} of process 0 cannot be seen from {', '.join(others)}: checkpoints are on process 0's machine only. "
        "Start again with the same machine as NODE_RANK=0, or put TEMP_DATA_DIR on a disk that all share"
    )


def _appears(path: Path, text: str) -> bool:
    """Whether `path` comes to hold `text` within some seconds: network file systems show new files late."""
    for _ in range(10):
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                return True
        time.sleep(0.5)
    return False


def open_data(config: Config, folder: Path, manifest: Manifest) -> tuple[WindowDataset, Assessment]:
    """Training windows and everything to measure on. Raises UserError where the dataset cannot serve this run."""
    n_ctx, n_vocab = config.model.n_ctx, config.model.n_vocab
    if manifest.n_vocab > n_vocab:
        raise UserError(
            f"{folder} holds ids of {manifest.tokenizer} up to {manifest.n_vocab - 1}, but model.n_vocab = {n_vocab}; "
            f"set --model.n-vocab {manifest.n_vocab} or prepare the data with another tokenizer"
        )
    training = WindowDataset(folder, manifest.train, n_ctx, n_vocab, at_least=config.batch_size)
    return training, Assessment(config, folder, manifest, load_tokenizer())


def of_this_launch(config: Config, log: RunLogger) -> Config:
    """`config`, but with --resume auto where this launch has begun the run: starting it again must not undo that."""
    launch = os.environ.get("LAUNCH_ID")
    return replace(config, resume="auto") if launch and log.settings().get("launch") == launch else config


def prepare(
    config: Config,
    procs: Processes,
    manifest: Manifest,
    checkpoint: Checkpoint | None,
    precision: torch.dtype,
    log: RunLogger,
) -> Run:
    """Model, optimizer and progress, new or from the checkpoint; config.json is written."""
    if procs.device.type == "cpu":
        hardware.keep_freed_memory()
    if procs.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    model = LLM(config.model)
    init_weights(model, config.model, config.train.seed)
    model.to(procs.device).train()
    was, step = (checkpoint.state["config"]["train"], checkpoint.step) if checkpoint else (None, 0)
    procs.doing("trying out micro-batches and what to compile")
    config, forward, notes = settle(config, was, config.total_steps - step, model, precision, procs, log.info)
    procs.doing("preparing model and optimizer")
    state = TrainingState(model, build_adamw(model, config.optim), Progress())
    if checkpoint is not None:
        state.restore(checkpoint, config.train.seed, procs)
    else:
        seed_random_state(config.train.seed, procs.rank)
    if procs.world_size > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    dataset = {
        "name": config.data.dir,
        "sources": manifest.origins,
        **manifest.counts,
        "manifest_sha256": manifest.sha256,
    }
    settings = run_settings(config, procs, model, precision, dataset)
    log.write_json("config.json", settings)
    words = settings_in_words(settings, sum(shard.tokens for shard in manifest.train))
    log.info("\n".join([words, f"precision: {hardware.precision_in_words(precision, procs.device)}", *notes]))
    saver = CheckpointSaver(log.run_dir / "checkpoints", config.checkpoint, before=log.sync)
    guard = SpikeGuard(config.optim.spike_z, state.progress.recent_losses)
    watching = Watching(log, config.report_to, config.run_name, settings)
    late = procs.device.type == "cuda"
    return Run(config, procs, log, watching, manifest, state, guard, saver, forward, precision, reads_late=late)


def where_to_go_on(
    config: Config, manifest: Manifest, precision: torch.dtype, procs: Processes, log: RunLogger
) -> Checkpoint | None:
    """The checkpoint to go on from, the log cut back to it; None for a run that starts at its first step."""
    if config.resume == "never":
        if any(log.run_dir.iterdir()):
            moved = set_aside(log.run_dir)
            log.run_dir.mkdir()
            log.info(f"starting anew; the old run is kept in {moved}")
        return None
    checkpoint, notes = resume_point(log.run_dir / "checkpoints", config, manifest.sha256, precision)
    step = checkpoint.step if checkpoint else 0
    log.forget_after(step if checkpoint else -1)
    if checkpoint and ("checkpoint", step) not in log.recorded():  # the process died before it could say so
        size = sum(path.stat().st_size for path in checkpoint.path.iterdir())
        log.metric(
            "checkpoint",
            step,
            path=f"checkpoints/{checkpoint.path.name}",
            seconds=None,
            held_up_seconds=None,
            bytes=size,
        )
    for note in notes:
        log.event("checkpoints", step, note)
    if checkpoint and step < config.total_steps:
        detail = f"from {checkpoint.path.name} of {config.total_steps} steps"
        then = checkpoint.state["config"]["train"]
        for what, was, now in (
            ("processes", checkpoint.state["world_size"], procs.world_size),
            ("micro-batch", then["micro_batch_size"], config.train.micro_batch_size),
            ("compile", then["compile"], config.train.compile),
        ):
            if was != now and "auto" not in (was, now):
                detail += f"; {what} {now} instead of {was}: the same samples, but not the same bits"
        log.event("resume", step, detail)
    return checkpoint
