"""What tests share: small models, small datasets, and the optional material next to the repository."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data_processing import shards
from src.params import ModelConfig
from src.utils import root
from src.utils.errors import UserError
from src.utils.root import ROOT

SHARED = ROOT.parent / "shared"

# A shell's background jobs ignore Ctrl-C, and nohup's SIGHUP, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test meets the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """Reference numbers, HellaSwag and text, where they lie next to the repository; skips the test elsewhere."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the reference material in {SHARED}, which is not on this machine")
    return SHARED / "data"


@pytest.fixture
def tiny_config() -> ModelConfig:
    return ModelConfig(n_vocab=97, n_ctx=16, n_embd=24, n_head=3, n_layer=2, residual_dropout=0.0, ffn_dropout=0.0)


@pytest.fixture
def one_thread():
    """Sums in one order, for comparisons to the bit or nearly so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_dataset(folder: Path, train_tokens: list[int], val_tokens: int, n_vocab: int, seed: int = 0) -> Path:
    """A dataset of random ids in documents of about 50 tokens, written with the project's own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    listed = []
    for index, tokens in enumerate([val_tokens, *train_tokens]):
        ids = rng.integers(0, n_vocab - 1, tokens).astype(np.uint16)
        ids[::50] = n_vocab - 1
        name, sha256 = shards.write_shard(folder, "random", index, tokens, [ids])
        split = "validation" if index == 0 else "train"
        listed.append(shards.Shard(name, split, tokens, len(ids[::50]), tokens * 4, sha256, "0" * 32, "f" * 32))
    shards.write_manifest(folder, manifest_of(listed, n_vocab))
    return folder


def manifest_of(listed: list[shards.Shard], n_vocab: int = 50_257) -> shards.Manifest:
    """A manifest that lists these shards, of documents of 32 to 63 tokens."""
    totals = {name: sum(getattr(shard, name) for shard in listed) for name in ("documents", "tokens", "text_bytes")}
    left_out = {"skipped_empty": 0, "dropped_duplicates": 0, "replaced_invalid": 0}
    return shards.Manifest(
        sources=[{"name": "random", **totals, "share": 1.0}],
        request={"source": ["random"]},
        tokenizer="r50k_base",
        tokenizer_sha256="0" * 64,
        n_vocab=n_vocab,
        end_of_text=n_vocab - 1,
        seed=0,
        counts={**totals, "documents_read": totals["documents"], **left_out},
        document_lengths=[0] * 5 + [totals["documents"]],
        shards=tuple(listed),
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """Makes a random dataset: dataset(train_tokens=[...], val_tokens=..., n_vocab=...)."""

    def make(train_tokens: list[int], val_tokens: int = 2_000, n_vocab: int = 50_257, name: str = "random") -> Path:
        return write_dataset(tmp_path / "datasets" / name, train_tokens, val_tokens, n_vocab)

    return make


class Commands:
    """Runs the project's real commands as processes, with data and runs under a folder of the test's own."""

    def __init__(self, temp_data: Path) -> None:
        self.temp_data = temp_data
        self.environment = {
            **os.environ,
            "TEMP_DATA_DIR": str(temp_data),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there: no test needs the hub
            "OMP_NUM_THREADS": "1",
        }

    def pretrain(self, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return self.run([*launcher, str(ROOT / "pretrain.py"), *arguments])

    def module(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run([sys.executable, "-m", name, *arguments])

    def run(self, command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=240, check=False
        )

    def metrics(self, run: str, kind: str) -> list[dict]:
        lines = (self.temp_data / "runs" / run / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """refused(module, *arguments): what the command says as it ends with 2, in this process: others take seconds."""
    monkeypatch.setattr(root, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(root, "DATASETS", tmp_path / "datasets")

    def ask(module: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        with pytest.raises(UserError) as raised:
            importlib.import_module(module).main()
        assert raised.value.exit_code == 2
        return str(raised.value)

    return ask
