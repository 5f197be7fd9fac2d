"""Drill 1: a SIGKILL at every write, fsync, rename and removal of a checkpoint save."""

import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands


def test_a_kill_at_any_point_of_a_save_changes_nothing(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    result = commands.run([sys.executable, "-m", "tests.drills.checkpoint_sweep", str(data), str(tmp_path / "runs")])
    assert result.returncode == 0, result.stderr
    # Each of three saves writes 5 files in 2 halves, syncs them, the log and 2 folders, makes one and renames it. The
    # last takes the first away in 2 steps.
    assert int(result.stdout) == 3 * (5 * 2 + 5 + 1 + 2 + 1 + 1) + 2
