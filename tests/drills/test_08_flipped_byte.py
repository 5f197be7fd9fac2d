"""Drill 8: one byte of the newest checkpoint is flipped, after its save or during it."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from src.model_utils.checkpoint_utils import damage
from tests.conftest import Commands
from tests.drills.small_run import LONGER, assert_same_run, flip_a_byte, refusal, start, start_with

# Between the rename of a checkpoint, the last of the run, and its being read back.
FLIP = """
import os
from pathlib import Path
from tests.drills.small_run import flip_a_byte

rename = os.rename

def rename_and_flip(source, target, **options):
    rename(source, target, **options)
    if Path(target).name == "step_0000012":
        flip_a_byte(Path(target) / "model.safetensors")

os.rename = rename_and_flip
"""


def test_the_one_before_is_used_unless_it_is_requested(commands: Commands, dataset: Callable[..., Path]):
    data, runs = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    assert start(commands, data, *LONGER).returncode == 0
    shutil.copytree(runs / "drill", runs / "sound")
    damaged = runs / "drill" / "checkpoints" / "step_0000012" / "optimizer.safetensors"
    sound = hashlib.sha256(damaged.read_bytes()).hexdigest()
    flip_a_byte(damaged)
    found = hashlib.sha256(damaged.read_bytes()).hexdigest()
    fault = f"{damaged.parent}: optimizer.safetensors has sha256 {found}, expected {sound}"

    assert f"Cannot use the checkpoint {fault}" in refusal(commands, data, *LONGER, "--resume", "12")

    result = start(commands, data, *LONGER)
    assert result.returncode == 0, result.stderr
    assert f"skipped a damaged checkpoint: {fault}" in result.stderr
    assert "from step_0000008 of 12 steps" in result.stderr
    assert_same_run(runs / "drill", runs / "sound", steps=12)
    assert damaged.parent.with_name("step_0000012.set-aside-1").is_dir()  # nothing is lost


def test_a_save_that_does_not_read_back_ends_the_run_and_the_one_before_is_used(
    commands: Commands, dataset: Callable[..., Path]
):
    data, runs = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    result = start_with(commands, FLIP, data, *LONGER)
    assert result.returncode == 4, result.stderr
    bad = runs / "drill" / "checkpoints" / "step_0000012"
    assert f"Cannot trust the checkpoint just saved: {bad}: model.safetensors has sha256 " in result.stderr
    assert "Traceback" not in result.stderr
    assert [damage(bad.with_name(name)) for name in ("step_0000004", "step_0000008")] == [None, None]
    again = start(commands, data, *LONGER)
    assert again.returncode == 0, again.stderr
    assert "from step_0000008 of 12 steps" in again.stderr
    assert start(commands, data, *LONGER, "--run-name", "whole").returncode == 0
    assert_same_run(runs / "drill", runs / "whole", steps=12)
