"""What a run will take, before any money is spent: parameters, work, memory, time, dollars, disk.

    python -m src.model_utils.planner PRESET [--gpu a100-80g --gpus 8 --price-per-gpu-hour 1.8] [overrides]

Nothing is trained. Tables for people go to stderr, and one JSON object is the last line on stdout. Time follows from an
assumed share of the GPU's peak (MFU): the reference's, or that of --mfu. How far the estimates are off is in LOG.md.
"""

import src  # noqa: F401 (before torch: see there)
from src.utils.stop_signals import end_at_once_on_ctrl_c

if __name__ == "__main__":
    end_at_once_on_ctrl_c()  # before the seconds that importing torch takes

import argparse
import json
import math
import sys
from dataclasses import replace
from typing import Any

from src.model_configs.command_line import config_from_command_line
from src.model_utils.gpus import GPUS
from src.model_utils.run_plan import REFERENCE_MFU, Assumptions, describe, plan_gpus, plan_here, sweep
from src.params import Config
from src.utils.errors import EXIT_DONE, UserError, exit_with, say
from src.utils.files import size_text


def main() -> int:
    args, config = _parse()
    given = Assumptions(price=args.price_per_gpu_hour, watts=args.watts)
    if args.mfu is not None:
        given = replace(given, mfu=args.mfu, mfu_source="as given")
    result: dict[str, Any] = {"run_name": config.run_name, **describe(config)}
    if args.sweep:
        rows = sweep(config, [args.gpu] if args.gpu else list(GPUS), given)
        result |= {"mfu": given.mfu, "mfu_source": given.mfu_source, "sweep": rows}
        texts = [_sweep_text(rows, given)]
    elif args.gpu:
        result |= plan_gpus(config, args.gpu, args.gpus, given)
        texts = [_memory_text(config, result), _cost_text(result)]
    else:
        result |= plan_here(config)
        texts = [_memory_text(config, result), "for time and money: --gpu NAME --gpus N, or --sweep for all GPUs"]
    say("\n\n".join([_run_text(config, result), *texts]))
    print(json.dumps(result))
    return EXIT_DONE


def _parse() -> tuple[argparse.Namespace, Config]:
    """Our own options, and what the rest of the command line makes of the preset. Raises UserError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu", metavar="NAME")
    parser.add_argument("--gpus", metavar="N", type=int, default=1)
    parser.add_argument("--price-per-gpu-hour", metavar="DOLLARS", type=float)
    parser.add_argument("--mfu", metavar="SHARE", type=float)
    parser.add_argument("--watts", metavar="W", type=float, nargs="?", const=0.0)
    parser.add_argument("--sweep", action="store_true")
    args, sys.argv[1:] = parser.parse_known_args()
    config = config_from_command_line(
        "Say what a run will take. Options besides the overrides: --gpu NAME and --gpus N, what to train on "
        f"({', '.join(GPUS)}); --price-per-gpu-hour DOLLARS; --mfu SHARE, of the GPU's peak, instead of "
        f"{REFERENCE_MFU}, the reference's; --watts [W], for the energy, by default with the board power; --sweep, a "
        "table of GPUs and numbers of them. Exit codes: 0 done, 2 it cannot work.",
        prog="python -m src.model_utils.planner",
    )
    for name, value, is_right, remedy in (
        ("gpus", args.gpus, args.gpus >= 1, "give the number of GPUs, at least 1"),
        ("price-per-gpu-hour", args.price_per_gpu_hour, _is_positive(args.price_per_gpu_hour), "give dollars"),
        ("mfu", args.mfu, args.mfu is None or 0 < args.mfu <= 1, "give a share of the peak, above 0 and at most 1"),
        ("watts", args.watts, not args.watts or _is_positive(args.watts), "give what a GPU draws, or no number"),
    ):
        if not is_right:
            raise UserError(f"--{name} {value} makes no sense; {remedy}")
        if value != parser.get_default(name.replace("-", "_")) and not (args.gpu or args.sweep):
            raise UserError(f"--{name} {value} is about GPUs; name one with --gpu, or compare all with --sweep")
    if args.sweep and args.gpus != parser.get_default("gpus"):
        raise UserError(f"--gpus {args.gpus} is for one --gpu; --sweep tries several numbers of them")
    return args, config


def _is_positive(value: float | None) -> bool:
    return value is None or 0 < value < math.inf


def _run_text(config: Config, result: dict[str, Any]) -> str:
    disk = result["disk_bytes"]
    return (
        f"{config.run_name}: {result['parameters']:,} parameters, {result['parameters_without_embedding']:,} without "
        f"the embedding; {result['flops_per_token'] / 1e9:.3g} GFLOP to train on a token\n"
        f"{result['steps']:,} steps of {config.train.batch_tokens:,} tokens: {result['tokens']:,} in all, "
        f"{result['tokens_per_parameter']:.3g} a parameter, {result['total_flops']:.3g} FLOP\n"
        f"disk: {size_text(disk['data'])} of data if no token comes twice, {size_text(disk['checkpoints'])} of "
        f"checkpoints ({size_text(disk['one_checkpoint'])} each)"
    )


def _memory_text(config: Config, result: dict[str, Any]) -> str:
    where = result["gpu"]["name"] if "gpu" in result else f"this machine ({result['device']})"
    lines = [
        f"memory of a process on {where}, micro-batch {result['micro_batch_size']} x {config.model.n_ctx:,}, "
        f"{result['accumulation_steps']} accumulation step(s), matmuls in {result['matmuls_in']}:"
    ]
    lines += [f"  {name.replace('_', ' '):<16}{size_text(size):>9}" for name, size in result["memory_bytes"].items()]
    if "gpu" in result:
        fits = "fits" if result["fits"] else "does NOT fit: use --train.micro-batch-size auto, or the largest below"
        room = size_text(result["usable_memory_bytes"])
        lines.append(f"counted from the code, never measured on a GPU; up to {room} leaves room for the rest: {fits}")
        lines.append(f"largest micro-batch that fits: {result['largest_micro_batch_size']}")
    elif result["device"] == "cpu":
        lines.append("besides, Python with PyTorch, and while a checkpoint is saved a copy of weights and optimizer")
    if result["accumulation_steps"] == 1 and result.get("gpus", 1) == 1:
        lines.append("gradients come while activations go, so they are no more than what both need at the peak")
    return "\n".join(lines)


def _cost_text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['gpus']} x {result['gpu']['name']}, {result['gpu']['tflops']:g} TFLOP/s each "
        f"({result['gpu']['source']}), MFU {result['mfu']:g} ({result['mfu_source']}):",
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['hours']:,.2f} h of training steps; evaluations, "
        "compiling and checkpoints come on top",
    ]
    if result["dollars"] is not None:
        lines.append(f"${result['dollars']:,.2f} for these {result['gpus'] * result['hours']:,.1f} GPU-hours")
    if result["kwh"] is not None:
        lines.append(f"{result['kwh']:,.1f} kWh at most for the GPUs, the rest of the machine and cooling not counted")
    if result["gpus"] > 8:
        lines.append("more than one machine: the MFU of 8 GPUs in one is too high by what their network costs")
    return "\n".join(lines)


def _sweep_text(rows: list[dict[str, Any]], given: Assumptions) -> str:
    price = "" if given.price is None else f", ${given.price:g} a GPU-hour whatever the GPU"
    lines = [f"MFU {given.mfu:g} everywhere ({given.mfu_source}){price}; 16 GPUs are more than one machine"]
    columns = ["dollars"] * (given.price is not None) + ["kwh"] * (given.watts is not None)
    lines.append(
        f"{'GPU':<10}{'number':>7}{'micro-batch':>13}{'tokens/s':>13}{'hours':>10}"
        + "".join(f"{c:>12}" for c in columns)
    )
    for row in rows:
        head = f"{row['gpu']:<10}{row['gpus']:>7}"
        if not row["fits"]:
            lines.append(f"{head}  not even one sequence fits")
            continue
        batch = f"{row['micro_batch_size']} (x {row['accumulation_steps']})"
        numbers = f"{batch:>13}{row['tokens_per_second']:>13,.0f}{row['hours']:>10,.2f}"
        lines.append(head + numbers + "".join(f"{row[c]:>12,.1f}" for c in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
