"""Drill 6, its second half: a disk that clearly won't do is refused at the start, before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import arguments, module, mounts, small_disk, start_with


def test_the_preflight_and_the_start_of_training(commands: Commands, dataset: Callable[..., Path]):
    """A checkpoint of this run takes some 100 kB, and it will hold three at once."""
    data, folder = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    folder.mkdir()
    with mounts(small_disk(folder, 280)) as disk:
        checked = module(commands, "src.preflight", *arguments(data), on=disk)
        assert checked.returncode == 4, checked.stderr
        assert json.loads(checked.stdout)["failed"] == ["disk"]
        (line,) = [line for line in checked.stderr.splitlines() if line.startswith("FAIL")]
        assert "for checkpoints needed, only 286.7 kB free at" in line
        assert "free some space, set TEMP_DATA_DIR to another disk" in line
        assert checked.stderr.endswith("not started: 1 check(s) failed: disk\n")
        refused = start_with(commands, "", data, on=disk)
        assert refused.returncode == 4, refused.stderr
        assert "Cannot hold the run's checkpoints on the disk of " in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (disk.path(folder) / "drill" / "checkpoints").exists()
