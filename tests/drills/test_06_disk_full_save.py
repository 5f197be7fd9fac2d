"""Drill 6: the disk fills up during a save, because another program takes the room."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from src.model_utils.checkpoint_utils import checkpoint_steps, damage
from tests.conftest import Commands
from tests.drills.small_run import (
    AT_LINE,
    LONGER,
    Mounts,
    assert_same_run,
    mounts,
    small_disk,
    start,
    start_with,
)

# Before step 7 is logged: a checkpoint takes some 130 kB.
FILL = (
    AT_LINE
    + """
import os, time
from contextlib import suppress

def fill():
    while not os.path.isdir({earlier!r}):  # it is saved during the next steps
        time.sleep(0.01)
    with open({path!r}, "wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - {left})

at_line("train", 7, fill)
"""
)


@pytest.mark.parametrize("left", [20_480, 122_880])  # the disk is full in the model, and in the optimizer
def test_the_run_ends_and_resumes_once_space_is_free(commands: Commands, dataset: Callable[..., Path], left: int):
    data, runs = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    runs.mkdir()
    with mounts(small_disk(runs, kilobytes=4_096)) as disk:
        other, earlier = runs / "another_program", runs / "drill" / "checkpoints" / "step_0000004"
        lines = FILL.format(path=str(other), earlier=str(earlier), left=left)
        full = start_with(commands, lines, data, *LONGER, on=disk)
        assert_stopped_and_whole(full.returncode, full.stderr, disk, runs)
        disk.path(other).unlink()
        again = start_with(commands, "", data, *LONGER, on=disk)
        assert again.returncode == 0, again.stderr
        shutil.copytree(disk.path(runs) / "drill", commands.temp_data / "drill")
    assert start(commands, data, *LONGER, "--run-name", "whole").returncode == 0
    assert_same_run(commands.temp_data / "drill", runs / "whole", steps=12)


def assert_stopped_and_whole(code: int, message: str, disk: Mounts, runs: Path) -> None:
    """Exit 4, and nothing but the checkpoint of before, which verifies."""
    assert code == 4, message
    assert "Traceback" not in message
    (numbers,) = re.findall(r"checkpoint of step 8 in .*It needs ([\d,]+) bytes, ([\d,]+) are free", message)
    needed, free = (int(number.replace(",", "")) for number in numbers)
    assert 2 * 4 * 13_000 < needed < 200_000  # each parameter and one or two moments in float32, and some more
    assert free < needed
    checkpoints = disk.path(runs) / "drill" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_0000004"]
    assert checkpoint_steps(checkpoints) == [4]
    assert damage(checkpoints / "step_0000004") is None
