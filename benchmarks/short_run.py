"""Measure a short run of a preset, eager and compiled: speed, MFU, memory, losses. Prints one JSON object.

python -m benchmarks.short_run lf_llm_269m --data DIR [--steps 30 --log-every 10 --micro-batch-size 16]

The first line of each run includes compilation and does not count in the medians. The losses of both runs show that
they do the same work. The runs stay under temp_data/runs/bench-*.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Literal

import torch

import pretrain
from src.model_configs.my_llm_config import PRESETS
from src.params import CheckpointConfig
from src.utils import hardware
from src.utils.errors import exit_with


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.short_run", description=__doc__)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", required=True, help="a dataset's name or folder")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--micro-batch-size", type=int)
    args = parser.parse_args()
    results = {"off": measure(args, "off"), "on": measure(args, "on")}
    device = hardware.choose_device("auto")
    print(json.dumps({**vars(args), "compile": results, "machine": hardware.describe_machine(device)}))


def measure(args: argparse.Namespace, compile_setting: Literal["on", "off"]) -> dict[str, object]:
    """Return the medians over the training lines of one run, without the first."""
    preset = PRESETS[args.preset]()
    train = replace(
        preset.train,
        total_steps=args.steps,
        log_every_steps=args.log_every,
        micro_batch_size=args.micro_batch_size or preset.train.micro_batch_size,
        compile=compile_setting,
    )
    config = replace(
        preset,
        run_name=f"bench-{args.preset}-{compile_setting}-{time.time_ns()}",
        train=train,
        data=replace(preset.data, dir=args.data),
        eval=replace(preset.eval, hellaswag_items=0, sample_prompts=()),
        checkpoint=CheckpointConfig(every_steps=args.steps),
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    outcome = pretrain.train(config)
    records = map(json.loads, (outcome.run_dir / "metrics.jsonl").read_text().splitlines())
    lines = [record for record in records if record["kind"] == "train"]
    later = lines[1:] or lines
    medians = {key: statistics.median(line[key] for line in later) for key in ("tokens_per_second", "step_ms")}
    return {**medians, "mfu": later[-1]["mfu"], "memory_gb": later[-1]["memory_gb"], "loss": [x["loss"] for x in lines]}


if __name__ == "__main__":
    exit_with(main)
