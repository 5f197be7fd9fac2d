"""Drill 10: a pickle that runs a command, in every place where a checkpoint is read."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from src.utils.files import fingerprint
from tests.conftest import Commands
from tests.drills.small_run import AT_LINE, contents, module, start, start_with

SIX_STEPS = ("--train.total-steps", "6")


class Attack:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that an attack makes when it is unpickled."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Attack(path)))
    path.unlink()
    return path


@pytest.fixture
def data(commands: Commands, dataset: Callable[..., Path]) -> Path:
    """A dataset, and a run of 6 steps on it, stopped with checkpoints of steps 2 and 4."""
    folder = dataset(train_tokens=[700, 900], n_vocab=300)
    stop = f"at_line('train', 4, lambda: open({str(commands.temp_data / 'runs' / 'drill' / 'STOP')!r}, 'w').close())"
    assert start_with(commands, AT_LINE + stop, folder, *SIX_STEPS).returncode == 143
    return folder


def vouch_for(checkpoint: Path) -> None:
    """Makes the manifest agree with the files."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {name: fingerprint(checkpoint / name) for name in manifest["files"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def assert_rejected(result: CompletedProcess[str], canary: Path) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count(": error: ") == 1
    assert not canary.exists()


def test_files_that_the_manifest_vouches_for(commands: Commands, data: Path, canary: Path):
    checkpoints = commands.temp_data / "runs" / "drill" / "checkpoints"
    newest, sound = checkpoints / "step_0000004", commands.temp_data / "sound"
    shutil.copytree(newest, sound)
    for part in ("model.safetensors", "optimizer.safetensors", "rank_00000.safetensors"):
        torch.save({"w": Attack(canary)}, newest / part)
        vouch_for(newest)
        before = contents(checkpoints)
        result = start(commands, data, *SIX_STEPS)
        assert_rejected(result, canary)
        assert str(newest / part) in result.stderr
        assert contents(checkpoints) == before
        shutil.copytree(sound, newest, dirs_exist_ok=True)
    torch.save({"w": Attack(canary)}, newest / "state.json")
    vouch_for(newest)
    result = start(commands, data, *SIX_STEPS)
    assert result.returncode == 0, result.stderr
    assert f"skipped a damaged checkpoint: {newest}" in result.stderr  # the older one is used
    assert not canary.exists()


def test_checkpoints_given_to_other_commands(commands: Commands, data: Path, canary: Path):
    vouched, renamed = commands.temp_data / "step_0000005", commands.temp_data / "model.safetensors"
    bare = commands.temp_data / "model.pt"
    torch.save({"w": Attack(canary)}, bare)
    shutil.copytree(commands.temp_data / "runs" / "drill" / "checkpoints" / "step_0000004", vouched)
    (vouched / "model.safetensors").write_bytes(pickle.dumps(Attack(canary)))
    vouch_for(vouched)
    torch.save({"w": Attack(canary)}, renamed)
    for name in ("src.model_assessment.sampling", "src.model_assessment.hellaswag"):
        for checkpoint in (vouched, renamed, bare):
            result = module(commands, name, "--checkpoint", str(checkpoint))
            assert_rejected(result, canary)
            assert str(checkpoint) in result.stderr
    result = module(commands, "src.model_utils.reference_import", "--checkpoint", str(renamed), "--run-name", "new")
    assert_rejected(result, canary)
    assert "nothing of it was run" in result.stderr
    assert not (commands.temp_data / "runs" / "new").exists()
