"""A model's parameter count and FLOPs, and a profiler for training steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from src.params import ModelConfig
from src.utils.errors import cause_of
from src.utils.logger import RunLogger

WARM_UP_STEPS = 2  # not recorded: the first one allocates, and may compile


def count_parameters(model: nn.Module) -> int:
    """Number of parameters. A shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: ModelConfig, n_parameters: int) -> int:
    """Floating-point operations to train on one token: 6 N + 12 L D T.

    6 N: each parameter multiplies and adds once in the forward pass and twice in the backward pass. The embedding's
    lookup is free, but its weight is the head's matmul, so it counts once.
    12 L D T: the two attention matmuls over the full context (PaLM paper, appendix B,
    https://arxiv.org/abs/2204.02311). Causal masking would halve them, but MFU is usually reported without that.
    """
    return 6 * n_parameters + 12 * config.n_layer * config.n_embd * config.n_ctx


@contextmanager
def profiler(steps: int, first_step: int, log: RunLogger) -> Iterator[torch.profiler.profile | None]:
    """Yields PyTorch's profiler in the main process, else None. The caller calls its `step` after each step.

    After `steps` steps, writes a trace for ui.perfetto.dev and a table of the slowest operators to RUN/profile.
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


def _write(folder: Path, first_step: int, log: RunLogger, recording: torch.profiler.profile) -> None:
    last = first_step + recording.step_num  # earlier than requested if the run ends before that
    name = f"steps_{first_step + WARM_UP_STEPS + 1:07d}_to_{last:07d}"
    trace = folder / f"{name}.json.gz"
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    try:
        folder.mkdir(exist_ok=True)
        recording.export_chrome_trace(str(trace))
        table = recording.key_averages().table(sort_by=order, row_limit=30)
        (folder / f"{name}.txt").write_text(table, encoding="utf-8")
    except Exception as error:  # a profile that cannot be written does not end the run
        log.info(f"warning: Cannot write the profile in {folder}: {cause_of(error)}")
    else:
        log.info(f"profile: open {trace} at ui.perfetto.dev; {name}.txt lists the slowest operators")
