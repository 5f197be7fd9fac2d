"""Drill 16: a shard a byte short, empty, or with trailing bytes."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.pair import fork_pair
from tests.drills.small_run import refusal, shard_paths


@pytest.fixture
def data(dataset: Callable[..., Path]) -> Path:
    """The validation shard has two bytes too many, the first training shard is a byte short, the last one empty."""
    folder = dataset(train_tokens=[700, 900], val_tokens=500, n_vocab=300)
    for path, change in zip(shard_paths(folder), (2, -1, None), strict=True):
        os.truncate(path, 0 if change is None else path.stat().st_size + change)
    return folder


def test_every_one_is_named_before_anything_is_trained(commands: Commands, data: Path):
    message = refusal(commands, data)
    too_long, too_short, empty = shard_paths(data)  # of 500, 700 and 900 tokens after a header of 128 bytes
    assert f"{too_long}: expected 1128 bytes, found 1130: the array is followed by bytes" in message
    assert f"{too_short}: expected 1528 bytes, found 1527: the array is cut short" in message
    assert f"{empty}: expected a .npy file of 900 uint16 tokens, found an empty file" in message
    assert "--repair --out" in message
    assert not (commands.temp_data / "runs").exists()


def test_two_processes_end_together_and_say_it_once(commands: Commands, data: Path, tmp_path: Path):
    ended = fork_pair(commands, tmp_path, "", data)
    assert ended.code == 2
    assert ended.stderr.count("3 of 3 shards") == 1
    assert not (commands.temp_data / "runs").exists()
