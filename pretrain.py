"""One training run, from the command line to the last checkpoint.

    python pretrain.py PRESET [--train.total-steps 50 ...]                one process
    torchrun --nproc-per-node 8 pretrain.py PRESET [...]                  many

A run lives in temp_data/runs/RUN_NAME, and the same command goes on where it stopped. `train(config)`
is the whole run and can be called from Python. Shapes: B sequences, T positions.
"""

import src  # noqa: F401, I001 (before torch: see there)
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.data_processing.shards import Manifest, read_manifest, stray_files
from src.data_processing.tokenizer import load_tokenizer
from src.data_processing.training_data_loader import TrainingDataLoader, WindowDataset
from src.data_processing.verification import ensure_verified
from src.model import LLM
from src.model_assessment.assessment import Assessment
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.adamw_opt import build_adamw, learning_rate
from src.model_utils.checkpoint_utils import Checkpoint, step_dir
from src.model_utils.debugging import count_parameters, flops_per_token, non_finite_gradients
from src.model_utils.training_state import Progress, TrainingState, resume_point, seed_random_state
from src.model_utils.weight_init import init_weights
from src.params import Config, to_dict
from src.rope import rope_tables
from src.utils import hardware
from src.utils.disk import set_aside
from src.utils.errors import EXIT_DONE, EXIT_STOPPED, NonFiniteError, UserError, exit_with
from src.utils.handle_ddp import Processes, processes, world_size
from src.utils.logger import RunLogger
from src.utils.root import RUNS, dataset_dir
from src.utils.run_directory import claimed
from src.utils.stop_signals import stop_on_signals

MAX_SKIPPED_STEPS = 10  # in a row, for a loss or gradient that is not finite


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run_dir: Path
    step: int
    """Completed optimizer steps."""
    exit_code: int
    """0 if every step is done, 143 if the run was asked to stop; it saved, unless its last steps were skipped."""


@dataclass(frozen=True)
class Run:
    """What the parts of a run share."""

    config: Config
    procs: Processes
    log: RunLogger
    manifest: Manifest
    state: TrainingState
    forward: nn.Module
    """The model as training calls it: compiled where asked for, gradients averaged over the processes."""
    precision: torch.dtype
    """Of matmuls."""


def train(config: Config, stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Trains until the last step, or until `stop()` is true in any process; a later call goes on from there.

    Raises ConfigError or UserError for what cannot work, BusyError, StorageError and NonFiniteError.
    """
    with ExitStack() as stack:
        procs = stack.enter_context(processes(config.train.device))
        config.grad_accumulation_steps(procs.world_size)  # refused before anything is touched
        folder = dataset_dir(config.data.dir)
        manifest = procs.together(lambda: read_manifest(folder))
        # before anything reads a token; on each machine, because its disk may be its own
        procs.together(lambda: ensure_verified(folder, manifest) if procs.is_machines_first else None)
        training, assessment = procs.together(lambda: open_data(config, folder, manifest))
        run_dir = RUNS / config.run_name
        procs.main_only(lambda: stack.enter_context(claimed(run_dir)))
        log = RunLogger(run_dir, procs.is_main)
        if strays := stray_files(folder, manifest):
            log.info(f"warning: {strays}")
        if assessment.note:
            log.info(f"warning: {assessment.note}")
        run = prepare(config, procs, manifest, log)  # a start refused here leaves the run's status as it was
        write_status(run, "running", None, "")
        try:
            return run_steps(run, training, assessment, stop)
        except Exception as error:
            write_status(run, "failed", getattr(error, "exit_code", None) or 1, str(error))
            raise
        finally:
            log.close_bar()


def run_steps(run: Run, training: WindowDataset, assessment: Assessment, stop: Callable[[], bool]) -> Outcome:
    """The loop: measure and save when due, then one step, until the last or until asked to stop."""
    config, procs, log, progress = run.config, run.procs, run.log, run.state.progress
    recorded = procs.from_main(log.recorded())
    first_step, started = progress.step, time.perf_counter()
    log.start_bar(first_step, config.total_steps)
    with TrainingDataLoader(
        training,
        seed=config.train.seed,
        batch_size=config.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=procs.rank,
        world_size=procs.world_size,
        device=procs.device,
        first_step=first_step,
    ) as batches:
        while True:
            for kind in assessment.due(progress.step):
                if (kind, progress.step) not in recorded and not procs.any(stop()):
                    measure(run, assessment, kind)
            ending = procs.any(stop()) or progress.step == config.total_steps
            due = ending or (progress.step and progress.step % config.checkpoint.every_steps == 0)
            if due and not progress.skipped_in_a_row:  # checkpoints of a failing stretch would push out the good ones
                save(run)
            if ending:
                return finish(run)
            if progress.step == first_step:
                started = time.perf_counter()  # measuring before the first step is not part of the pace

            lr, loss, grad_norm = train_step(run, batches)

            log.advance_bar(loss=f"{loss:.3f}")
            if progress.step % config.train.log_every_steps == 0 or progress.step == config.total_steps:
                pace = (time.perf_counter() - started) / (progress.step - first_step)
                log_training(run, lr, grad_norm, seconds_left=pace * (config.total_steps - progress.step))


def train_step(run: Run, batches: TrainingDataLoader) -> tuple[float, float, float]:
    """One optimizer step; returns its learning rate, mean loss over all processes, and gradient norm."""
    config, procs, progress = run.config, run.procs, run.state.progress
    started = time.perf_counter()
    lr = learning_rate(progress.step, config.total_steps, config.warmup_steps, config.optim)
    for group in run.state.optimizer.param_groups:
        group["lr"] = lr
    accumulation = config.grad_accumulation_steps(procs.world_size)
    local_loss = torch.zeros((), device=procs.device)
    for micro_step in range(accumulation):
        inputs_BT, targets_BT = next(batches)
        # Gradients travel between processes once a step, with the last micro-batch.
        more = micro_step + 1 < accumulation
        with run.forward.no_sync() if more and isinstance(run.forward, DistributedDataParallel) else nullcontext():
            with hardware.autocast(procs.device, run.precision):
                loss = run.forward(inputs_BT, targets_BT) / accumulation
            loss.backward()
        local_loss += loss.detach()
    mean_loss = procs.sum([local_loss.item()])[0] / procs.world_size
    parameters = list(run.state.model.parameters())
    total_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    grad_norm = total_norm.item()
    # Both numbers are the same in every process, so all take the step or all skip it.
    if math.isfinite(mean_loss) and math.isfinite(grad_norm):
        nn.utils.clip_grads_with_norm_(parameters, config.optim.clip_grad_norm, total_norm)
        run.state.optimizer.step()
        progress.add_step(mean_loss, time.perf_counter() - started)
    else:
        skip_step(run, mean_loss, grad_norm)
    run.state.optimizer.zero_grad()
    return lr, mean_loss, grad_norm


def skip_step(run: Run, loss: float, grad_norm: float) -> None:
    """Records a step that changes nothing because a number in it is not finite; too many in a row end the run."""
    progress = run.state.progress
    progress.skip_step()
    bad = non_finite_gradients(run.state.model)
    where = f"; not finite in {len(bad)} gradients, first {bad[0]}" if bad else ""
    run.log.event("skipped step", progress.step, f"loss {loss}, gradient norm {grad_norm}{where}")
    if progress.skipped_in_a_row >= MAX_SKIPPED_STEPS:
        raise non_finite(run)


def non_finite(run: Run) -> NonFiniteError:
    """The error of a run that cannot go on."""
    progress = run.state.progress
    return NonFiniteError(
        f"the last {progress.skipped_in_a_row} step(s), up to step {progress.step}, had a loss or gradient that is not "
        "finite. They changed no weights, and no checkpoint was saved since the first of them. Start again with a "
        "lower --optim.max-lr or a longer --optim.warmup-steps under another --run-name"
    )


def measure(run: Run, assessment: Assessment, kind: str) -> None:
    """Makes and logs the records of one kind for this step."""
    procs, step = run.procs, run.state.progress.step
    context = hardware.autocast(procs.device, run.precision)
    for record in assessment.run(kind, run.state.model, context, procs.rank, procs.world_size, procs.sum):
        run.log.metric(record.kind, step, **record.values)
        run.log.info(record.words)


def save(run: Run) -> None:
    """A checkpoint of this step, unless there is one already (of a resumed or finished run)."""
    root, step = run.log.run_dir / "checkpoints", run.state.progress.step
    if run.procs.from_main(step_dir(root, step).exists()):
        return
    started = time.perf_counter()
    run.log.sync()
    path, size = run.state.save(root, run.config, run.manifest.sha256, run.precision, run.procs)
    seconds = time.perf_counter() - started
    run.log.metric("checkpoint", step, path=str(path.relative_to(run.log.run_dir)), seconds=seconds, bytes=size)
    run.log.info(f"saved {path.name}: {size / 1e6:.0f} MB in {seconds:.1f} s")


def log_training(run: Run, lr: float, grad_norm: float, seconds_left: float) -> None:
    """One training line; loss and speed are means over the steps since the last one, evaluations left out."""
    config, procs, progress = run.config, run.procs, run.state.progress
    if not progress.loss_steps:
        return  # every step since the last line was skipped
    loss = progress.loss_sum / progress.loss_steps
    step_seconds = progress.seconds / progress.loss_steps
    rate = config.train.batch_tokens / step_seconds
    peak = hardware.peak_tflops(procs.device)
    flops = rate * flops_per_token(config.model, count_parameters(run.state.model))
    mfu = flops / (peak * 1e12 * procs.world_size) if peak else None
    memory = hardware.memory_gb(procs.device)
    run.log.metric(
        "train",
        progress.step,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens_per_second=rate,
        step_ms=step_seconds * 1e3,
        mfu=mfu,
        memory_gb=memory,
        tokens_seen=progress.step * config.train.batch_tokens,
    )
    used = f"  {mfu:.1%} MFU" if mfu else ""
    run.log.info(
        f"step {progress.step:>{len(str(config.total_steps))}}/{config.total_steps}  loss {loss:.4f}  lr {lr:.2e}  "
        f"grad {grad_norm:.2f}  {rate:,.0f} tok/s  {step_seconds * 1e3:,.0f} ms{used}  {memory:.1f} GB  "
        f"{timedelta(seconds=round(seconds_left))} left"
    )
    write_status(run, "running", None, "")
    progress.start_line()


def finish(run: Run) -> Outcome:
    """The last words of a run that is done or was asked to stop; raises NonFiniteError if its last steps failed."""
    step, done = run.state.progress.step, run.state.progress.step == run.config.total_steps
    code = EXIT_DONE if done else EXIT_STOPPED
    if done and run.state.progress.skipped_in_a_row:
        raise non_finite(run)
    words = f"all {step} steps are done" if done else f"stopped on request after step {step}"
    run.log.info(f"{words}; everything is in {run.log.run_dir}")
    write_status(run, "done" if done else "stopped", code, words)
    return Outcome(run.log.run_dir, step, code)


def write_status(run: Run, state: str, exit_code: int | None, message: str) -> None:
    step, total_steps = run.state.progress.step, run.config.total_steps
    status = {"state": state, "step": step, "total_steps": total_steps, "exit_code": exit_code, "message": message}
    run.log.write_json("status.json", {**status, "time": time.time()})


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


def prepare(config: Config, procs: Processes, manifest: Manifest, log: RunLogger) -> Run:
    """Model, optimizer and progress, new or from the checkpoint to go on from; config.json is written."""
    precision = hardware.choose_precision(config.train.precision, procs.device)
    checkpoint = procs.main_only(lambda: find_checkpoint(config, manifest, precision, procs, log))
    if procs.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    model = LLM(config.model)
    init_weights(model, config.model, config.train.seed)
    model.to(procs.device).train()
    state = TrainingState(model, build_adamw(model, config.optim), Progress())
    if checkpoint:
        state.restore(checkpoint, config.train.seed, procs)
    else:
        seed_random_state(config.train.seed, procs.rank)
    forward: nn.Module = model
    if config.train.compile == "on" or (config.train.compile == "auto" and procs.device.type == "cuda"):
        # made before compiling, so that the first step need not be compiled again once they are there
        rope_tables(config.model.n_ctx, config.model.head_dim, config.model.rope_theta, procs.device)
        forward = torch.compile(model)  # type: ignore[assignment]
    if procs.world_size > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    describe_run(config, procs, model, precision, manifest, log)
    return Run(config, procs, log, manifest, state, forward, precision)


def find_checkpoint(
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
    for note in notes:
        log.event("checkpoints", step, note)
    if checkpoint and step < config.total_steps:
        detail = f"from {checkpoint.path.name} of {config.total_steps} steps"
        for what, was, now in (
            ("processes", checkpoint.state["world_size"], procs.world_size),
            ("micro-batch", checkpoint.state["config"]["train"]["micro_batch_size"], config.train.micro_batch_size),
        ):
            if was != now:
                detail += f"; {what} {now} instead of {was}: the same samples, but not the same bits"
        log.event("resume", step, detail)
    return checkpoint


def describe_run(
    config: Config, procs: Processes, model: LLM, precision: torch.dtype, manifest: Manifest, log: RunLogger
) -> None:
    """Writes config.json and says in a few lines what will happen."""
    parameters = count_parameters(model)
    derived = {
        "total_steps": config.total_steps,
        "warmup_steps": config.warmup_steps,
        "grad_accumulation_steps": config.grad_accumulation_steps(procs.world_size),
        "world_size": procs.world_size,
        "parameters": parameters,
        "parameters_without_embedding": parameters - model.embedding.weight.numel(),
        "flops_per_token": flops_per_token(config.model, parameters),
        "precision": str(precision).removeprefix("torch."),
    }
    train_tokens = sum(shard.tokens for shard in manifest.train)
    epochs = config.total_steps * config.train.batch_tokens / train_tokens
    machine = hardware.describe_machine(procs.device)
    packages = ("torch", "numpy", "tiktoken", "safetensors")
    content = {
        "config": to_dict(config),
        "derived": derived,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": machine,
        "dataset": {
            "name": config.data.dir,
            "sources": manifest.origins,
            **manifest.counts,
            "manifest_sha256": manifest.sha256,
        },
        "command": shlex.join(sys.argv),
    }
    log.write_json("config.json", content)
    log.info(
        f"run {config.run_name}: {parameters:,} parameters, {config.total_steps} steps of "
        f"{config.train.batch_tokens:,} tokens: {epochs:.2g} times the {train_tokens:,} of {config.data.dir}\n"
        f"on {procs.world_size} x {machine.get('gpu') or machine['cpu']} ({procs.device.type}), matmuls in "
        f"{derived['precision']}, micro-batch {config.train.micro_batch_size} x {config.model.n_ctx}, "
        f"{derived['grad_accumulation_steps']} accumulation step(s)"
    )


def main() -> int:
    """The command line: a preset, and overrides of any of its fields."""
    import tyro  # only the command line needs it

    dry_run = "--dry-run" in sys.argv[1:]
    if dry_run:
        sys.argv.remove("--dry-run")
    presets = {name: ((preset.__doc__ or "").splitlines()[0], preset()) for name, preset in PRESETS.items()}
    description = (
        "Train a language model. The same command goes on where an earlier one stopped. With --dry-run, only check the "
        "settings, for as many processes as the environment variable WORLD_SIZE says."
    )
    config = tyro.extras.overridable_config_cli(presets, description=description)
    if dry_run:
        config.grad_accumulation_steps(world_size())
        return EXIT_DONE
    with stop_on_signals() as stop:
        return train(config, stop).exit_code


if __name__ == "__main__":
    exit_with(main)
