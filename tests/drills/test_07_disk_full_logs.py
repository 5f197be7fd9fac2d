"""Drill 7: no room for the logs alone, from the start or for a while in the middle of a run; or for the console."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.small_run import AT_LINE, LONGER, mounts, small_disk, start, start_with

# Files grow by pages of 4 kB, which take some 17 lines of metrics.jsonl.
MANY_STEPS = (*LONGER, "--train.total-steps", "90", "--checkpoint.every-steps", "45")
WARNING = "Training continues."

FULL_FOR_A_WHILE = (
    AT_LINE
    + """
import os
from contextlib import suppress

def fill():
    with open({path!r}, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))

at_line("train", 5, fill)
at_line("train", 61, lambda: os.remove({path!r}))
"""
)
FULL = FULL_FOR_A_WHILE.replace('"train", 5', '"validation", 0').replace('"train", 61', '"nothing", 0')


@pytest.fixture
def data(dataset: Callable[..., Path]) -> Path:
    return dataset(train_tokens=[700, 900], n_vocab=300)


@pytest.fixture
def whole(commands: Commands, data: Path) -> bytes:
    """The final weights of an undisturbed run."""
    assert start(commands, data, *MANY_STEPS, "--run-name", "whole").returncode == 0
    return final_model(commands, "whole")


def final_model(commands: Commands, run: str) -> bytes:
    return (commands.temp_data / "runs" / run / "checkpoints" / "step_0000090" / "model.safetensors").read_bytes()


def logged_steps(commands: Commands, data: Path, run: str, lines: str) -> list[int]:
    """The steps in the log of a run whose folder, but not its checkpoints, is a disk of 128 kB."""
    folder = commands.temp_data / "runs" / run
    for path in (folder, commands.temp_data / run):
        path.mkdir(parents=True)
    script = [small_disk(folder, kilobytes=128), f"mkdir {folder}/checkpoints"]
    script += [f"mount --bind {commands.temp_data / run} {folder}/checkpoints"]
    with mounts("\n".join(script)) as disk:
        lines = lines.format(path=str(folder / "filler"))
        result = start_with(commands, lines, data, *MANY_STEPS, "--run-name", run, on=disk)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count(WARNING) == 1
        text = disk.path(folder / "log.txt").read_text()
        assert all(
            line.startswith(("20", "on 1 x", "precision: ", "micro-batch: ", "compile: ")) for line in text.splitlines()
        )
        assert json.loads(disk.path(folder / "status.json").read_text())["state"] == "done"
        records = map(json.loads, disk.path(folder / "metrics.jsonl").read_text().splitlines())
        return [record["step"] for record in records if record["kind"] == "train"]


def test_no_room_for_a_while_and_then_none(commands: Commands, data: Path, whole: bytes):
    steps = logged_steps(commands, data, "for_a_while", FULL_FOR_A_WHILE)
    assert steps[:4] == [1, 2, 3, 4]
    assert steps[-30:] == list(range(61, 91))
    assert 34 < len(steps) < 90
    assert logged_steps(commands, data, "full", FULL) == []
    for run in ("for_a_while", "full"):
        assert (commands.temp_data / run / "step_0000090" / "model.safetensors").read_bytes() == whole


def test_a_console_that_takes_nothing(commands: Commands, data: Path, whole: bytes):
    """As where stderr goes to a file on the full disk."""
    lines = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
    assert start_with(commands, lines, data, *MANY_STEPS).returncode == 0
    assert final_model(commands, "drill") == whole
    log = (commands.temp_data / "runs" / "drill" / "log.txt").read_text()
    assert "all 90 steps are done" in log


def test_an_error_that_cannot_be_told_keeps_its_exit_code(commands: Commands):
    failing = "from src.utils.errors import *\ndef main():\n    raise StorageError('no room')\nexit_with(main)"
    with open("/dev/full", "w") as full:  # a real end of Python, which flushes its streams
        code = subprocess.run([sys.executable, "-c", failing], cwd=ROOT, stderr=full, check=False).returncode
    assert code == 4
