"""One training run, from the command line to the last checkpoint.

    python pretrain.py PRESET [--train.total-steps 50 ...]                one process
    torchrun --nproc-per-node 8 pretrain.py PRESET [...]                  many

A run lives in temp_data/runs/RUN_NAME, and the same command goes on where it stopped. `train(config)`
is the whole run and can be called from Python. Shapes: B sequences, T positions.
"""

import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.data_processing.shards import Manifest, read_manifest
from src.data_processing.tokenizer import load_tokenizer
from src.data_processing.training_data_loader import TrainingDataLoader, WindowDataset, stray_files
from src.model import LLM
from src.model_assessment.assessment import Assessment
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.adamw_opt import build_adamw, learning_rate
from src.model_utils.checkpoint_utils import Checkpoint, step_dir
from src.model_utils.debugging import count_parameters, flops_per_token, non_finite_gradients
from src.model_utils.training_state import Progress, TrainingState, resume_point, seed_random_state
from src.model_utils.weight_init import init_weights
from src.params import Config, to_dict
from src.utils import hardware
from src.utils.errors import EXIT_DONE, EXIT_STOPPED, NonFiniteError, UserError, exit_with
from src.utils.handle_ddp import Processes, processes
from src.utils.logger import RunLogger
from src.utils.root import RUNS, dataset_dir
from src.utils.run_directory import claimed, set_aside

MAX_SKIPPED_STEPS = 10  # in a row, for a loss or gradient that is not finite


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run_dir: Path
    step: int
    """Completed optimizer steps."""
    exit_code: int
    """0 if every step is done, 143 if the run was asked to stop and saved before it did."""


def train(config: Config, stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Trains until the last step, or until `stop()` is true in any process; a later call goes on from there.

    Raises ConfigError or UserError for what cannot work, BusyError, StorageError and NonFiniteError.
    """
    with ExitStack() as stack:
        procs = stack.enter_context(processes(config.train.device))
        config.grad_accumulation_steps(procs.world_size)  # refused before anything is touched
        run_dir = RUNS / config.run_name
        folder = dataset_dir(config.data.dir)
        manifest = read_manifest(folder)
        training, assessment = open_data(config, folder, manifest)
        procs.main_only(lambda: stack.enter_context(claimed(run_dir)))
        log = RunLogger(run_dir, procs.is_main)
        try:
            if strays := stray_files(folder, manifest):
                log.info(f"warning: {strays}")
            return run_steps(config, procs, training, assessment, manifest, log, stop)
        except Exception as error:
            code = getattr(error, "exit_code", None) or 1
            log.write_json("status.json", {"state": "failed", "exit_code": code, "message": str(error)})
            raise
        finally:
            log.close_bar()


def run_steps(
    config: Config,
    procs: Processes,
    training: WindowDataset,
    assessment: Assessment,
    manifest: Manifest,
    log: RunLogger,
    stop: Callable[[], bool],
) -> Outcome:
    """The run itself: build or restore, then step, measure and save until the end."""
    checkpoint = find_checkpoint(config, manifest, procs, log)
    precision = hardware.choose_precision(config.train.precision, procs.device)
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
    forward = wrap(model, config, procs)
    progress, optimizer = state.progress, state.optimizer

    derived = describe_run(config, procs, model, precision, manifest, log)
    recorded = procs.from_main(log.recorded())
    accumulation = config.grad_accumulation_steps(procs.world_size)
    first_step = progress.step
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
            stopping = any(procs.sum([float(stop())]))
            for kind in assessment.due(progress.step):
                if (kind, progress.step) not in recorded and not stopping:
                    context = hardware.autocast(procs.device, precision)
                    for record in assessment.run(kind, model, context, procs.rank, procs.world_size, procs.sum):
                        log.metric(record.kind, progress.step, **record.values)
                        log.info(record.words)
                    stopping = any(procs.sum([float(stop())]))
            done = progress.step == config.total_steps
            if done or stopping or (progress.step and progress.step % config.checkpoint.every_steps == 0):
                save(state, config, manifest, procs, log)
            if done or stopping:
                return finish(progress.step, config.total_steps, log)

            step_started = time.perf_counter()
            if progress.step == first_step:
                started = step_started  # of the pace, which the evaluations before the first step don't count in
            lr = learning_rate(progress.step, config.total_steps, config.warmup_steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            local_loss = torch.zeros((), device=procs.device)
            for micro_step in range(accumulation):
                inputs_BT, targets_BT = next(batches)
                # Gradients travel between processes once a step, with the last micro-batch.
                last = micro_step + 1 == accumulation
                with forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext():
                    with hardware.autocast(procs.device, precision):
                        loss = forward(inputs_BT, targets_BT) / accumulation
                    loss.backward()
                local_loss += loss.detach()
            mean_loss = procs.sum([local_loss.item()])[0] / procs.world_size
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm).item()
            # Both numbers are the same in every process, so all take the step or all skip it.
            if math.isfinite(mean_loss) and math.isfinite(grad_norm):
                optimizer.step()
                progress.add_step(mean_loss, time.perf_counter() - step_started)
            else:
                skip_step(progress, mean_loss, grad_norm, model, log)
            optimizer.zero_grad()
            log.advance_bar(loss=f"{mean_loss:.3f}")
            if progress.step % config.train.log_every_steps == 0 or progress.step == config.total_steps:
                seconds_a_step = (time.perf_counter() - started) / (progress.step - first_step)
                log_training(config, procs, progress, lr, grad_norm, derived, seconds_a_step, log)


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


def find_checkpoint(config: Config, manifest: Manifest, procs: Processes, log: RunLogger) -> Checkpoint | None:
    """The checkpoint to go on from, the log cut back to it; None for a run that starts at its first step."""

    def find() -> Checkpoint | None:
        if config.resume == "never":
            if moved := set_aside(log.run_dir):
                log.info(f"starting anew; the old run is kept in {moved}")
            return None
        checkpoint, notes = resume_point(log.run_dir / "checkpoints", config, manifest.sha256)
        log.forget_after(checkpoint.step if checkpoint else -1)
        for note in notes:
            log.event("checkpoints", checkpoint.step if checkpoint else 0, note)
        if checkpoint and checkpoint.step < config.total_steps:
            was = checkpoint.state["world_size"]
            other = "" if was == procs.world_size else f", now on {procs.world_size} process(es) instead of {was}"
            log.event("resume", checkpoint.step, f"from {checkpoint.path.name} of {config.total_steps} steps{other}")
        return checkpoint

    return procs.main_only(find)


def wrap(model: LLM, config: Config, procs: Processes) -> nn.Module:
    """`model` as training calls it: compiled where asked for, its gradients averaged over the processes."""
    forward: nn.Module = model
    if config.train.compile == "on" or (config.train.compile == "auto" and procs.device.type == "cuda"):
        forward = torch.compile(model)  # type: ignore[assignment]
    if procs.world_size > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    return forward


def save(state: TrainingState, config: Config, manifest: Manifest, procs: Processes, log: RunLogger) -> None:
    """A checkpoint of this step, unless there is one already (of a resumed or finished run)."""
    root, step = log.run_dir / "checkpoints", state.progress.step
    if procs.from_main(step_dir(root, step).exists()):
        return
    started = time.perf_counter()
    path, size = state.save(root, config, manifest.sha256, procs)
    seconds = time.perf_counter() - started
    log.metric("checkpoint", step, path=str(path.relative_to(log.run_dir)), seconds=seconds, bytes=size)
    log.info(f"saved {path.name}: {size / 1e6:.0f} MB in {seconds:.1f} s")


def skip_step(progress: Progress, loss: float, grad_norm: float, model: LLM, log: RunLogger) -> None:
    """Records a step that changes nothing because a number in it is not finite; too many in a row end the run."""
    progress.skip_step()
    bad = non_finite_gradients(model)
    where = f"; not finite in {len(bad)} gradients, first {bad[0]}" if bad else ""
    log.event("skipped step", progress.step, f"loss {loss}, gradient norm {grad_norm}{where}")
    if progress.skipped_in_a_row >= MAX_SKIPPED_STEPS:
        raise NonFiniteError(
            f"{MAX_SKIPPED_STEPS} steps in a row had a loss or gradient that is not finite, the last one step "
            f"{progress.step}. The checkpoints are from before; start again with a lower --optim.max-lr or a longer "
            "--optim.warmup-steps under another --run-name"
        )


def log_training(
    config: Config,
    procs: Processes,
    progress: Progress,
    lr: float,
    grad_norm: float,
    derived: dict[str, Any],
    seconds_a_step: float,
    log: RunLogger,
) -> None:
    """One training line; means are over the steps since the last one. `seconds_a_step` includes evaluations."""
    if not progress.loss_steps:
        return
    loss = progress.loss_sum / progress.loss_steps
    step_seconds = progress.seconds / progress.loss_steps
    rate = config.train.batch_tokens / step_seconds
    peak = hardware.peak_tflops(procs.device)
    mfu = rate * derived["flops_per_token"] / (peak * 1e12 * procs.world_size) if peak else None
    memory = hardware.memory_gb(procs.device)
    left = seconds_a_step * (config.total_steps - progress.step)
    log.metric(
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
    log.info(
        f"step {progress.step:>{len(str(config.total_steps))}}/{config.total_steps}  loss {loss:.4f}  lr {lr:.2e}  "
        f"grad {grad_norm:.2f}  {rate:,.0f} tok/s  {step_seconds * 1e3:,.0f} ms{used}  {memory:.1f} GB  "
        f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} left"
    )
    log.write_json("status.json", {"state": "running", "step": progress.step, "total_steps": config.total_steps})
    progress.start_line()


def finish(step: int, total_steps: int, log: RunLogger) -> Outcome:
    """The last words of a run that is done or was asked to stop."""
    done = step == total_steps
    code = EXIT_DONE if done else EXIT_STOPPED
    words = f"all {total_steps} steps are done" if done else f"stopped on request after saving step {step}"
    log.info(f"{words}; everything is in {log.run_dir}")
    status = {"state": "done" if done else "stopped", "exit_code": code, "message": words}
    log.write_json("status.json", {**status, "step": step, "total_steps": total_steps, "time": time.time()})
    return Outcome(log.run_dir, step, code)


def describe_run(
    config: Config, procs: Processes, model: LLM, precision: torch.dtype, manifest: Manifest, log: RunLogger
) -> dict[str, Any]:
    """Writes config.json, says in a few lines what will happen, and returns the derived numbers."""
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
    machine = hardware.describe_machine(procs.device)
    dataset = {
        "name": config.data.dir,
        "source": manifest.source,
        **manifest.counts,
        "manifest_sha256": manifest.sha256,
    }
    packages = ("torch", "numpy", "tiktoken", "safetensors")
    log.write_json(
        "config.json",
        {
            "config": to_dict(config),
            "derived": derived,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "machine": machine,
            "dataset": dataset,
            "command": shlex.join(sys.argv),
        },
    )
    log.info(
        f"run {config.run_name}: {parameters:,} parameters, {config.total_steps} steps of "
        f"{config.train.batch_tokens:,} tokens from {config.data.dir} ({manifest.counts['tokens']:,} tokens)\n"
        f"on {procs.world_size} x {machine.get('gpu') or machine['cpu']} ({procs.device.type}), matmuls in "
        f"{derived['precision']}, micro-batch {config.train.micro_batch_size} x {config.model.n_ctx}, "
        f"{derived['grad_accumulation_steps']} accumulation step(s)"
    )
    return derived


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or SIGINT came; a second signal changes nothing."""
    asked: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main() -> int:
    """The command line: a preset, and overrides of any of its fields."""
    import tyro  # only the command line needs it

    presets = {name: ((preset.__doc__ or "").splitlines()[0], preset()) for name, preset in PRESETS.items()}
    description = "Train a language model. The same command goes on where an earlier one stopped."
    config = tyro.extras.overridable_config_cli(presets, description=description)
    with stop_on_signals() as stop:
        return train(config, stop).exit_code


if __name__ == "__main__":
    exit_with(main)
