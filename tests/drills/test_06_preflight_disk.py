"""Drill 6, its second half: a disk that clearly won't do is refused at the start, before anything is written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.small_run import mounts, small_disk, start_with
from tests.test_processes import SETTINGS


def in_a_small_disk(commands: Commands, size: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs `command` with a tmpfs of `size` in place of its runs folder, in a namespace of the user's own."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this machine gives users no namespaces of their own")
    small = commands.temp_data / "runs"
    small.mkdir(exist_ok=True)
    script = (
        'mount -t tmpfs -o "size=$0" tmpfs "$1" && folder=$1 && shift && "$@"; code=$?; ls -A "$folder" >&2; exit $code'
    )
    return commands.run(["unshare", "-rm", "sh", "-c", script, size, str(small), *command])


@pytest.mark.parametrize(("size", "code"), [("300k", 4), ("2m", 0)])
def test_the_preflight(commands: Commands, dataset: Callable[..., Path], size: str, code: int):
    """A checkpoint of this run takes some 160 kB, and it will hold three at once."""
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    arguments = ("--data.dir", str(data), "--run-name", "drill", *SETTINGS)
    command = [sys.executable, "-m", "src.preflight", "debug", *arguments]
    result = in_a_small_disk(commands, size, command)
    assert result.returncode == code, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["exit_code"] == code
    assert summary["failed"] == (["disk"] if code else [])
    if code:
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("FAIL")]
        assert "for checkpoints needed, only 307.2 kB free at" in line
        assert "make room, set TEMP_DATA_DIR to another disk" in line
        assert result.stderr.endswith("not started, because 1 check(s) failed: disk\n")  # and the disk is empty


def test_the_start_of_training(commands: Commands, dataset: Callable[..., Path]):
    data, folder = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    folder.mkdir()
    with mounts(small_disk(folder, 300)) as disk:
        refused = start_with(commands, "", data, under=disk.under)
        assert refused.returncode == 4, refused.stderr
        assert "Cannot hold the run's checkpoints on the disk of " in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (disk.path(folder) / "drill" / "checkpoints").exists()
    with mounts(small_disk(folder, 2_000)) as disk:
        assert start_with(commands, "", data, under=disk.under).returncode == 0
