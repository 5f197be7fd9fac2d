"""Drill 32: standard streams that are closed or full, or that take few characters."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.small_run import arguments


def shell(commands: Commands, command: list[str], streams: str, **variables: str) -> int:
    """The exit code of a command whose streams the shell redirects."""
    line = ["sh", "-c", f'"$@" {streams}', "sh", *command]
    return subprocess.run(line, env=commands.environment | variables, cwd=ROOT, check=False, timeout=200).returncode


@pytest.mark.parametrize(
    ("streams", "variables"),
    [
        ("<&- >&- 2>&-", {}),
        (">/dev/full 2>/dev/full", {"PYTHONUNBUFFERED": "1"}),
        (">/dev/null 2>/dev/null", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
    ],
)
def test_training_is_the_same(
    commands: Commands, dataset: Callable[..., Path], streams: str, variables: dict[str, str]
) -> None:
    data, name = dataset(train_tokens=[700, 900], n_vocab=300), "rün"
    command = [sys.executable, "pretrain.py", *arguments(data, "--run-name", name)]
    assert shell(commands, command, streams, **variables) == 0
    run = commands.temp_data / "runs" / name
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]
    assert "all 4 steps are done" in (run / "log.txt").read_text()


def test_a_refusal_keeps_its_exit_code(commands: Commands) -> None:
    for streams in ("2>&-", "2>/dev/full", "<&- >&-"):
        code = shell(commands, [sys.executable, "pretrain.py", "debug", "--train.seed", "-1"], streams)
        assert code == 2, streams


def test_the_launcher_too(commands: Commands, dataset: Callable[..., Path]) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    command = [str(ROOT / "run_pre_training_e2e.sh"), *arguments(data)[1:], "--dry-run"]
    variables = {"PYTHON": sys.executable, "PRESET": "debug"}
    for streams in ("<&- >&- 2>&-", ">/dev/full 2>/dev/full"):
        assert shell(commands, command, streams, **variables) == 0, streams


def test_a_reader_that_leaves_costs_nothing(commands: Commands) -> None:
    """As `... | head -1` does."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "src.model_utils.planner", "laptop"]
    code = subprocess.run(command, env=commands.environment, cwd=ROOT, stdout=write, check=False).returncode
    os.close(write)
    assert code == 0
