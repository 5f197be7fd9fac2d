"""The planner's arithmetic: what fits a GPU, and how long a run takes and what it costs on some of them."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from src.model_utils.autotune import SPARE_GPU
from src.model_utils.checkpoint_saver import checkpoint_bytes, checkpoints_need
from src.model_utils.debugging import flops_per_token
from src.model_utils.gpus import GPU, find_gpu
from src.model_utils.memory_estimate import FLOAT32, Memory, Step, estimate_memory, parameter_counts
from src.params import Config, ConfigError
from src.utils.errors import UserError
from src.utils.files import size_text
from src.utils.hardware import choose_device, choose_precision

# The reference's own log: 43.3k tokens/s an A100 between evaluations, on 8 of them, its gradients' travel included.
REFERENCE_MFU = 0.32
# Beside what the estimate counts: the CUDA context, NCCL, what the allocator wastes. The one figure that we know, the
# reference's 72 GB, is that much above the estimate of its step (LOG.md).
UNCOUNTED = 0.2
COUNTS = (1, 2, 4, 8, 16)
TOKEN_BYTES = 2  # uint16 in the shards
_NO_RUN = Path(os.devnull) / "checkpoints"  # a folder that cannot hold checkpoints of an earlier start


@dataclass(frozen=True)
class Assumptions:
    """What the configuration doesn't say."""

    mfu: float = REFERENCE_MFU
    mfu_source: str = "assumed: the reference's, on A100"
    price: float | None = None
    """Dollars a GPU-hour."""
    watts: float | None = None
    """Of a GPU; 0: its board power; None: energy is not asked for."""


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch, of those that divide a GPU's share of the batch, that fits its memory."""

    micro_batch_size: int
    """0: not even one sequence fits."""
    accumulation_steps: int
    memory: Memory


@dataclass(frozen=True)
class Cost:
    """Of the training steps; evaluations and checkpoints come on top."""

    tokens_per_second: float
    hours: float
    dollars: float | None
    kwh: float | None


def step_of(config: Config, micro_batch_size: int, world_size: int, kind: str = "cuda") -> Step:
    """How the run's steps are done. Raises ConfigError where the processes cannot share the batch evenly."""
    sized = replace(config, train=replace(config.train, micro_batch_size=micro_batch_size))
    accumulates, has_ddp = sized.grad_accumulation_steps(world_size) > 1, world_size > 1
    itemsize = FLOAT32 if config.train.precision == "float32" else 2
    return Step(config.model, micro_batch_size, itemsize, kind, accumulates or has_ddp, accumulates and has_ddp)


def largest_fit(config: Config, gpu: GPU, count: int) -> Fit:
    """Raises ConfigError where `count` GPUs cannot share the batch evenly, whatever the micro-batch."""
    memory = estimate_memory(step_of(config, 1, count))
    share = config.batch_size // count
    for size in (size for size in range(share, 0, -1) if share % size == 0):
        memory = estimate_memory(step_of(config, size, count))
        if memory.total <= usable_bytes(gpu):
            return Fit(size, share // size, memory)
    return Fit(0, share, memory)


def usable_bytes(gpu: GPU) -> int:
    """Of its memory: what estimates may add up to, so that `train.micro_batch_size auto` would still find room."""
    return int((1 - SPARE_GPU) * gpu.memory_bytes / (1 + UNCOUNTED))


def cost(config: Config, gpu: GPU, count: int, given: Assumptions) -> Cost:
    """From tokens a second = GPUs x peak x MFU / operations a token."""
    parameters, _ = parameter_counts(config.model)
    # as hardware.peak_tflops
    peak = gpu.tflops / 2 if config.train.precision == "float32" else gpu.tflops
    speed = count * peak * 1e12 * given.mfu / flops_per_token(config.model, parameters)
    hours = config.total_steps * config.train.batch_tokens / speed / 3600
    dollars = None if given.price is None else count * hours * given.price
    kwh = None if given.watts is None else count * hours * (given.watts or gpu.watts) / 1000
    return Cost(speed, hours, dollars, kwh)


def describe(config: Config) -> dict[str, Any]:
    """What is so on any machine: parameters, work, disk."""
    parameters, _ = parameter_counts(config.model)
    tokens = config.total_steps * config.train.batch_tokens
    flops = flops_per_token(config.model, parameters)
    return {
        "parameters": parameters,
        "parameters_without_embedding": parameters - config.model.n_vocab * config.model.n_embd,
        "flops_per_token": flops,
        "steps": config.total_steps,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "total_flops": flops * tokens,
        "disk_bytes": {
            "data": TOKEN_BYTES * (tokens + config.eval.val_tokens),
            "one_checkpoint": checkpoint_bytes(config),
            "checkpoints": checkpoints_need(replace(config, resume="never"), _NO_RUN),
        },
    }


def plan_here(config: Config) -> dict[str, Any]:
    """The memory of a step on this machine's device, with one process."""
    device = choose_device(config.train.device)
    precision = choose_precision(config.train.precision, device)
    step = replace(step_of(config, config.micro_batch_size, 1, device.type), itemsize=precision.itemsize)
    memory = estimate_memory(step)
    return {
        "device": device.type,
        "micro_batch_size": config.micro_batch_size,
        "accumulation_steps": config.grad_accumulation_steps(1),
        "matmuls_in": str(precision).removeprefix("torch."),
        "memory_bytes": {**asdict(memory), "total": memory.total},
    }


def plan_gpus(config: Config, name: str, count: int, given: Assumptions) -> dict[str, Any]:
    """Memory, time and cost on `count` of the GPU. Raises ConfigError or UserError for what cannot work."""
    gpu, accumulation = find_gpu(name), config.grad_accumulation_steps(count)
    largest = chosen = largest_fit(config, gpu, count)
    if not largest.micro_batch_size:
        raise UserError(
            f"not even one sequence of {config.model.n_ctx} tokens fits {name}: {size_text(largest.memory.total)} "
            f"are needed, and {size_text(usable_bytes(gpu))} of its {gpu.memory_gb:g} GB can be used; take a GPU with "
            "more memory, or make the model or --model.n-ctx smaller"
        )
    if config.train.micro_batch_size != "auto":
        size = config.train.micro_batch_size
        chosen = Fit(size, accumulation, estimate_memory(step_of(config, size, count)))
    return {
        "gpu": {"name": name.lower(), **asdict(gpu)},
        "gpus": count,
        "micro_batch_size": chosen.micro_batch_size,
        "accumulation_steps": chosen.accumulation_steps,
        "matmuls_in": "float32" if config.train.precision == "float32" else "bfloat16",
        "memory_bytes": {**asdict(chosen.memory), "total": chosen.memory.total},
        "usable_memory_bytes": usable_bytes(gpu),
        "fits": chosen.memory.total <= usable_bytes(gpu),
        "largest_micro_batch_size": largest.micro_batch_size,
        "mfu": given.mfu,
        "mfu_source": given.mfu_source,
        **asdict(cost(config, gpu, count, given)),
    }


def sweep(config: Config, names: Sequence[str], given: Assumptions) -> list[dict[str, Any]]:
    """A row for each GPU and count: the largest micro-batch, 0 where none fits, and the cost, None there."""
    rows = []
    for name in names:
        for count in COUNTS:
            try:
                fit = largest_fit(config, find_gpu(name), count)
            except ConfigError:
                continue  # this many cannot share the batch
            row = {"gpu": name, "gpus": count, "fits": fit.micro_batch_size > 0}
            row |= {"micro_batch_size": fit.micro_batch_size, "accumulation_steps": fit.accumulation_steps}
            numbers = asdict(cost(config, find_gpu(name), count, given))
            rows.append(row | (numbers if row["fits"] else dict.fromkeys(numbers)))
    return rows
