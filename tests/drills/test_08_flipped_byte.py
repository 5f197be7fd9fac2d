"""Drill 8: one byte of the newest checkpoint is flipped."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import LONGER, assert_same_run, flip_a_byte, refusal, start


def test_the_one_before_is_used_unless_it_is_asked_for(commands: Commands, dataset: Callable[..., Path]):
    data, runs = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    assert start(commands, data, *LONGER).returncode == 0
    shutil.copytree(runs / "drill", runs / "sound")
    damaged = runs / "drill" / "checkpoints" / "step_0000012" / "optimizer.safetensors"
    sound = hashlib.sha256(damaged.read_bytes()).hexdigest()
    flip_a_byte(damaged)
    found = hashlib.sha256(damaged.read_bytes()).hexdigest()
    fault = f"{damaged.parent}: optimizer.safetensors has sha256 {found}, expected {sound}"

    assert f"cannot use the checkpoint {fault}" in refusal(commands, data, *LONGER, "--resume", "12")

    result = start(commands, data, *LONGER)
    assert result.returncode == 0, result.stderr
    assert f"passed over a damaged checkpoint: {fault}" in result.stderr
    assert "from step_0000008 of 12 steps" in result.stderr
    assert_same_run(runs / "drill", runs / "sound", steps=12)
    assert damaged.parent.with_name("step_0000012.set-aside-1").is_dir()  # nothing is lost
