"""What a run says of itself as it goes: training lines, saves, its status, and which samples a skipped step had."""

import math
from datetime import timedelta

from src.data_processing.training_data_loader import TrainingDataLoader
from src.model_utils.checkpoint_saver import Saved
from src.model_utils.run_records import training_record
from src.model_utils.step_numbers import StepNumbers
from src.run_setup import Run


def log_training(run: Run, numbers: StepNumbers, seconds_left: float) -> None:
    """One training line; loss and speed are means over the steps since the last one, evaluations left out."""
    config, progress = run.config, run.state.progress
    if not progress.loss_steps:
        return  # every step since the last line was skipped
    record = training_record(config, progress, run.state.model, run.procs)
    lr, (_, grad_norm, _) = numbers.lr, numbers.read()
    run.log.metric("train", progress.step, lr=lr, grad_norm=grad_norm, **record)
    used = f"  {record['mfu']:.1%} MFU" if record["mfu"] else ""
    run.log.info(
        f"step {progress.step:>{len(str(config.total_steps))}}/{config.total_steps}  loss {record['loss']:.4f}  "
        f"lr {lr:.2e}  grad {grad_norm:.2f}  {record['tokens_per_second']:,.0f} tok/s  {record['step_ms']:,.0f} ms"
        f"{used}  {record['memory_gb']:.1f} GB  {timedelta(seconds=round(seconds_left))} left"
    )
    write_status(run, "running", None, "")
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


def write_status(run: Run, state: str, exit_code: int | None, message: str) -> None:
    run.log.write_status(state, run.state.progress.step, run.config.total_steps, exit_code, message)
