"""What a run says of itself: training lines, saves, skipped steps with their samples, its status and its end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from src.data_processing.training_data_loader import TrainingDataLoader
from src.model_utils.checkpoint_saver import Saved
from src.model_utils.checkpoint_utils import prune
from src.model_utils.run_records import training_record
from src.model_utils.step_numbers import StepNumbers
from src.params import Config
from src.run_setup import Run
from src.utils.errors import EXIT_DONE, EXIT_STOPPED, NonFiniteError
from src.utils.handle_ddp import Processes
from src.utils.logger import RunLogger

MAX_SKIPPED_STEPS = 10  # in a row
MAX_RECORDED_WINDOWS = 256  # of a skipped step
STOP_FILE = "STOP"  # a file of this name in the run directory asks for a stop once training goes on


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run_dir: Path
    step: int
    """Completed optimizer steps."""
    exit_code: int
    """0 if every step is done, 143 if the run was asked to stop; it saved, unless its last steps were skipped."""


def log_training(run: Run, numbers: StepNumbers, seconds_left: float) -> None:
    """One training line; loss and speed are means over the steps since the last one, evaluations left out."""
    config, progress = run.config, run.state.progress
    if not progress.loss_steps:
        return  # every step since the last line was skipped
    record = training_record(config, progress, run.state.model, run.procs, run.precision)
    lr, (_, grad_norm, _) = numbers.lr, numbers.read()
    run.log.metric("train", progress.step, lr=lr, grad_norm=grad_norm, **record)
    used = f"  {record['mfu']:.1%} MFU" if record["mfu"] else ""
    run.log.info(
        f"step {progress.step:>{len(str(config.total_steps))}}/{config.total_steps}  loss {record['loss']:.4f}  "
        f"lr {lr:.2e}  grad {grad_norm:.2f}  {record['tokens_per_second']:,.0f} tok/s  {record['step_ms']:,.0f} ms"
        f"{used}  {record['memory_gb']:.1f} GB  {timedelta(seconds=round(seconds_left))} left"
    )
    write_status(run, "running", None, "")
    run.watching.refresh()
    progress.start_line()


def record_saves(run: Run, saves: list[Saved]) -> None:
    for saved in saves:
        path = saved.path.relative_to(run.log.run_dir)
        times = {"seconds": saved.seconds, "held_up_seconds": saved.held_up_seconds}
        run.log.metric("checkpoint", saved.step, path=str(path), **times, bytes=saved.bytes)
        run.log.info(
            f"saved {path.name}: {saved.bytes / 1e6:.0f} MB in {saved.seconds:.1f} s, "
            f"of which training waited {saved.held_up_seconds:.1f} s"
        )


def record_skip(run: Run, batches: TrainingDataLoader, numbers: StepNumbers) -> None:
    """Records a step that changed nothing, and the windows that may be the cause; too many in a row end the run."""
    config, progress = run.config, run.state.progress
    progress.skipped_in_a_row += 1
    loss, grad_norm, _ = numbers.read()
    what = "a spike" if math.isfinite(loss) and math.isfinite(grad_norm) else "not finite"
    names = [name for name, _ in run.state.model.named_parameters()]
    bad = [name for name, norm in zip(names, numbers.norms_P.tolist(), strict=True) if not math.isfinite(norm)]
    where = f"; not finite in {len(bad)} gradients, first {bad[0]}" if bad else ""
    windows = suspects(run, batches, numbers)
    look = f"--inspect --out '{config.data.dir}' --skipped '{config.run_name}' shows {len(windows)} window(s) of it"
    run.log.event(
        "skipped step",
        numbers.step,
        f"{what}: loss {loss}, gradient norm {grad_norm}{where}; data_downloader {look}",
        n_ctx=config.model.n_ctx,
        windows=windows[:MAX_RECORDED_WINDOWS],
    )
    if progress.skipped_in_a_row >= min(MAX_SKIPPED_STEPS, config.total_steps):
        run.procs.together(lambda: give_up(run, numbers.step))


def give_up(run: Run, step: int) -> None:
    """Raises the error of a run that cannot go on after `step`."""
    raise NonFiniteError(
        f"the last {run.state.progress.skipped_in_a_row} step(s), up to step {step}, were skipped: loss or gradient "
        "not finite, or the loss a spike. They changed no weights. Start again with a lower --optim.max-lr or a longer "
        "--optim.warmup-steps under another --run-name"
    )


def suspects(run: Run, batches: TrainingDataLoader, numbers: StepNumbers) -> list[tuple[int, int]]:
    """Shard of the manifest and window there of a step's samples: of the micro-batches whose own loss is not finite.

    Of all of them, where there is no such loss.
    """
    bad = [micro_batch for micro_batch, loss in enumerate(numbers.losses_M.tolist()) if not math.isfinite(loss)]
    micro = run.config.micro_batch_size
    windows = batches.step_windows(numbers.step - 1)
    share = len(windows) // run.procs.world_size
    suspected = [
        window
        for rank, micro_batches in enumerate(run.procs.gather(bad))
        for number in micro_batches
        for window in windows[rank * share + number * micro : rank * share + (number + 1) * micro]
    ]
    return [(len(run.manifest.validation) + shard, window) for shard, window in suspected or windows]


def finish(run: Run, asked_by: str, unmeasured: Sequence[str]) -> Outcome:
    """The last words of a run that is done or was asked to stop.

    `unmeasured`: what a stop left out after this step. A run that lacks some of it at its end is not done yet.
    """
    procs, log, step, total_steps = run.procs, run.log, run.state.progress.step, run.config.total_steps
    procs.doing(f"the checkpoint of step {step}")
    procs.main_only(lambda: record_saves(run, run.saver.wait()), for_long=True)
    done = step == total_steps and not unmeasured
    if done and (skipped := run.state.progress.skipped_in_a_row):
        log.info(f"warning: the last {skipped} step(s) were skipped, so the weights are those of step {step - skipped}")
    if procs.is_main and (stop_file := log.run_dir / STOP_FILE).exists():
        asked_by = f"the file {STOP_FILE}"  # also where a signal was faster: it decides what happens next
        try:
            stop_file.unlink()
        except OSError as error:
            log.info(f"warning: {stop_file} cannot be removed ({error.strerror}); the next start will stop at once")
    if asked_by:
        log.event("stop", step, f"asked for by {asked_by}")
    words = all_done(total_steps) if done else f"stopped on request after step {step} ({asked_by})"
    log.info(f"{words}; everything is in {log.run_dir}")
    code = EXIT_DONE if done else EXIT_STOPPED
    write_status(run, "done" if done else "stopped", code, words)
    return Outcome(log.run_dir, step, code)


def already_done(config: Config, procs: Processes, log: RunLogger) -> Outcome:
    """The end of a start that finds nothing left to do, also after a kill between the last save and the last words."""
    step, keep = config.total_steps, config.checkpoint
    procs.main_only(lambda: prune(log.run_dir / "checkpoints", keep.keep_last, keep.keep_every_steps, {step}))
    log.info(f"{all_done(step)}; everything is in {log.run_dir}")
    if log.status().get("state") != "done":
        log.write_status("done", step, step, EXIT_DONE, all_done(step))
    return Outcome(log.run_dir, step, EXIT_DONE)


def all_done(total_steps: int) -> str:
    return f"all {total_steps} steps are done"


def write_status(run: Run, state: str, exit_code: int | None, message: str) -> None:
    run.log.write_status(state, run.state.progress.step, run.config.total_steps, exit_code, message)
