"""A recording of some training steps, for finding out where their time goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from src.utils.logger import RunLogger

WARM_UP_STEPS = 2  # not recorded: the first one allocates, and may compile


@contextmanager
def profiler(steps: int, first_step: int, log: RunLogger) -> Iterator[torch.profiler.profile | None]:
    """In the main process, PyTorch's profiler for `steps` steps, whose `step` the caller calls after each; else None.

    The recording lies in the run's folder `profile`: a trace for ui.perfetto.dev or chrome://tracing, and a table of
    the operators that took the most time. One that cannot be written is worth a line in the log, not the run.
    """
    if not steps or not log.is_main:
        yield None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=0, warmup=WARM_UP_STEPS, active=steps, repeat=1),
        on_trace_ready=partial(_write, log.run_dir / "profile", first_step, log),
    ) as recording:
        yield recording
    if recording.step_num <= WARM_UP_STEPS:
        log.info(f"warning: no profile: the run ended within its first {WARM_UP_STEPS} steps, which are not recorded")


def _write(folder: Path, first_step: int, log: RunLogger, recording: torch.profiler.profile) -> None:
    done = recording.step_num  # fewer than asked for where the run ends before
    name = f"steps_{first_step + WARM_UP_STEPS + 1:07d}_to_{first_step + done:07d}"
    trace = folder / f"{name}.json.gz"
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    try:
        folder.mkdir(exist_ok=True)
        recording.export_chrome_trace(str(trace))
        table = recording.key_averages().table(sort_by=order, row_limit=30)
        (folder / f"{name}.txt").write_text(table, encoding="utf-8")
    except Exception as error:
        log.info(f"warning: no profile in {folder}: {error}")
    else:
        log.info(f"profile: {trace} opens at ui.perfetto.dev; the operators by time are in {name}.txt beside it")
