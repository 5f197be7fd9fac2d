"""Measure the training data loader on 10B tokens: memory, first batch, resume, speed, reads.

python -m benchmarks.loader [--data DIR] [--n-ctx 2048 256] [--seconds 3]

Without --data it reads a sparse dataset of 10B tokens in a temporary folder, which measures the program, not a disk.
Memory and reads come from /proc, so this runs only on Linux. Each n_ctx is measured in a separate process.
"""

import itertools
import multiprocessing
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from benchmarks import print_figures
from src.data_processing import shards
from src.data_processing.shards import read_manifest
from src.data_processing.training_data_loader import TrainingDataLoader, WindowDataset
from src.model_configs.arguments import Parser
from src.utils import hardware
from src.utils.errors import exit_with

N_CTX = (2048, 256)
BATCH_TOKENS = 524_288  # per step of lf_llm_269m
LATE_STEP = 1_000_000
N_VOCAB = 50_257


def main() -> None:
    parser = Parser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of a dataset (default: a sparse one of 10B tokens)")
    parser.add_argument("--n-ctx", type=int, nargs="+", default=N_CTX)
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of the measurement for each n_ctx")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = args.data
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "sparse"
            make_sparse_dataset(folder)
        figures = [loader_figures_in_a_process(folder, n_ctx, args.seconds) for n_ctx in args.n_ctx]
    print_figures({"loader": figures, "machine": hardware.describe_machine(torch.device("cpu"))})


def make_sparse_dataset(folder: Path, n_shards: int = 100, tokens_per_shard: int = 100_000_000) -> shards.Manifest:
    """Write the dataset and return its manifest, which is correct except for the hashes.

    The file system must support sparse files. The first shard is the validation split.
    """
    folder.mkdir(parents=True)
    listed = []
    for index in range(n_shards):
        file = f"sparse_i_{index:06d}_t_{tokens_per_shard}.npy"
        with open(folder / file, "wb") as shard:
            header = {"descr": shards.TOKEN_DTYPE.str, "fortran_order": False, "shape": (tokens_per_shard,)}
            np.lib.format.write_array_header_1_0(shard, header)
            os.truncate(shard.fileno(), shard.tell() + tokens_per_shard * shards.TOKEN_DTYPE.itemsize)
        split = "train" if index else "validation"
        listed.append(shards.Shard(file, split, tokens_per_shard, 1, tokens_per_shard, "0" * 64, "0" * 32, "f" * 32))
    totals = {name: sum(getattr(shard, name) for shard in listed) for name in ("documents", "tokens", "text_bytes")}
    manifest = shards.Manifest(
        sources=[{"name": "sparse", **totals, "share": 1.0}],
        request={"source": ["sparse"]},
        tokenizer="r50k_base",
        tokenizer_sha256="0" * 64,
        n_vocab=N_VOCAB,
        end_of_text=N_VOCAB - 1,
        seed=0,
        counts=totals,
        document_lengths=[],
        shards=tuple(listed),
    )
    shards.write_manifest(folder, manifest)
    return shards.read_manifest(folder)


def loader_figures_in_a_process(folder: Path, n_ctx: int, seconds: float = 3.0) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(loader_figures, (folder, n_ctx, seconds))


def loader_figures(
    folder: Path, n_ctx: int, seconds: float = 3.0, micro_batch_tokens: int = 32_768
) -> dict[str, float]:
    """Measure a loader of a single process. Call it in a new process.

    Memory is the maximum of the resident memory in MB, minus the memory after imports.
    """
    resident = [_resident_mb()]
    started = time.perf_counter()
    manifest = read_manifest(folder)
    micro_batch_size = micro_batch_tokens // n_ctx
    dataset = WindowDataset(folder, manifest.train, n_ctx, manifest.n_vocab, at_least=micro_batch_size)

    def open_at(step: int) -> TrainingDataLoader:
        return TrainingDataLoader(
            dataset,
            seed=42,
            batch_size=BATCH_TOKENS // n_ctx,
            micro_batch_size=micro_batch_size,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            first_step=step,
        )

    next(open_at(0))
    first_batch_seconds = time.perf_counter() - started
    started = time.perf_counter()
    next(open_at(LATE_STEP))
    resume_seconds = time.perf_counter() - started

    reads_before, delivered, started = _counters("/proc/self/io"), 0, time.perf_counter()
    loader = open_at(0)
    while (elapsed := time.perf_counter() - started) < seconds:
        for inputs, _ in itertools.islice(loader, 500):
            delivered += inputs.numel()
        resident.append(_resident_mb())
    reads = {name: count - reads_before[name] for name, count in _counters("/proc/self/io").items()}
    return {
        "dataset_tokens": sum(shard.tokens for shard in manifest.train),
        "n_ctx": n_ctx,
        "first_batch_seconds": first_batch_seconds,
        f"resume_at_{LATE_STEP}_seconds": resume_seconds,
        "tokens_per_second": delivered / elapsed,
        "bytes_read_per_token": reads["rchar"] / delivered,
        "mean_read_kb": reads["rchar"] / reads["syscr"] / 1e3,
        **{f"{name}_mb_above_imports": max(x[name] for x in resident) - resident[0][name] for name in resident[0]},
    }


def _resident_mb() -> dict[str, float]:
    status = _counters("/proc/self/status")
    return {name: status[name] * 1024 / 1e6 for name in ("VmRSS", "RssAnon", "RssFile")}


def _counters(path: str) -> dict[str, int]:
    """Return the lines `name: number` of a file in /proc."""
    pairs = (line.split()[:2] for line in Path(path).read_text().splitlines() if len(line.split()) > 1)
    return {name.rstrip(":"): int(value) for name, value in pairs if value.isdecimal()}


if __name__ == "__main__":
    exit_with(main)
