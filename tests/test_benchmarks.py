"""Benchmarks run and print their figures, and name a mistake; speed itself depends on the machine."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import lines
from tests.conftest import Commands
from tests.data_processing.documents import some_texts, write_json_lines


def test_figures_as_lines():
    figures = {"times_s": {"cold": 1.5, "all": [1.0, 2.25]}, "runs": [{"n": 1}, {"n": 123_456.78}], "machine": "x"}
    expected = ["times s:", "  cold: 1.5", "  all: 1, 2.25", "runs:", "  n: 1", "runs:", "  n: 123,457", "machine: x"]
    assert lines(figures) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_data_is_prepared_and_loaded(tmp_path: Path, commands: Commands):
    """The loader reads the dataset that was prepared, with about one token per 4 bytes of text."""
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(300))
    options = ["--megabytes", "2", "--workers", "1", "--repeats", "1", "--n-ctx", "256"]
    done = commands.module("benchmarks.data", "--path", str(path), *options)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert [run["workers"] for run in figures["prepare"]] == [1]
    (loader,) = figures["loader"]
    assert 300_000 < loader["dataset_tokens"] < 700_000
    assert loader["n_ctx"] == 256
    for name in ("tokens_per_second", "first_batch_seconds", "resume_at_1000000_seconds", "VmRSS_mb_above_imports"):
        assert loader[name] > 0, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmarks.data", "--path", "/nope"], "Cannot find --path /nope"),
        (["benchmarks.loader", "--data", "/nope"], "find a dataset at /nope"),
    ],
)
def test_a_mistake_is_named(commands: Commands, arguments: list[str], message: str):
    done = commands.module(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
