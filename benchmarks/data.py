"""Measure the speed and memory of preparing and loading data.

python -m benchmarks.data [--path FILES ...] [--megabytes 300] [--workers 1 2] [--repeats 5] [--n-ctx 2048 256]

The corpus is a JSON lines file in a temporary folder. Its documents consist of random paragraphs from the texts at
--path, or from Python's documentation, so no two are equal.

Two measurements take turns. One is tiktoken's `encode_ordinary` on one core, with the texts in memory. The other is the
whole command: process start, reading, tokenising, sorting, writing and fsync. Then the training data loader is measured
on the last dataset, see benchmarks/loader.py.

Memory comes from /proc, so this runs only on Linux. The machine should be idle otherwise.
"""

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import loader, print_figures
from src import available_cores
from src.data_processing.text_sources import PythonDocs, open_files
from src.model_configs.arguments import Parser
from src.utils import hardware
from src.utils.errors import exit_with
from src.utils.root import ROOT

_TIKTOKEN_ALONE = """
import itertools, json, sys, time
sys.path.insert(0, sys.argv[2])
from src.data_processing.tokenizer import load_tokenizer
encoding = load_tokenizer()._encoding
with open(sys.argv[1]) as file:
    texts = [json.loads(line)["text"] for line in itertools.islice(file, int(sys.argv[3]))]
start = time.perf_counter()
tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
print(tokens / (time.perf_counter() - start))
"""


def main() -> None:
    parser = Parser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--path", nargs="+", default=[], help="files of text (default: Python's documentation)")
    parser.add_argument("--megabytes", type=int, default=300, help="size of the corpus (default: 300)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--n-ctx", type=int, nargs="+", default=loader.N_CTX, help="context lengths of the loader (default: 2048 256)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = folder / "corpus.jsonl"
        documents = write_corpus(corpus, paragraphs(args.path), args.megabytes * 1_000_000)
        alone: list[float] = []
        prepared: dict[int, list[dict[str, float]]] = {workers: [] for workers in args.workers}
        for _ in range(args.repeats):  # take turns, so that noise on the machine affects all alike
            alone.append(tiktoken_alone(corpus, documents // 8))
            for workers, runs in prepared.items():
                shutil.rmtree(folder / "dataset", ignore_errors=True)
                runs.append(prepare(corpus, folder / "dataset", workers))
        figures = {
            "corpus_megabytes": args.megabytes,
            "tiktoken_tokens_per_second": statistics.median(alone),
            "prepare": [summary(runs, workers, statistics.median(alone)) for workers, runs in prepared.items()],
            "loader": [loader.loader_figures_in_a_process(folder / "dataset", n_ctx) for n_ctx in args.n_ctx],
            "machine": hardware.describe_machine(torch.device("cpu")),
        }
    print_figures(figures)


def paragraphs(paths: list[str]) -> list[str]:
    """Return the paragraphs of all documents at `paths`."""
    sources = open_files(paths, "text") if paths else [PythonDocs()]
    texts = (text for source in sources for unit in range(len(source.units)) for text in source.texts(unit))
    return [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]


def write_corpus(path: Path, pieces: list[str], size: int) -> int:
    """Write documents of about 5 kB up to `size` bytes of text, and return their number."""
    chooser = random.Random(0)
    documents = written = 0
    with open(path, "w") as file:
        while written < size:
            text = ""
            while len(text) < 5_000:
                text += chooser.choice(pieces) + "\n\n"
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            documents += 1
    return documents


def tiktoken_alone(corpus: Path, documents: int) -> float:
    """Return tokens per second of `encode_ordinary` on one core, for the first `documents` texts."""
    command = [sys.executable, "-c", _TIKTOKEN_ALONE, str(corpus), str(ROOT), str(documents)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def prepare(corpus: Path, out: Path, workers: int) -> dict[str, float]:
    """Run the command like a user, and return its speed, seconds, and the peak memory of all its processes."""
    command = [sys.executable, "-m", "src.data_processing.data_downloader", "--source", "files", "--path", str(corpus)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--out", str(out), "--workers", str(workers)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    memory = max(resident_mb(process.pid) for _ in until_ended(process))
    seconds = time.perf_counter() - start
    assert process.stdout is not None, "stdout is a pipe"
    tokens = json.loads(process.stdout.read())["tokens"]
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "peak_mb": memory}


def until_ended(process: subprocess.Popen[str]) -> Iterator[None]:
    while True:
        yield
        try:
            process.wait(0.1)
            return
        except subprocess.TimeoutExpired:
            continue


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process and its children; shared pages count once per process."""
    total = 0.0
    for path in [Path(f"/proc/{pid}"), *_children(pid)]:
        try:
            lines = (path / "status").read_text().splitlines()
        except OSError:
            continue  # the process has just ended
        total += sum(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS"))
    return total


def _children(pid: int) -> list[Path]:
    try:
        return [Path(f"/proc/{child}") for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def summary(runs: list[dict[str, float]], workers: int, alone: float) -> dict[str, float]:
    rate = statistics.median(run["tokens_per_second"] for run in runs)
    cores = min(workers, available_cores())
    return {
        "workers": workers,
        "tokens_per_second": rate,
        "of_tiktoken_alone_times_cores": rate / (alone * cores),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "peak_mb_of_all_processes": max(run["peak_mb"] for run in runs),
    }


if __name__ == "__main__":
    exit_with(main)
