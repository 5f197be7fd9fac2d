"""Measure the scaling of one and two processes, and predict that of eight GPUs.

python -m benchmarks.scaling {debug,laptop,lf_llm_269m} --data DATASET [--steps 8 --step-ms MS]

Measured are real runs of `pretrain.py` with one and with two processes, and the all-reduce of the model's gradients
between two processes. The runs have the same micro-batch, one thread per process and one micro-batch per step.

The prediction is for lf_llm_269m on 8 GPUs, from `--step-ms` of one GPU and the bandwidth of the link. Measure
`--step-ms` with `benchmarks.train_step`: a micro-batch with its share of the optimizer. The assumptions:

- Gradients are float32. A ring all-reduce moves 2 (n - 1) / n of their bytes through each link, once per step.
- "overlapped" hides it behind the last micro-batch's backward pass, two thirds of its time. "exposed" hides nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from benchmarks import print_figures
from src.model import LLM
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS, lf_llm_269m
from src.model_utils.debugging import count_parameters
from src.params import Config
from src.utils import hardware
from src.utils.errors import exit_with
from src.utils.root import ROOT, dataset_dir

# GB/s through one GPU's links in each direction, from the makers' data sheets. nvlink4: H100, H200; nvlink3: A100;
# pcie4: cards without NVLink. All-reduces of this size commonly reach the share LINK_EFFICIENCY of it.
LINKS = {"nvlink4": 450.0, "nvlink3": 300.0, "pcie4": 32.0}
LINK_EFFICIENCY = 0.75


def main() -> None:
    parser = Parser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", default="pydocs", help="a dataset's name or folder")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step-ms", type=float, help="milliseconds of one micro-batch of lf_llm_269m on one GPU")
    args = parser.parse_args()
    config = PRESETS[args.preset]()
    steps = {n: measured_step_ms(args, config, n) for n in (1, 2)}
    result: dict[str, Any] = {
        "preset": args.preset,
        "micro_batch": [config.micro_batch_size, config.model.n_ctx],
        "step_ms": steps,
        "all_reduce_ms": round(all_reduce_ms(parameters_of(config)), 1),
        "gradient_bytes": 4 * parameters_of(config),
        "efficiency_of_two": round(steps[1] / steps[2], 3),
        "predicted": {link: predicted(args.step_ms, rate) for link, rate in LINKS.items()} if args.step_ms else None,
        "machine": hardware.describe_machine(hardware.choose_device("auto")),
    }
    print_figures(result)


def measured_step_ms(args: argparse.Namespace, config: Config, processes: int) -> float:
    """Return the median step of a real run, without the first two steps."""
    tokens = processes * config.micro_batch_size * config.model.n_ctx
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "src.utils.torchrun", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(ROOT / "pretrain.py"), args.preset, "--run-name", "scaling", "--data.dir"]
        command += [str(dataset_dir(args.data)), "--train.total-steps", str(args.steps), "--train.log-every-steps", "1"]
        command += ["--train.batch-tokens", str(tokens), "--train.compile", "off", "--eval.val-tokens", "1"]
        command += ["--eval.hellaswag-items", "0", "--eval.samples-per-prompt", "1", "--eval.sample-tokens", "1"]
        environment = {**os.environ, "TEMP_DATA_DIR": folder, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"Cannot measure: {' '.join(command)} exited with {ended.returncode}.\n{ended.stderr}")
        lines = (Path(folder) / "runs" / "scaling" / "metrics.jsonl").read_text().splitlines()
    times = [record["step_ms"] for record in map(json.loads, lines) if record["kind"] == "train"]
    return round(statistics.median(times[2:]), 1)


def parameters_of(config: Config) -> int:
    with torch.device("meta"):
        return count_parameters(LLM(config.model))


def all_reduce_ms(numbers: int) -> float:
    """Return the median of seven gloo all-reduces of `numbers` float32 between two processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        torch.multiprocessing.spawn(_all_reduce, (f"{folder}/store", str(result), numbers), nprocs=2)
        return json.loads(result.read_text())


def _all_reduce(rank: int, store: str, result: str, numbers: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gradients, times = torch.randn(numbers), []
    for _ in range(8):
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.all_reduce(gradients)
        times.append((time.perf_counter() - started) * 1e3)
    if rank == 0:
        Path(result).write_text(json.dumps(statistics.median(times[1:])))
    torch.distributed.destroy_process_group()


def predicted(micro_batch_ms: float, link_gb_per_s: float, gpus: int = 8) -> dict[str, Any]:
    """Return the predicted tokens per second of lf_llm_269m on several GPUs."""
    config = lf_llm_269m()
    accumulation = config.grad_accumulation_steps(gpus)
    bytes_moved = 2 * (gpus - 1) / gpus * 4 * parameters_of(config)
    all_reduce = bytes_moved / (link_gb_per_s * 1e9 * LINK_EFFICIENCY) * 1e3
    hidden = min(all_reduce, micro_batch_ms * 2 / 3)
    work = accumulation * micro_batch_ms
    rates = {
        name: round(config.train.batch_tokens / (work + added) * 1e3)
        for name, added in (("overlapped", all_reduce - hidden), ("exposed", all_reduce))
    }
    return {
        "gpus": gpus,
        "micro_batch_ms": micro_batch_ms,
        "micro_batches_a_step": accumulation,
        "link_gb_per_s": link_gb_per_s,
        "link_efficiency": LINK_EFFICIENCY,
        "all_reduce_ms": round(all_reduce, 2),
        "tokens_per_second": rates,
    }


if __name__ == "__main__":
    exit_with(main)
