"""Drill 17: a shard of another dtype, or one that is not .npy."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.conftest import Commands
from tests.drills.small_run import refusal, shard_paths


def test_what_was_found_is_named(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=[700, 800, 900], val_tokens=500, n_vocab=300)
    wide, swapped, pickled, text = shard_paths(data)
    np.save(wide, np.load(wide).astype(np.int32))
    np.save(swapped, np.load(swapped).astype(">u2"))
    np.save(pickled, np.array([{"a": 1}] * 800, dtype=object), allow_pickle=True)
    text.write_text("Once upon a time")
    message = refusal(commands, data)
    assert re.search(f"{wide}: expected dtype uint16 .* found int32 ", message)
    assert re.search(f"{swapped}: expected dtype uint16 .* found >u2 ", message)
    assert re.search(f"{pickled}: expected dtype uint16 .* found object ", message)
    assert f"{text}: expected a .npy file of 900 uint16 tokens, found 16 bytes that are not" in message
    assert not (commands.temp_data / "runs").exists()
