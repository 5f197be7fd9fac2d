"""Drill 9: no checkpoint of a run can be used, each for another reason, or none is left."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import LONGER, arguments, flip_a_byte, module, refusal, start


def test_nothing_starts_from_scratch_in_silence(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    every_step = (*LONGER, "--train.total-steps", "5", "--checkpoint.every-steps", "1", "--checkpoint.keep-last", "5")
    assert start(commands, data, *every_step).returncode == 0
    flipped, cut, lost, unlisted, emptied = sorted((commands.temp_data / "runs/drill/checkpoints").iterdir())
    flip_a_byte(flipped / "model.safetensors")
    size = (cut / "optimizer.safetensors").stat().st_size
    (cut / "optimizer.safetensors").write_bytes((cut / "optimizer.safetensors").read_bytes()[:-1])
    (lost / "rank_00000.safetensors").unlink()
    (unlisted / "manifest.json").unlink()
    (emptied / "manifest.json").write_bytes(b"")

    message = refusal(commands, data, *every_step)
    for reason in (
        f"{flipped}: model.safetensors has sha256 ",
        f"{cut}: optimizer.safetensors has {size - 1} bytes, expected {size}",
        f"{lost}: rank_00000.safetensors: No such file or directory",
        f"{unlisted}: manifest.json: No such file or directory",
        f"{emptied}: manifest.json is damaged",
    ):
        assert f"\n  - {reason}" in message
    assert "Restore one from a copy, or use --resume never" in message

    restarted = start(commands, data, *every_step, "--resume", "never")
    assert restarted.returncode == 0, restarted.stderr
    assert (commands.temp_data / "runs/drill.set-aside-1/checkpoints" / flipped.name).is_dir()


def test_lost_checkpoints_do_not_start_a_new_run(commands: Commands, dataset: Callable[..., Path]):
    """Neither for training nor for the preflight: their disk is not mounted, or someone made room."""
    data, run_dir = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs" / "drill"
    assert start(commands, data).returncode == 0
    checkpoints, elsewhere = run_dir / "checkpoints", commands.temp_data / "unmounted"

    def refused(found: str) -> None:
        for message in (
            refusal(commands, data),
            module(commands, "src.preflight", *arguments(data)).stderr,
        ):
            assert found in message
            assert "Restore the checkpoints from a copy, mount their disk, or use --resume nev" in message

    shutil.rmtree(checkpoints)
    refused(f"{checkpoints} holds no checkpoint, but metrics.jsonl says that the run saved one at step 4. Nothing was")
    checkpoints.symlink_to(elsewhere)
    refused(f"{checkpoints} is a link to {elsewhere}, which does not exist. Nothing was changed")
    checkpoints.unlink()
    log = (run_dir / "metrics.jsonl").rename(commands.temp_data / "metrics.jsonl")
    refused(f"{checkpoints} holds no checkpoint, but status.json says that the run is done. Nothing was changed")
    log.rename(run_dir / "metrics.jsonl")
    message = module(commands, "src.preflight", *arguments(data, "--resume", "never")).stderr
    assert "none; an existing run is set aside" in message
    assert start(commands, data, "--resume", "never").returncode == 0
    assert len(commands.metrics("drill.set-aside-1", "train")) == len(commands.metrics("drill", "train")) == 4
