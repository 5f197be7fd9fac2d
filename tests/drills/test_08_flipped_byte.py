"""Drill 8: one byte of the newest checkpoint is flipped."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.small_run import LONGER, assert_same_run, flip_a_byte, refusal, start


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_the_one_before_is_used_unless_it_is_asked_for(commands: Commands, dataset: Callable[..., Path], name: str):
    data, runs = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    for run in ("whole", "drill"):
        assert start(commands, data, *LONGER, "--run-name", run).returncode == 0
    damaged = runs / "drill" / "checkpoints" / "step_0000012" / name
    sound = hashlib.sha256(damaged.read_bytes()).hexdigest()
    flip_a_byte(damaged)
    fault = f"{name} has sha256 {hashlib.sha256(damaged.read_bytes()).hexdigest()}, expected {sound}"

    message = refusal(commands, data, *LONGER, "--resume", "12")
    assert f"cannot use the checkpoint {damaged.parent}: {fault}" in message

    result = start(commands, data, *LONGER)
    assert result.returncode == 0, result.stderr
    assert f"passed over a damaged checkpoint: {damaged.parent}: {fault}" in result.stderr
    assert "from step_0000008 of 12 steps" in result.stderr
    assert_same_run(runs / "drill", runs / "whole", steps=12)
    assert (damaged.parent.with_name("step_0000012.set-aside-1") / name).is_file()  # nothing is lost
