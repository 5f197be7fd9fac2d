"""Drill 19: a shard's content changes, its name and size do not, and neither does its modification time."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import refusal, shard_paths, start


def overwrite(path: Path, content: bytes) -> None:
    """In place, with the modification time restored."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_it_is_noticed_on_resume_and_on_start(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=[700, 900], val_tokens=500, n_vocab=300)
    path = shard_paths(data)[1]
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[-2] ^= 1
    expected = f"{path}: expected sha256 {hashlib.sha256(sound).hexdigest()}, found "
    found = hashlib.sha256(damaged).hexdigest()

    assert start(commands, data).returncode == 0
    overwrite(path, bytes(damaged))
    assert expected + found in refusal(commands, data, "--resume", "2")

    (data / ".verified.json").unlink()  # as if it had never been read
    assert expected + found in refusal(commands, data, "--run-name", "another")
