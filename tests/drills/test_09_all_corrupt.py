"""Drill 9: no checkpoint of a run can be used, each for a reason of its own."""

from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import LONGER, flip_a_byte, refusal, start


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
    assert "restore one from a copy, or use --resume never" in message

    anew = start(commands, data, *every_step, "--resume", "never")
    assert anew.returncode == 0, anew.stderr
    assert (commands.temp_data / "runs/drill.set-aside-1/checkpoints" / flipped.name).is_dir()
