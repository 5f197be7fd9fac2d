"""One training run, read from top to bottom: settings -> data -> checkpoint -> model -> loop -> end.

    python pretrain.py PRESET [--train.total-steps 50 ...]                one process
    torchrun --nproc-per-node 8 pretrain.py PRESET [...]                  many

A run lives in temp_data/runs/RUN_NAME, and the same command resumes it. `train(config)` is the whole run, callable from
Python. Shapes: B sequences, T positions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python omits it if PYTHONSAFEPATH is set

import src  # noqa: F401 (before torch: it sets the environment)
from src.utils.stop_signals import end_at_once_on_ctrl_c, follow_launcher

if __name__ == "__main__":  # before the seconds that importing torch takes
    end_at_once_on_ctrl_c()
    follow_launcher()

import hashlib
import math
import os
import platform
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.data_processing.shards import Manifest, ensure_verified, read_manifest, stray_files
from src.data_processing.tokenizer import load_tokenizer
from src.data_processing.training_data_loader import TrainingDataLoader, WindowDataset
from src.model import LLM
from src.model_assessment.periodic_evaluation import Assessment
from src.model_assessment.trackers import Watching, require_packages
from src.model_configs.arguments import without_resume
from src.model_configs.my_llm_config import config_from_command_line
from src.model_utils.adamw_opt import build_optimizers, set_learning_rate
from src.model_utils.autotune import out_of_memory_explained, settle
from src.model_utils.checkpoint_saver import (
    AFTER_SAVE_SECONDS,
    AFTER_STOP_SECONDS,
    AfterSave,
    CheckpointSaver,
    Saved,
    refuse_full_disk,
)
from src.model_utils.checkpoint_utils import Checkpoint, checkpoint_steps, prune
from src.model_utils.debugging import count_parameters, flops_per_token, profiler
from src.model_utils.load_model import load_weights, read_initial
from src.model_utils.spike_guard import SpikeGuard
from src.model_utils.training_state import Progress, TrainingState, resume_point, seed_random_state
from src.model_utils.weight_init import init_weights
from src.params import Config, DataConfig, to_dict
from src.utils import hardware
from src.utils.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    LostPeerError,
    NonFiniteError,
    StoppedError,
    StorageError,
    UserError,
    exit_with,
    recorded_exit_code,
    say,
)
from src.utils.files import claimed, set_aside
from src.utils.handle_ddp import Processes, processes, world_size
from src.utils.logger import RunLogger
from src.utils.root import RUNS, dataset_dir
from src.utils.stop_signals import StopRequest, second_ctrl_c_quits, stop_on_signals

MAX_SKIPPED_STEPS = 10  # in a row
MAX_RECORDED_WINDOWS = 256  # of a skipped step
STOP_FILE = "STOP"  # a file of this name in the run directory requests a stop

Stop = Callable[[], str | bool]


@dataclass(frozen=True)
class Outcome:
    run_dir: Path
    step: int
    """Completed optimizer steps."""
    exit_code: int
    """0 if every step is done, 143 if the run saved and stopped early."""


@dataclass(frozen=True)
class Run:
    """Everything that the parts of a run share."""

    config: Config
    procs: Processes
    log: RunLogger
    watching: Watching
    manifest: Manifest
    state: TrainingState
    guard: SpikeGuard
    saver: CheckpointSaver
    """Used by the main process only."""
    after_save: AfterSave
    forward: nn.Module
    """The model as training calls it: perhaps compiled, and wrapped in DDP if there are several processes."""
    precision: torch.dtype
    """Dtype of the matmuls."""
    stop: Stop
    """True, or the name of the cause, once this process should stop."""


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over all processes, nats."""
    grad_norm: float
    layer_grad_norms: list[float]
    """Gradient norms of the embedding and each block; empty for a step that is not logged."""
    lr: float
    skipped: str
    """The reason why the step changed nothing, or ""."""


def train(config: Config, stop: Stop = lambda: False) -> Outcome:
    """Trains until the last step, or until `stop()` is true in any process; a later call resumes.

    `stop()` may return the name of the cause. Raises ConfigError or UserError for settings or input that cannot work,
    BusyError, StorageError, NonFiniteError, LostPeerError, and StoppedError for a stop before the first step.
    """
    with ExitStack() as stack:
        procs = stack.enter_context(processes(config.train.device, config.train.timeout_s))
        if isinstance(stop, StopRequest) and procs.is_main:
            stop.answer = lambda: f"stopping before the first step, after: {procs.activity}"
        procs.together(lambda: config.grad_accumulation_steps(procs.world_size))  # refused before anything is touched
        procs.main_only(lambda: require_packages(config.report_to))
        manifest, training, evaluation = open_data(config, procs, stop)
        precision = hardware.choose_precision(config.train.precision, procs.device)
        procs.together(lambda: refuse_differences(config, procs, manifest, precision, evaluation))

        log = RunLogger(RUNS / config.run_name, procs.is_main)
        config = claim(config, procs, log, stop, stack)
        checkpoint = procs.main_only(
            lambda: find_checkpoint(config, manifest, precision, procs, log), "looking for a checkpoint"
        )
        if checkpoint and config.train.precision == "auto":
            precision = getattr(torch, checkpoint.state["precision"].removeprefix("torch."))
        last, keep = config.total_steps, config.checkpoint
        if checkpoint and checkpoint.step == last and not evaluation.missing(last, procs.main_only(log.recorded)):
            # The run may have been killed after its last save but before older checkpoints were removed.
            procs.main_only(lambda: prune(log.run_dir / "checkpoints", keep.keep_last, keep.keep_every_steps, {last}))
            return end_done(log, last)
        for note in (procs.main_only(lambda: stray_files(dataset_dir(config.data.dir), manifest)), evaluation.note):
            if note:
                log.info(f"warning: {note}")
        procs.main_only(lambda: refuse_full_disk(config, log.run_dir))
        procs.main_only(lambda: stack.enter_context(log.held()))

        with out_of_memory_explained(procs):
            run = prepare(config, procs, manifest, checkpoint, precision, log, stop)
        stack.callback(run.watching.close)
        stack.callback(run.saver.close)
        write_status(run, "running", None, "")  # only now: a start that is refused keeps the old status
        try:
            with out_of_memory_explained(procs):
                outcome = run_steps(run, training, evaluation)
        except Exception as error:
            # If a peer was lost and left its exit code on this machine, that code is the run's.
            code = recorded_exit_code() if isinstance(error, LostPeerError) else getattr(error, "exit_code", None)
            write_status(run, "failed", code or EXIT_FAILED, str(error))
            raise
        run.after_save.poll()  # a copy made now has the final status, without waiting for the report
        # Once the run's status is final, a failure of the report cannot change it.
        procs.together_for_long(run.watching.close, "the last report")
        wait = AFTER_SAVE_SECONDS if outcome.exit_code == EXIT_DONE else AFTER_STOP_SECONDS
        procs.together_for_long(lambda: run.after_save.close(wait), "the command after the last save")
        return outcome


def open_data(config: Config, procs: Processes, stop: Stop) -> tuple[Manifest, WindowDataset, Assessment]:
    """Verifies the dataset and returns its manifest, training windows and evaluations. Raises UserError."""
    folder = dataset_dir(config.data.dir)
    manifest = procs.together(lambda: read_manifest(folder))
    verify = procs.is_machines_first  # on each machine, because its disk may be local
    procs.together_for_long(
        lambda: ensure_verified(folder, manifest, stop=stop) if verify else None, "verifying the dataset"
    )
    n_ctx, n_vocab = config.model.n_ctx, config.model.n_vocab

    def opened() -> tuple[WindowDataset, Assessment]:
        if manifest.n_vocab > n_vocab:
            raise UserError(
                f"Cannot train on {folder}: its token ids ({manifest.tokenizer}) go up to {manifest.n_vocab - 1}, but "
                f"model.n_vocab = {n_vocab}. Set --model.n-vocab {manifest.n_vocab}."
            )
        training = WindowDataset(folder, manifest.train, n_ctx, n_vocab, at_least=config.batch_size)
        return training, Assessment(config, folder, manifest, load_tokenizer())

    return manifest, *procs.together_for_long(opened, "opening the dataset")


def refuse_differences(
    config: Config, procs: Processes, manifest: Manifest, precision: torch.dtype, evaluation: Assessment
) -> None:
    """Raises UserError if a process has settings or data that differ from the main process's."""
    groups = to_dict(replace(config, data=DataConfig()))  # a dataset's path may differ between machines
    compared = ("model", "optim", "train", "eval", "checkpoint")
    local = {
        **{f"{group}.{name}": value for group in compared for name, value in groups[group].items()},
        "run_name": config.run_name,
        "resume": config.resume,
        "precision of matmuls": str(precision),
        "dataset (sha256 of its manifest)": manifest.sha256,
        "multiple-choice items (sha256)": hashlib.sha256(repr(evaluation.items).encode()).hexdigest(),
    }
    main = procs.from_main(local)
    if different := [f"{k}: {value}, in process 0 {main[k]}" for k, value in local.items() if value != main[k]]:
        raise UserError(
            "Cannot train with processes that differ. Give all of them the same settings and data:\n  - "
            + "\n  - ".join(different)
        )


def claim(config: Config, procs: Processes, log: RunLogger, stop: Stop, stack: ExitStack) -> Config:
    """Locks the run's folder until `stack` ends. Returns `config`, set to resume if this launch already began the run.

    Raises BusyError if another process holds the folder, and UserError if config.init_from cannot be used. Also raises
    UserError if another machine's disk holds later checkpoints: the run would silently start over.
    """
    root = log.run_dir / "checkpoints"
    steps = procs.together(lambda: checkpoint_steps(root))
    step, machine = max(procs.gather((max(steps, default=-1), socket.gethostname())))

    def in_main_process() -> Config:
        launch = os.environ.get("LAUNCH_ID")  # a restart must not set aside what this launch has begun
        resumes = bool(launch) and log.settings().get("launch") == launch
        resume = "auto" if resumes else config.resume
        if config.init_from and (resume == "never" or not checkpoint_steps(root)):
            read_initial(config)  # refused before anything of an old run is touched
        # Before the search for a checkpoint: a killed launcher's run may still be saving one.
        stack.enter_context(claimed(log.run_dir, stop))
        here = max(checkpoint_steps(root), default=-1)
        if resume == "auto" and step > here:
            raise UserError(
                f"Cannot resume: {machine} has checkpoints up to step {step} in {root}, but on the machine of process "
                f"0 they end at step {max(here, 0)}. Start with NODE_RANK=0 on {machine}, or copy its run directory."
            )
        return replace(config, resume=resume)

    return procs.main_only(in_main_process, "claiming the run's folder")


def find_checkpoint(
    config: Config, manifest: Manifest, precision: torch.dtype, procs: Processes, log: RunLogger
) -> Checkpoint | None:
    """Returns the checkpoint to resume from, after cutting the log back to it; None to start at step 0."""
    if config.resume == "never":
        if any(log.run_dir.iterdir()):
            moved = set_aside(log.run_dir)
            log.run_dir.mkdir()
            log.info(f"starting from scratch; the old run is kept in {moved}")
        return None
    checkpoint, notes = resume_point(log.run_dir / "checkpoints", config, manifest.sha256, precision)
    step = checkpoint.step if checkpoint else 0
    log.forget_after(step if checkpoint else -1)
    if checkpoint and ("checkpoint", step) not in log.recorded():  # killed between the save and its record
        size = sum(path.stat().st_size for path in checkpoint.path.iterdir())
        path = f"checkpoints/{checkpoint.path.name}"
        log.metric("checkpoint", step, path=path, seconds=None, held_up_seconds=None, bytes=size)
    for note in notes:
        log.event("checkpoints", step, note)
    if checkpoint and step < config.total_steps:
        before, now = checkpoint.state["config"]["train"], vars(config.train)
        pairs = [(before[name], now[name]) for name in ("micro_batch_size", "compile")]
        is_exact = checkpoint.state["world_size"] == procs.world_size
        is_exact &= all(saved == requested or "auto" in (saved, requested) for saved, requested in pairs)
        if procs.device.type == "cuda":  # a checkpoint may be older than the setting
            is_exact &= now["deterministic"] and before.get("deterministic", False)
        bits = "" if is_exact else "; the same samples, but not the same bits: see docs/reproducibility.md"
        log.event("resume", step, f"from {checkpoint.path.name} of {config.total_steps} steps{bits}")
    return checkpoint


def prepare(
    config: Config,
    procs: Processes,
    manifest: Manifest,
    checkpoint: Checkpoint | None,
    precision: torch.dtype,
    log: RunLogger,
    stop: Stop,
) -> Run:
    """Builds model and optimizer, new or from the checkpoint, and writes config.json."""
    if procs.device.type == "cpu":
        hardware.keep_freed_memory()
    if procs.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # bf16 matmuls add up in float32
        if config.train.deterministic:  # mainly for attention's backward pass
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # PyTorch would fill every new tensor; everything here is written before it is read.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(config.train.deterministic)
    model = LLM(config.model)
    init_weights(model, config.model, config.train.seed)  # on the CPU, so that every device starts from the same bits
    origin = log.settings().get("init_from")
    if checkpoint is None:
        origin = load_initial_weights(config, procs, model, log) if config.init_from else None
    model.to(procs.device).train()
    procs.activity = "choosing the micro-batch and compiling"
    saved = checkpoint.state["config"]["train"] if checkpoint else None
    config, forward, notes = settle(config, saved, model, precision, procs, log.info)
    procs.activity = "preparing model and optimizer"
    # After `settle`: its trials draw random numbers and need the memory that the optimizer's moments will take.
    state = TrainingState(model, build_optimizers(model, config.optim), Progress())
    if checkpoint is not None:
        state.restore(checkpoint, config.train.seed, procs)
    else:
        seed_random_state(config.train.seed, procs.rank)
    if procs.world_size > 1:
        with procs.collective():  # it compares the processes' parameters
            forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    dataset = {"name": config.data.dir, "sources": manifest.origins, **manifest.counts}
    # Written at every start: it tells a later restart of the same launch that the run has begun.
    settings = run_settings(config, procs, model, precision, {**dataset, "manifest_sha256": manifest.sha256})
    settings |= {"init_from": origin} if origin else {}
    log.write_json("config.json", settings)
    log.info("\n".join([summary(settings, sum(shard.tokens for shard in manifest.train)), *notes]))
    return Run(
        config=config,
        procs=procs,
        log=log,
        watching=Watching(log, config.report_to, config.run_name, settings),
        manifest=manifest,
        state=state,
        guard=SpikeGuard(config.optim.spike_z, state.progress.recent_losses),
        saver=CheckpointSaver(log.run_dir / "checkpoints", config.checkpoint, before=log.before_save),
        after_save=AfterSave(config.checkpoint.after_save, log.run_dir, log.info),
        forward=forward,
        precision=precision,
        stop=stop,
    )


def load_initial_weights(config: Config, procs: Processes, model: LLM, log: RunLogger) -> dict[str, Any]:
    """Loads the weights that config.init_from names into the model. Returns their path and step."""
    nothing: tuple[dict[str, torch.Tensor], Path, int] = ({}, Path(), 0)
    tensors, path, step = procs.together_for_long(
        lambda: read_initial(config) if procs.is_main else nothing, "loading the initial weights"
    )
    load_weights(model, procs.tensors_from_main(tensors), path)
    log.event("init", 0, f"weights of {path}, step {step}")
    return {"path": str(path), "step": step}


def run_steps(run: Run, training: WindowDataset, evaluation: Assessment) -> Outcome:
    """The loop: evaluate and save when due, then one step, until the last or until a stop."""
    config, procs, log, progress = run.config, run.procs, run.log, run.state.progress
    recorded = procs.main_only(log.recorded)
    first_step, started = progress.step, 0.0
    result: StepResult | None = None
    if isinstance(run.stop, StopRequest) and procs.is_main:
        run.stop.answer = lambda: answer_to_stop(run)
    batches = TrainingDataLoader(
        training,
        seed=config.train.seed,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=procs.rank,
        world_size=procs.world_size,
        device=procs.device,
        first_step=first_step,
    )
    with profiler(config.profile, first_step, log) as recording:
        while True:
            # Before the save: once a checkpoint exists, so do the records of its step, and a resume repeats neither.
            for kind in evaluation.missing(progress.step, recorded):
                if not stop_cause(run) and evaluate(run, evaluation, kind):
                    recorded.add((kind, progress.step))
            cause = stop_cause(run)
            ending = bool(cause) or progress.step == config.total_steps
            due = progress.step and progress.step % config.checkpoint.every_steps == 0
            # Skipped steps change nothing, and saving them would push out the checkpoints before them.
            if ending or (due and not progress.skipped_in_a_row):
                save(run)
            record_saves(run, run.saver.finished())
            run.after_save.poll()
            if ending:
                if cause and result and progress.step < config.total_steps:
                    log_line(run, result, stopped=True)
                return finish(run, cause, evaluation.missing(progress.step, recorded))

            step_started = time.perf_counter()
            started = started or step_started  # the time left is estimated without evaluation before the first step
            result = train_step(run, batches)
            if result.skipped:
                procs.together(partial(record_skip, run, batches, result))
            else:
                progress.add_loss(result.loss, time.perf_counter() - step_started)
            if recording:
                recording.step()
            if is_logged(config, progress.step):
                pace = (time.perf_counter() - started) / (progress.step - first_step)
                write_status(run, "running", None, "")
                run.watching.refresh()
                log_line(run, result, f"  {timedelta(seconds=round(pace * (config.total_steps - progress.step)))} left")
                progress.start_line()


def stop_cause(run: Run) -> str:
    """The cause that makes any of the processes stop, or "". A collective: all processes call it."""
    local = local_stop_cause(run)
    return next(filter(None, run.procs.gather(local)), "") if run.procs.any(bool(local)) else ""


def local_stop_cause(run: Run) -> str:
    if cause := run.stop():
        return str(cause)
    if run.saver.failed:
        return "a save that failed"
    try:
        run.log.check_place()
    except StorageError:  # the save that ends the run raises it in all processes
        return "a disk that is gone"
    return f"the file {STOP_FILE}" if run.procs.is_main and (run.log.run_dir / STOP_FILE).is_file() else ""


def train_step(run: Run, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> StepResult:
    """One optimizer step. It changes nothing if its loss or gradient is not finite, or its loss is a spike."""
    config, procs, optimizers, progress = run.config, run.procs, run.state.optimizers, run.state.progress
    procs.activity = f"step {progress.step + 1}"
    lr = set_learning_rate(optimizers, progress.step, config.total_steps, config.warmup_steps, config.optim)
    forward, accumulation = run.forward, config.grad_accumulation_steps(procs.world_size)
    micro_losses = []
    for micro_step in range(accumulation):
        inputs_BT, targets_BT = next(batches)
        # DDP averages gradients over the processes once per step, in the last backward pass.
        is_last = micro_step + 1 == accumulation
        with nullcontext() if is_last or not isinstance(forward, DistributedDataParallel) else forward.no_sync():
            with hardware.autocast(procs.device, run.precision):
                loss = forward(inputs_BT, targets_BT) / accumulation
            with procs.collective():
                loss.backward()
        micro_losses.append(loss.detach())
    mean_loss = procs.mean(torch.stack(micro_losses).sum())
    model = run.state.model
    layers = [model.embedding, *model.blocks] if is_logged(config, progress.step + 1) else []
    grad_norm, *layer_norms = (
        nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None]) for part in (model, *layers)
    )
    # The step's only wait for the device. Loss and gradients are the same in all processes, so all decide alike.
    loss_value, norm_value, *layer_values = torch.stack([mean_loss, grad_norm, *layer_norms]).tolist()
    skipped = ""
    if not math.isfinite(loss_value + norm_value):
        skipped = f"not finite: loss {loss_value}, gradient norm {norm_value}"
    elif run.guard.is_spike(loss_value):
        skipped = f"a spike: loss {loss_value}, gradient norm {norm_value}"
    else:
        nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.clip_grad_norm, grad_norm)
        with procs.collective():  # Muon's updates
            for optimizer in optimizers:
                optimizer.step()
    run.guard.add(loss_value)  # spikes too: enough of them become the new level
    model.zero_grad()
    progress.step += 1  # a skipped step counts: the next one must see other data
    return StepResult(loss_value, norm_value, layer_values, lr, skipped)


def is_logged(config: Config, step: int) -> bool:
    return step % config.train.log_every_steps == 0 or step == config.total_steps


def answer_to_stop(run: Run) -> str:
    """Says what still happens before a requested stop, and estimates its time from the last lines of the log."""
    last = {record["kind"]: record for record in run.log.records()}
    progress, activity, saved = run.state.progress, run.procs.activity, last.get("checkpoint", {})
    step_ms = last.get("train", {}).get("step_ms")
    if progress.loss_steps:
        step_ms = progress.seconds / progress.loss_steps * 1e3
    verb = "finishing" if activity.startswith("step ") else "leaving" if " at step " in activity else "waiting for"
    text = f"stopping: {verb} {activity}, then saving"
    if step_ms:
        text += f", in about {math.ceil(step_ms / 1e3 + (saved.get('seconds') or 0))} s"
    if sys.stderr.isatty() and second_ctrl_c_quits():
        text += f". Ctrl-C again quits without saving; then the run resumes from step {saved.get('step', 0)}"
    return text


def log_line(run: Run, result: StepResult, rest: str = "", **values: Any) -> None:
    """Logs a training line. Loss and speed are means over the steps since the last line, without evaluations."""
    config, progress = run.config, run.state.progress
    if not progress.loss_steps:
        return  # all steps since the last line were skipped
    loss, step_seconds = progress.loss_sum / progress.loss_steps, progress.seconds / progress.loss_steps
    rate = config.train.batch_tokens / step_seconds
    peak = hardware.peak_tflops(run.procs.device, run.precision)
    flops = rate * flops_per_token(config.model, count_parameters(run.state.model))
    mfu = flops / (peak * 1e12 * run.procs.world_size) if peak else None
    memory_gb = hardware.memory_gb(run.procs.device)
    run.log.metric(
        "train",
        progress.step,
        lr=result.lr,
        grad_norm=result.grad_norm,
        layer_grad_norms=[float(f"{norm:.4g}") for norm in result.layer_grad_norms],
        loss=loss,
        tokens_per_second=rate,
        step_ms=step_seconds * 1e3,
        mfu=mfu,
        memory_gb=memory_gb,
        tokens_seen=progress.step * config.train.batch_tokens,
        **values,
    )
    run.log.info(
        f"step {progress.step:>{len(str(config.total_steps))}}/{config.total_steps}  loss {loss:.4f}  "
        f"lr {result.lr:.2e}  grad {result.grad_norm:.2f}  {rate:,.0f} tok/s  {step_seconds * 1e3:,.0f} ms"
        f"{f'  {mfu:.1%} MFU' if mfu else ''}  {memory_gb:.1f} GB{rest}"
    )


def record_skip(run: Run, batches: TrainingDataLoader, result: StepResult) -> None:
    """Records a skipped step and its windows of the data. Raises NonFiniteError after too many in a row."""
    config, progress = run.config, run.state.progress
    progress.skipped_in_a_row += 1
    # Shard numbers count over the whole manifest, which lists validation shards first.
    first = len(run.manifest.validation)
    windows = [(first + shard, window) for shard, window in batches.step_windows(progress.step - 1)]
    n_ctx = config.model.n_ctx
    places = " ".join(f"{shard}:{window * n_ctx}-{(window + 1) * n_ctx}" for shard, window in windows[:4])
    command = f"python -m src.data_processing.data_downloader --inspect --out '{config.data.dir}' --at {places}"
    run.log.event(
        "skipped step",
        progress.step,
        f"{result.skipped}; show the start of its {len(windows)} window(s) of text with: {command}",
        n_ctx=n_ctx,
        windows=windows[:MAX_RECORDED_WINDOWS],
    )
    # A run whose every step is skipped has failed, even one shorter than MAX_SKIPPED_STEPS.
    if progress.skipped_in_a_row >= min(MAX_SKIPPED_STEPS, config.total_steps):
        raise NonFiniteError(
            f"Cannot continue: the last {progress.skipped_in_a_row} step(s), up to step {progress.step}, were skipped, "
            "because the loss or gradient was not finite, or the loss was a spike. They changed no weights. Use a "
            "lower --optim.max-lr or a longer --optim.warmup-steps under another --run-name."
        )


def evaluate(run: Run, evaluation: Assessment, kind: str) -> bool:
    """Runs one kind of evaluation and logs its records. Returns False, without records, if a stop interrupts it."""
    procs, step = run.procs, run.state.progress.step
    procs.activity = f"{kind} at step {step}"
    try:
        records = evaluation.run(
            kind,
            run.state.model,
            run.config.micro_batch_size,
            hardware.autocast(procs.device, run.precision),
            procs,
            lambda: bool(local_stop_cause(run)),
        )
    except StoppedError:
        return False
    for record in records:
        run.log.metric(record.kind, step, **record.values)
        run.log.info(f"step {step}  {record.words}")
    return True


def save(run: Run) -> None:
    """Starts saving a checkpoint of this step. Waits for the previous save and for a copy of the tensors."""
    procs, state = run.procs, run.state
    step, parts = state.progress.step, state.parts(procs)
    plain = state.plain(run.config, run.manifest.sha256, run.precision, procs.world_size)
    procs.main_only(lambda: record_saves(run, run.saver.start(step, parts, plain)), f"the checkpoint of step {step}")


def record_saves(run: Run, saves: list[Saved]) -> None:
    for saved in saves:
        path = saved.path.relative_to(run.log.run_dir)
        times = {"seconds": saved.seconds, "held_up_seconds": saved.held_up_seconds}
        run.log.metric("checkpoint", saved.step, path=str(path), **times, bytes=saved.bytes)
        run.log.info(
            f"saved {path.name}: {saved.bytes / 1e6:.0f} MB in {saved.seconds:.1f} s, "
            f"training paused for {saved.held_up_seconds:.1f} s"
        )
    run.after_save.add(saves)


def finish(run: Run, cause: str, unmeasured: Sequence[str]) -> Outcome:
    """Waits for the last save and writes the end of the log.

    `cause` of a stop, or "". `unmeasured`: evaluations that a stop skipped; the run is not done without them.
    """
    procs, log, step, total_steps = run.procs, run.log, run.state.progress.step, run.config.total_steps
    procs.main_only(lambda: record_saves(run, run.saver.wait()), f"the checkpoint of step {step}")
    done = step == total_steps and not unmeasured  # the next start makes up for skipped evaluations
    if done and (skipped := run.state.progress.skipped_in_a_row):
        log.info(f"warning: the last {skipped} step(s) were skipped, so the weights are those of step {step - skipped}")
    if procs.is_main and (stop_file := log.run_dir / STOP_FILE).is_file():
        cause = f"the file {STOP_FILE}"  # even if a signal came first: slurm/pretrain.sbatch then does not requeue
        with suppress(OSError):  # if it stays, the next start stops at once and names it again
            stop_file.unlink()
    if cause:
        log.event("stop", step, f"requested by {cause}")
    if done:
        return end_done(log, step)
    rest = f". All steps are done; rerun to add {' and '.join(unmeasured)}" if step == total_steps else ""
    message = f"stopped on request after step {step} ({cause}){rest}"
    log.info(f"{message}; everything is in {log.run_dir}")
    write_status(run, "stopped", EXIT_STOPPED, message)
    return Outcome(log.run_dir, step, EXIT_STOPPED)


def end_done(log: RunLogger, step: int) -> Outcome:
    message = f"all {step} steps are done"
    log.info(f"{message}; everything is in {log.run_dir}")
    if log.status().get("state") != "done":  # its time is the end of the run
        log.write_status("done", step, step, EXIT_DONE, message)
    return Outcome(log.run_dir, step, EXIT_DONE)


def write_status(run: Run, state: str, exit_code: int | None, message: str) -> None:
    run.log.write_status(state, run.state.progress.step, run.config.total_steps, exit_code, message)


def run_settings(
    config: Config, procs: Processes, model: LLM, precision: torch.dtype, dataset: dict[str, Any]
) -> dict[str, Any]:
    """Every setting, the numbers derived from it, versions and machine. `dataset` describes the data."""
    parameters = count_parameters(model)
    packages = ("torch", "numpy", "tiktoken", "safetensors")
    return {
        "config": to_dict(config),
        "derived": {
            "total_steps": config.total_steps,
            "warmup_steps": config.warmup_steps,
            "grad_accumulation_steps": config.grad_accumulation_steps(procs.world_size),
            "world_size": procs.world_size,
            "parameters": parameters,
            "parameters_without_embedding": parameters - model.embedding.weight.numel(),
            "flops_per_token": flops_per_token(config.model, parameters),
            "precision": str(precision).removeprefix("torch."),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": hardware.describe_machine(procs.device),
        "dataset": dataset,
        "command": shlex.join(sys.argv),
        "launch": os.environ.get("LAUNCH_ID"),
    }


def summary(settings: dict[str, Any], train_tokens: int) -> str:
    """The most important settings in three lines. `train_tokens`: in the dataset's training shards."""
    config, derived, machine = settings["config"], settings["derived"], settings["machine"]
    train = config["train"]
    epochs = derived["total_steps"] * train["batch_tokens"] / train_tokens
    others = "" if derived["precision"] == "float32" else "; weights, norms, softmax, loss and optimizer in float32"
    return (
        f"run {config['run_name']}: {derived['parameters']:,} parameters, {derived['total_steps']} steps of "
        f"{train['batch_tokens']:,} tokens, {epochs:.2g} epochs of dataset {config['data']['dir']} "
        f"({train_tokens:,} tokens)\n"
        f"on {derived['world_size']} x {machine.get('gpu') or machine['cpu']} ({machine['device']}), "
        f"micro-batch {train['micro_batch_size']} x {config['model']['n_ctx']}, "
        f"{derived['grad_accumulation_steps']} accumulation step(s)\n"
        f"precision: matmuls in {derived['precision']}{others}"
    )


def main() -> int:
    dry_run = "--dry-run" in sys.argv[1:]
    if dry_run:
        sys.argv.remove("--dry-run")
    config = config_from_command_line(
        "Train a language model. Rerun the same command to resume a stopped run. --dry-run only checks the settings, "
        "for the number of processes in the environment variable WORLD_SIZE.",
        also=("--dry-run",),
    )
    if dry_run:
        config.grad_accumulation_steps(world_size())
        say(f"{config.total_steps:,} steps: the settings work; python -m src.preflight checks data and disk too")
        return EXIT_DONE
    with stop_on_signals() as stop:
        outcome = train(config, stop)
        if outcome.exit_code == EXIT_STOPPED and os.environ.get("RANK", "0") == "0" and "LAUNCH_ID" not in os.environ:
            is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
            command = "the same torchrun command" if is_torchrun else shlex.join(without_resume(sys.orig_argv))
            say(f"to resume: {command}")
        return outcome.exit_code


if __name__ == "__main__":
    exit_with(main)
