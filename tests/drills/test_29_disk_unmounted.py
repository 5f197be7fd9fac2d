"""Drill 29: the disk of the run, or a part of it, is unmounted in mid-run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.small_run import AT_LINE, LONGER, contents, mounts, small_disk, start_with

UNMOUNT = (
    AT_LINE
    + """
import subprocess
at_line("train", {step}, lambda: subprocess.run(["umount", "-l", {path!r}], check=True))
"""
)


@pytest.mark.parametrize(
    ("disk", "step"),
    # Before the first save, and where one may be under way, which fails with another message.
    [("runs", 2), ("runs/drill", 2), ("runs/drill/checkpoints", 2), ("runs/drill", 6), ("runs/drill/checkpoints", 6)],
)
def test_the_run_ends_and_nothing_is_written_below(
    commands: Commands, dataset: Callable[..., Path], disk: str, step: int
) -> None:
    data, folder = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / disk
    folder.mkdir(parents=True, exist_ok=True)
    with mounts(small_disk(folder, kilobytes=20_000)) as mounted:
        result = start_with(commands, UNMOUNT.format(path=str(folder), step=step), data, *LONGER, on=mounted)
    assert result.returncode == 4, result.stderr
    run = commands.temp_data / "runs" / "drill"
    if step == 2:
        assert f"Cannot write in {run}: the folder was moved, removed or unmounted during the run" in result.stderr
    assert result.stderr.count("Cannot ") == 1
    assert "Traceback" not in result.stderr
    assert contents(folder) == {}
