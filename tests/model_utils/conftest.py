"""A small run and its export, made once for all tests, which leave them unchanged."""

from pathlib import Path
from typing import Any

import pytest

from src.model_utils.hf_export import export
from tests.model_utils.exports import make_run, small_model

RECORDS: list[dict[str, Any]] = [
    {"kind": "train", "step": 30, "loss": 5.0, "tokens_seen": 7_680},
    {"kind": "validation", "step": 20, "loss": 6.5, "perplexity": 665.1, "bits_per_byte": 2.9, "tokens": 512},
    {"kind": "validation", "step": 40, "loss": 5.4321, "perplexity": 228.6, "bits_per_byte": 2.4567, "tokens": 512},
    {"kind": "hellaswag", "step": 40, "acc_norm": 0.2875, "total": 80, "stderr": 0.05, "protocol": "some-protocol (x)"},
    {"kind": "validation", "step": 50, "loss": 4.9876, "perplexity": 146.6, "bits_per_byte": 2.2, "tokens": 512},
]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", small_model(), RECORDS)


@pytest.fixture(scope="session")
def tiny_export(tiny_run: Path) -> Path:
    export(tiny_run, tiny_run.parent / "hf", "hf", "float32")
    return tiny_run.parent / "hf"
