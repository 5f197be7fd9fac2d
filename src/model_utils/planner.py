"""Estimates of a run before it costs money: parameters, FLOPs, memory, time, dollars, disk.

    python -m src.model_utils.planner PRESET [--gpu a100-80g --gpus 8 --price-per-gpu-hour 1.8] [overrides]
    python -m src.model_utils.planner PRESET --sweep --gpus 8 --price-per-gpu-hour a100-80g=1.8,h100-80g=2.9

Stderr gets a line per number, and one JSON object is the last line of stdout. Time follows from an assumed share of
the GPU's peak rate (MFU), memory from src/model_utils/memory_estimate.py.
"""

import src  # noqa: F401 (before torch: see there)
from src.utils.stop_signals import end_at_once_on_ctrl_c

if __name__ == "__main__":
    end_at_once_on_ctrl_c()  # before the seconds that importing torch takes

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from src.model import LLM
from src.model_configs.arguments import Parser, between
from src.model_configs.my_llm_config import config_from_command_line, lf_llm_269m
from src.model_utils.adamw_opt import build_optimizers
from src.model_utils.autotune import SPARE_GPU
from src.model_utils.checkpoint_saver import checkpoint_bytes, checkpoints_need
from src.model_utils.debugging import flops_per_token
from src.model_utils.memory_estimate import FLOAT32, Memory, Step, estimate_memory, parameter_counts
from src.model_utils.muon import Muon
from src.params import Config, divisors
from src.utils.errors import EXIT_DONE, UserError, exit_with, print_result, say
from src.utils.files import size_text
from src.utils.hardware import PEAK_BF16_TFLOPS, choose_device, choose_precision

REFERENCE_MFU = 0.32  # from its log: 43.3k tokens/s per A100 with 8 of them
# Memory missing from the estimates, as a share of them: CUDA context, NCCL, fragmentation. From the only measurement:
# the reference's step took 72 GB (LOG.md).
UNCOUNTED = 0.2
COUNTS = (1, 2, 4, 8, 16)  # of GPUs, in a sweep of one kind
NODE = 8  # GPUs, in a sweep of all kinds
TOKEN_BYTES = 2


@dataclass(frozen=True)
class GPU:
    """A GPU model, from the maker's data sheet. GPUs without bf16 matrix units are left out."""

    memory_gb: float
    tflops: float
    """Dense bf16 peak; data sheets often give twice that, with sparsity."""
    source: str


GPUS = {
    "a100-40g": GPU(40, PEAK_BF16_TFLOPS["A100"], "NVIDIA A100 data sheet (2021), SXM"),
    "a100-80g": GPU(80, PEAK_BF16_TFLOPS["A100"], "NVIDIA A100 data sheet (2021), SXM"),
    "h100-80g": GPU(80, PEAK_BF16_TFLOPS["H100"], "NVIDIA H100 data sheet (2023), SXM"),
    "h200": GPU(141, PEAK_BF16_TFLOPS["H200"], "NVIDIA H200 data sheet (2023), SXM"),
    "b200": GPU(180, PEAK_BF16_TFLOPS["B200"], "NVIDIA HGX B200 data sheet (2024)"),
    "l40s": GPU(48, PEAK_BF16_TFLOPS["L40S"], "NVIDIA L40S data sheet (2023)"),
    "l4": GPU(24, PEAK_BF16_TFLOPS["L4"], "NVIDIA L4 data sheet (2023): 242 with sparsity"),
    "rtx-4090": GPU(24, PEAK_BF16_TFLOPS["RTX 4090"], "NVIDIA Ada architecture paper (2022), appendix A"),
    "rtx-3090": GPU(24, PEAK_BF16_TFLOPS["RTX 3090"], "NVIDIA GA102 architecture paper (2020), appendix A"),
}


class Cost(NamedTuple):
    """Speed, time and price of the training steps, without evaluation and checkpoints."""

    tokens_per_second: float
    hours: float
    dollars: float | None


def step_of(config: Config, micro_batch_size: int, world_size: int, kind: str = "cuda") -> Step:
    """The run's step with this micro-batch. Raises ConfigError if the processes cannot share the batch evenly."""
    sized = replace(config, train=replace(config.train, micro_batch_size=micro_batch_size))
    accumulates = sized.grad_accumulation_steps(world_size) > 1
    itemsize = FLOAT32 if config.train.precision == "float32" else 2
    # The micro-batch "auto" is tested uncompiled (autotune.py), which takes more memory.
    is_compiled = kind == "cuda" and config.train.compile != "off" and config.train.micro_batch_size != "auto"
    return Step(
        config.model,
        micro_batch_size,
        itemsize,
        kind,
        kept_gradients=accumulates + (world_size > 1),
        is_compiled=is_compiled,
        has_muon=config.optim.optimizer == "muon",
    )


def largest_fit(config: Config, gpu: GPU, count: int) -> int:
    """The largest micro-batch that fits and divides a GPU's share; 0 if not even one sequence fits.

    Raises ConfigError if the GPUs cannot share the batch.
    """
    step_of(config, 1, count)
    sizes = divisors(config.batch_size // count)
    return next((n for n in sizes if estimate_memory(step_of(config, n, count)).total <= usable_bytes(gpu)), 0)


def usable_bytes(gpu: GPU) -> int:
    """The part of the GPU's memory that an estimate may fill."""
    return int((1 - SPARE_GPU) * gpu.memory_gb * 1e9 / (1 + UNCOUNTED))


def cost(config: Config, gpu: GPU, count: int, mfu: float = REFERENCE_MFU, price: float | None = None) -> Cost:
    """Speed, time and price. Tokens per second = GPUs x peak x MFU / FLOPs per token, including Muon's.

    `price`: dollars per GPU-hour; None for no estimate of the cost.
    """
    peak = gpu.tflops / 2 if config.train.precision == "float32" else gpu.tflops  # TF32, as in hardware.peak_tflops
    per_token = flops_per_token(config.model, parameter_counts(config.model)[0])
    flops = per_token + optimizer_flops(config) / config.train.batch_tokens
    speed = count * peak * 1e12 * mfu / flops
    gpu_hours = count * config.total_steps * config.train.batch_tokens / speed / 3600
    return Cost(speed, gpu_hours / count, None if price is None else gpu_hours * price)


def optimizer_flops(config: Config) -> int:
    """FLOPs of Muon in a step, summed over the processes that share them. AdamW's cost is only memory traffic."""
    with torch.device("meta"):
        optimizers = build_optimizers(LLM(config.model), config.optim)
    return sum(optimizer.flops() for optimizer in optimizers if isinstance(optimizer, Muon))


def describe(config: Config) -> dict[str, Any]:
    """Parameters, FLOPs and disk, which are the same on any machine."""
    parameters, _ = parameter_counts(config.model)
    tokens, flops = config.total_steps * config.train.batch_tokens, flops_per_token(config.model, parameters)
    no_run = Path(os.devnull) / "checkpoints"  # a folder that cannot hold checkpoints of an earlier start
    return {
        "parameters": parameters,
        "parameters_without_embedding": parameters - config.model.n_vocab * config.model.n_embd,
        "flops_per_token": flops,
        "optimizer_flops_per_step": optimizer_flops(config),
        "steps": config.total_steps,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "total_flops": float(flops * tokens),
        "disk_bytes": {
            "data": TOKEN_BYTES * (tokens + config.eval.val_tokens),
            "one_checkpoint": checkpoint_bytes(config),
            "checkpoints": checkpoints_need(replace(config, resume="never"), no_run),
        },
    }


def plan_here(config: Config) -> dict[str, Any]:
    """Memory of a step of one process on this machine's device."""
    device = choose_device(config.train.device)
    precision = choose_precision(config.train.precision, device)
    step = replace(step_of(config, config.micro_batch_size, 1, device.type), itemsize=precision.itemsize)
    return {"device": device.type, **_step_numbers(step, config.grad_accumulation_steps(1), estimate_memory(step))}


def plan_gpus(config: Config, name: str, count: int, mfu: float, price: float | None) -> dict[str, Any]:
    """Memory, time and cost on `count` GPUs. Raises ConfigError or UserError for what cannot work."""
    gpu, size = GPUS[name], config.train.micro_batch_size
    config.grad_accumulation_steps(count)  # refuses a micro-batch that does not divide
    if not (largest := largest_fit(config, gpu, count)):
        raise UserError(
            f"Cannot train on {name}: not even one sequence of {config.model.n_ctx} tokens fits, which takes "
            f"{size_text(estimate_memory(step_of(config, 1, count)).total)} of {size_text(usable_bytes(gpu))}. Choose "
            "a GPU with more memory, a smaller model, or a smaller --model.n-ctx."
        )
    step = step_of(config, largest if size == "auto" else size, count)
    memory = estimate_memory(step)
    result = {
        "gpu": {"name": name} | asdict(gpu),
        "gpus": count,
        **_step_numbers(step, config.batch_size // count // step.micro_batch_size, memory),
        "usable_memory_bytes": usable_bytes(gpu),
        "fits": memory.total <= usable_bytes(gpu),
        "largest_micro_batch_size": largest,
        **cost(config, gpu, count, mfu, price)._asdict(),
    }
    published = lf_llm_269m()
    ours, theirs = (parameter_counts(each.model)[0] for each in (config, published))
    if abs(ours / theirs - 1) < 0.01 and config.optim != published.optim:  # another recipe for the same size
        tokens = published.total_steps * published.train.batch_tokens
        result["published_recipe"] = {"tokens": tokens, **cost(published, gpu, count, mfu, price)._asdict()}
    return result


def _step_numbers(step: Step, accumulation: int, memory: Memory) -> dict[str, Any]:
    return {
        "micro_batch_size": step.micro_batch_size,
        "accumulation_steps": accumulation,
        "matmuls_in": "float32" if step.itemsize == FLOAT32 else "bfloat16",
        "memory_bytes": asdict(memory) | {"total": memory.total},
    }


def sweep(config: Config, prices: dict[str, float | None], counts: Sequence[int], mfu: float) -> list[dict[str, Any]]:
    """One row per kind in `prices` and count: the largest micro-batch and the cost; 0 and None if nothing fits.

    Raises ConfigError for a count that cannot share the batch.
    """
    rows = []
    for (name, price), count in product(prices.items(), counts):
        size = largest_fit(config, GPUS[name], count)
        row = {"gpu": name, "gpus": count, "fits": size > 0, "micro_batch_size": size}
        row["accumulation_steps"] = config.batch_size // count // max(1, size)
        numbers = cost(config, GPUS[name], count, mfu, price)._asdict()
        rows.append(row | (numbers if size else dict.fromkeys(numbers)))
    return rows


def main() -> int:
    args, config = _parse()
    prices = args.price_per_gpu_hour or dict.fromkeys(GPUS)
    result: dict[str, Any] = {"run_name": config.run_name, **describe(config)}
    if args.gpu or args.sweep:
        is_reference = args.mfu == REFERENCE_MFU
        result |= {"mfu": args.mfu, "mfu_source": "assumed: the reference's, on A100" if is_reference else "as given"}
    if args.sweep:
        possible = [n for n in COUNTS if config.batch_size % n == 0]
        counts = [args.gpus] if args.gpus else possible if args.gpu else [max(n for n in possible if n <= NODE)]
        result["sweep"] = sweep(config, {args.gpu: prices[args.gpu]} if args.gpu else prices, counts, args.mfu)
    elif args.gpu:
        result |= plan_gpus(config, args.gpu, args.gpus or 1, args.mfu, prices[args.gpu])
    else:
        result |= plan_here(config)
    say("\n".join(_lines(result)))
    print_result(result)  # the text is on stderr
    return EXIT_DONE


def _parse() -> tuple[argparse.Namespace, Config]:
    parser = Parser(prog="python -m src.model_utils.planner", add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu", type=str.lower, choices=GPUS)
    parser.add_argument("--gpus", metavar="N", type=between(1, 10_000))
    parser.add_argument("--mfu", metavar="SHARE", type=between(0.001, 1), default=REFERENCE_MFU)
    parser.add_argument("--price-per-gpu-hour", metavar="DOLLARS", type=_prices)
    parser.add_argument("--sweep", action="store_true")
    args, sys.argv[1:] = parser.parse_known_args()
    if not (args.gpu or args.sweep) and (args.gpus or args.price_per_gpu_hour):
        parser.error("no GPU to plan for; name one with --gpu, or compare all with --sweep")
    if args.gpu and args.price_per_gpu_hour and not args.price_per_gpu_hour[args.gpu]:
        parser.error(f"--price-per-gpu-hour has no price of {args.gpu}; add {args.gpu}=DOLLARS")
    config = config_from_command_line(
        "Estimate the memory, time and cost of a run. Options in addition to the overrides: --gpu NAME and --gpus N "
        f"({', '.join(GPUS)}); --mfu SHARE of the GPU's peak, by default the reference's {REFERENCE_MFU}; "
        "--price-per-gpu-hour, one price or a100-80g=1.8,h200=3.5; --sweep, a line for each kind of GPU, or with --gpu "
        "for each number. Exit codes: 0 done, 2 the run cannot work.",
        prog="python -m src.model_utils.planner",
        also=parser._option_string_actions,
    )
    return args, config


def _prices(text: str) -> dict[str, float | None]:
    """Dollars per GPU-hour by kind, from "1.8" for all or "a100-80g=1.8,h200=3.5"."""
    dollars, prices = between(1e-6, 1e12), dict[str, float | None].fromkeys(GPUS)
    if "=" not in text:
        try:
            return dict.fromkeys(GPUS, dollars(text))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, for all kinds, or GPU=DOLLARS,GPU=DOLLARS") from None
    for name, _, value in (part.partition("=") for part in text.lower().split(",")):
        if name not in GPUS:
            raise argparse.ArgumentTypeError(f"{name!r} is not a GPU in GPU=DOLLARS; choose from {', '.join(GPUS)}")
        prices[name] = dollars(value)
    return prices


def _lines(result: dict[str, Any], indent: str = "") -> Iterator[str]:
    """One line per number, under its group; a sweep becomes a table."""
    for name, value in result.items():
        label = indent + name.replace("_bytes", "").replace("_", " ")
        if isinstance(value, dict):
            yield f"{label}:"
            in_bytes = name.endswith("_bytes")
            yield from _lines({k: size_text(v) if in_bytes else v for k, v in value.items()}, indent + "  ")
        elif isinstance(value, list):
            columns = [name for name in value[0] if any(row[name] is not None for row in value)]
            for row in (dict(zip(columns, columns, strict=True)), *value):
                yield "".join(f"{_text(row[name]).replace('_', ' '):>{max(len(name), 8) + 2}}" for name in columns)
        elif value is not None:
            yield f"{label:<32}{size_text(value) if name.endswith('_bytes') else _text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if isinstance(value, int) or 100 <= value < 1e12 else f"{value:.3g}"


if __name__ == "__main__":
    exit_with(main)
