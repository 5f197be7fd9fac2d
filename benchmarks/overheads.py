"""Measure the share of a run's time that is not training: each part separately, then the sum for a recipe.

python -m benchmarks.overheads PRESET --data DATASET [--hellaswag FILE --items 64 --processes 8]

The parts are measured on this machine, in the preset's precision:

- the forward and backward pass of a micro-batch,
- validation per token and HellaSwag per item,
- the preset's samples,
- the time that training waits for a checkpoint,
- a log line.

The sum follows the recipe. Processes share validation and HellaSwag. One process writes samples, checkpoints and log
lines while the others wait. The optimizer does not count as training, so the shares are slightly too high.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import print_figures
from src.data_processing.shards import read_manifest
from src.data_processing.tokenizer import load_tokenizer
from src.data_processing.training_data_loader import WindowDataset
from src.model import LLM
from src.model_assessment import hellaswag, validation
from src.model_assessment.hellaswag_items import load_items
from src.model_assessment.sampling import SamplingConfig, sample
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.adamw_opt import build_optimizers
from src.model_utils.autotune import CompiledForward
from src.model_utils.checkpoint_saver import CheckpointSaver
from src.model_utils.training_state import Progress, TrainingState
from src.model_utils.weight_init import init_weights
from src.params import Config
from src.utils import hardware
from src.utils.errors import exit_with
from src.utils.handle_ddp import Processes
from src.utils.logger import RunLogger
from src.utils.root import dataset_dir


def main() -> None:
    parser = Parser(
        prog="python -m benchmarks.overheads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", default="pydocs", help="a dataset's name or folder")
    parser.add_argument("--hellaswag", default="held-out", help="a HellaSwag file, or held-out")
    parser.add_argument("--items", type=int, default=64, help="number of items to time")
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--compile", action="store_true", help="compile the training and validation passes")
    parser.add_argument("--processes", type=int, default=8, help="processes of the recipe")
    args = parser.parse_args()
    preset = PRESETS[args.preset]()
    micro_batch_size = args.micro_batch_size or preset.micro_batch_size
    config = replace(preset, train=replace(preset.train, micro_batch_size=micro_batch_size))
    device = hardware.choose_device("auto")
    precision = hardware.choose_precision(config.train.precision, device)
    with hardware.autocast(device, precision):
        unit = measure(args, config, device)
    print_figures(add_up(args, config, unit) | {"machine": hardware.describe_machine(device)})


def measure(args: argparse.Namespace, config: Config, device: torch.device) -> dict[str, float]:
    """Return the seconds of each part on one device."""
    folder = dataset_dir(args.data)
    held_out = read_manifest(folder).validation
    model = LLM(config.model)
    init_weights(model, config.model, config.train.seed)
    model.to(device).eval()
    B, T = config.micro_batch_size, config.model.n_ctx
    forward = CompiledForward(model) if args.compile else model
    tokenizer = load_tokenizer()
    windows = WindowDataset(folder, held_out, T, config.model.n_vocab, B)
    inputs_BT, targets_BT = torch.randint(config.model.n_vocab, (2, B, T), device=device)

    def train() -> None:
        model.train()
        forward(inputs_BT, targets_BT).backward()
        model.zero_grad()
        model.eval()

    n_windows = B * max(1, min(4, windows.n_windows // B))
    validate = partial(validation.validate, model, windows, n_windows=n_windows, batch_size=B, bytes_per_token=4.5)
    shard = folder / held_out[0].file
    if args.hellaswag == "held-out":
        items = hellaswag.choose_items("held-out", args.items, shard, tokenizer)[1]
    else:  # spaced evenly, because lengths differ between parts of the file
        all_items = load_items(Path(args.hellaswag))
        items = all_items[:: max(1, len(all_items) // args.items)]
    score = partial(hellaswag.evaluate, model, items, tokenizer.encode, protocol="timed")
    settings = config.eval
    chosen = SamplingConfig(max_new_tokens=settings.sample_tokens, top_k=50, seed=0)
    draw = partial(sample, model, tokenizer, settings.sample_prompts, chosen, num_samples=settings.samples_per_prompt)
    with tempfile.TemporaryDirectory() as temporary:
        log = RunLogger(Path(temporary), is_main=True)
        line = partial(log.metric, "train", 1, **dict.fromkeys("abcdefgh", 0.123456789))
        return {
            "train_token": seconds_of(train, device) / (B * T),
            "validation_token": seconds_of(validate, device) / (n_windows * T),
            "hellaswag_item": seconds_of(score, device, 2) / len(items),
            "samples": seconds_of(draw, device, 2) if settings.sample_prompts else 0.0,
            "checkpoint_wait": checkpoint_wait_s(config, model, device, Path(temporary)),
            "log_line": seconds_of(line, device, 50),
        }


def checkpoint_wait_s(config: Config, model: LLM, device: torch.device, folder: Path) -> float:
    """Return the loop's wait for the start of a save: the copy of all tensors to memory."""
    optimizers = build_optimizers(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    state = TrainingState(model, optimizers, Progress())
    procs = Processes(rank=0, local_rank=0, world_size=1, device=device)
    parts = state.parts(procs)
    saver, waits = CheckpointSaver(folder, config.checkpoint), []
    for number in range(3):
        state.progress.step = number
        plain = state.plain(config, "", torch.float32, 1)
        started = time.perf_counter()
        saver.start(number, parts, plain)
        waits.append(time.perf_counter() - started)
        saver.wait()
    saver.close()
    return statistics.median(waits[1:])


def seconds_of(action: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Return the median seconds without the first call, including work queued on a GPU."""
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def add_up(args: argparse.Namespace, config: Config, unit: dict[str, float]) -> dict[str, object]:
    """Return the recipe's wall time on `--processes` devices like this one, and the share of each part."""
    steps, settings = config.total_steps, config.eval

    def times(every: int) -> int:
        return -(-steps // every) + 1  # before the first step, at each multiple, and after the last

    seconds = {
        "training": steps * config.train.batch_tokens * unit["train_token"] / args.processes,
        "validation": times(settings.val_every_steps) * settings.val_tokens * unit["validation_token"] / args.processes,
        "hellaswag": times(settings.hellaswag_every_steps)
        * settings.hellaswag_items
        * unit["hellaswag_item"]
        / args.processes,
        "samples": times(settings.sample_every_steps) * unit["samples"],
        "checkpoints": times(config.checkpoint.every_steps) * unit["checkpoint_wait"],
        "log lines": times(config.train.log_every_steps) * unit["log_line"],
    }
    whole = sum(seconds.values())
    return {
        "preset": args.preset,
        "processes": args.processes,
        "unit_s": unit,
        "validation_token_of_training_token": round(unit["validation_token"] / unit["train_token"], 3),
        "hours": round(whole / 3600, 2),
        "share": {name: round(value / whole, 5) for name, value in seconds.items()},
        "other_than_training": round(1 - seconds["training"] / whole, 4),
    }


if __name__ == "__main__":
    exit_with(main)
