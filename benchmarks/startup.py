"""Measure the time to the end of the first training step: cold compile cache, warm cache, uncompiled.

python -m benchmarks.startup PRESET --data DATASET [--repeats 3]

Each start is a new process and a new run of two steps with minimal evaluation. A cold start has an empty cache folder.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import print_figures
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS
from src.utils import hardware
from src.utils.errors import exit_with
from src.utils.root import ROOT, dataset_dir

# Minimal work besides the steps: the smallest validation, one line per step.
SETTINGS = (
    *("--train.total-steps", "2", "--train.log-every-steps", "1"),
    *("--eval.val-tokens", "1", "--eval.hellaswag-items", "0", "--eval.samples-per-prompt", "1"),
    *("--eval.sample-tokens", "1", "--checkpoint.every-steps", "2"),
)


def main() -> None:
    parser = Parser(prog="python -m benchmarks.startup", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", default="pydocs", help="a dataset's name or folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batch-size", type=int)
    args = parser.parse_args()
    starts_s: dict[str, list[float]] = {"cold": [], "warm": [], "uncompiled": []}
    with tempfile.TemporaryDirectory() as folder:
        temp_data = Path(folder)
        for _ in range(args.repeats):
            shutil.rmtree(temp_data / "compile_cache", ignore_errors=True)
            starts_s["cold"].append(first_step_s(args, temp_data, "on"))
            starts_s["warm"].append(first_step_s(args, temp_data, "on"))
            starts_s["uncompiled"].append(first_step_s(args, temp_data, "off"))
    seconds = {name: round(statistics.median(values), 2) for name, values in starts_s.items()}
    result = {
        "preset": args.preset,
        "first_step_s": seconds,
        "warm_of_cold": round(seconds["warm"] / seconds["cold"], 3),
        "all_s": starts_s,
        "machine": hardware.describe_machine(hardware.choose_device("auto")),
    }
    print_figures(result)


def first_step_s(args: argparse.Namespace, temp_data: Path, compile_setting: str) -> float:
    """Return the seconds from the start of the process to the record of its first step."""
    name = f"start-{time.time_ns()}"
    command = [sys.executable, str(ROOT / "pretrain.py"), args.preset, "--run-name", name, *SETTINGS]
    command += ["--train.compile", compile_setting, "--data.dir", str(dataset_dir(args.data))]
    if args.micro_batch_size:
        command += ["--train.micro-batch-size", str(args.micro_batch_size)]
    environment = {**os.environ, "TEMP_DATA_DIR": str(temp_data)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    started = time.time()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"Cannot measure: {' '.join(command)} exited with {ended.returncode}.\n{ended.stderr}")
    run_dir = temp_data / "runs" / name
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    seconds = next(record["time"] for record in records if record["kind"] == "train") - started
    shutil.rmtree(run_dir)
    return seconds


if __name__ == "__main__":
    exit_with(main)
