"""Drill 22: the place of the run cannot be written to, by anybody."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.small_run import SAYING_WHEN_THE_MODEL_IS_BUILT, mounts, start_with


@pytest.mark.parametrize("place", ["runs", "runs/drill"])  # before the first start, and of a run to resume
def test_it_is_said_before_the_model_is_built(commands: Commands, dataset: Callable[..., Path], place: str):
    data, folder = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / place
    folder.mkdir(parents=True)
    with mounts(f"mount --bind {folder} {folder}; mount -o remount,ro,bind {folder}") as disk:
        result = start_with(commands, SAYING_WHEN_THE_MODEL_IS_BUILT, data, on=disk)
        assert result.returncode == 4, result.stderr
        run = commands.temp_data / "runs" / "drill"
        assert f"error: Cannot write in {run}: Read-only file system. " in result.stderr
        assert "Traceback" not in result.stderr
        assert "the model is built" not in result.stdout
        assert [path for path in folder.rglob("*") if path.name != ".drill.lock"] == []

    result = start_with(commands, SAYING_WHEN_THE_MODEL_IS_BUILT, data)
    assert result.returncode == 0, result.stderr
    assert "the model is built" in result.stdout
