"""Drill 18: a token id beyond the vocabulary in the last shard."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.conftest import Commands
from tests.drills.small_run import refusal, shard_paths


def test_shard_offset_and_id_are_named(commands: Commands, dataset: Callable[..., Path]):
    """The hash fits, as after a faulty preparation, so that nothing but the id gives it away."""
    data = dataset(train_tokens=[700, 900], val_tokens=500, n_vocab=300)
    last, manifest = shard_paths(data)[-1], data / "manifest.json"
    sound = hashlib.sha256(last.read_bytes()).hexdigest()
    tokens = np.load(last)
    tokens[850] = 300
    np.save(last, tokens)
    manifest.write_text(manifest.read_text().replace(sound, hashlib.sha256(last.read_bytes()).hexdigest()))
    message = refusal(commands, data)
    assert "1 of 3 shards" in message
    assert f"{last}: expected ids below 300, found 300 as token 850" in message
    assert not (commands.temp_data / "runs").exists()
