"""Drill 20: stray files among the shards, then a shard that is missing."""

from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import refusal, shard_paths, start


def test_a_stray_file_is_ignored_and_a_missing_shard_is_not(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=[700, 900], val_tokens=500, n_vocab=300)
    missing = shard_paths(data)[1]
    (data / "random_i_000003_t_800.npy").write_bytes(b"looks like a shard by its name")
    result = start(commands, data)
    assert result.returncode == 0, result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warning == (
        f"warning: ignoring 1 file(s) in {data} that its manifest does not list: random_i_000003_t_800.npy"
    )

    missing.unlink()
    message = refusal(commands, data, "--resume", "2")
    assert f"{missing} is missing: expected a shard of 700 tokens" in message
    assert "1 of 3 shards" in message
