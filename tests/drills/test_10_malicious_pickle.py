"""Drill 10: a pickle that would run a command, in every place where a checkpoint is read."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.utils.disk import fingerprint
from tests.conftest import Commands
from tests.drills.small_run import contents, start

COMMANDS = ("src.model_assessment.sampling", "src.model_assessment.hellaswag")


class Attack:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that an attack makes; it does so where it is unpickled."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Attack(path)))
    path.unlink()
    return path


@pytest.fixture
def data(commands: Commands, dataset: Callable[..., Path]) -> Path:
    """And a run on it, with checkpoints of steps 2 and 4."""
    folder = dataset(train_tokens=[700, 900], n_vocab=300)
    assert start(commands, folder).returncode == 0
    return folder


def vouch(checkpoint: Path) -> None:
    """Makes the manifest agree with the files."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {name: fingerprint(checkpoint / name) for name in manifest["files"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def assert_rejected(code: int, message: str, canary: Path) -> None:
    assert code == 2, message
    assert "Traceback" not in message
    assert message.count(": error: ") == 1
    assert not canary.exists()


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_under_a_name_that_the_manifest_vouches_for(commands: Commands, data: Path, canary: Path, part: str):
    checkpoints = commands.temp_data / "runs" / "drill" / "checkpoints"
    newest = checkpoints / "step_0000004"
    torch.save({"w": Attack(canary)}, newest / part)
    vouch(newest)
    before = contents(checkpoints)
    result = start(commands, data)
    assert_rejected(result.returncode, result.stderr, canary)
    assert f"{newest / part}" in result.stderr
    assert contents(checkpoints) == before


@pytest.mark.parametrize("module", COMMANDS)
def test_the_other_commands(commands: Commands, data: Path, canary: Path, module: str):
    newest = commands.temp_data / "runs" / "drill" / "checkpoints" / "step_0000004"
    vouched = commands.temp_data / "step_0000005"
    shutil.copytree(newest, vouched)
    (vouched / "model.safetensors").write_bytes(pickle.dumps(Attack(canary)))
    vouch(vouched)
    renamed = commands.temp_data / "model.safetensors"
    torch.save({"w": Attack(canary)}, renamed)
    for checkpoint in (vouched, renamed):
        result = commands.module(module, "--checkpoint", str(checkpoint))
        assert_rejected(result.returncode, result.stderr, canary)
        assert str(checkpoint) in result.stderr
