"""Drill 29: the disk of the run, or a part of it, is unmounted in mid-run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.small_run import AT_LINE, LONGER, contents, mounts, small_disk, start_with

# Before the first save: one that is under way would fail with a message of its own.
UNMOUNT = (
    AT_LINE
    + """
import subprocess
at_line("train", 2, lambda: subprocess.run(["umount", "-l", {path!r}], check=True))
"""
)


@pytest.mark.parametrize("disk", ["runs", "runs/drill", "runs/drill/checkpoints"])
def test_the_run_ends_and_nothing_is_written_below(commands: Commands, dataset: Callable[..., Path], disk: str) -> None:
    data, folder = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / disk
    folder.mkdir(parents=True, exist_ok=True)
    with mounts(small_disk(folder, kilobytes=20_000)) as mounted:
        result = start_with(commands, UNMOUNT.format(path=str(folder)), data, *LONGER, on=mounted)
    assert result.returncode == 4, result.stderr
    run = commands.temp_data / "runs" / "drill"
    assert f"Cannot write in {run}: the folder of the start was moved, removed or unmounted" in result.stderr
    assert result.stderr.count("Cannot ") == 1
    assert "Traceback" not in result.stderr
    assert contents(folder) == {}
