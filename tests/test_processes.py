"""Runs of several processes, started as a user starts them."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.small_run import PUBLISHED, arguments, start, start_with


@pytest.fixture
def data(dataset: Callable[..., Path]) -> Path:
    return dataset(train_tokens=[700, 900], n_vocab=300)


def losses(commands: Commands, run: str, kind: str = "train") -> list[float]:
    return [record["loss"] for record in commands.metrics(run, kind)]


@pytest.mark.parametrize("recipe", [PUBLISHED, ()], ids=["adamw", "muon"])
def test_two_processes_train_as_one_does(commands: Commands, data: Path, recipe: tuple[str, ...]):
    for run, processes in (("one", 1), ("two", 2)):
        more = ("--train.total-steps", "20", "--run-name", run, *recipe)
        result = commands.pretrain(*arguments(data, *more), processes=processes)
        assert result.returncode == 0, result.stderr
    assert len(losses(commands, "one")) == 20
    assert losses(commands, "two") == pytest.approx(losses(commands, "one"), rel=1e-5)
    assert losses(commands, "two", "validation") == pytest.approx(losses(commands, "one", "validation"), rel=1e-5)
    tokens = [[r["tokens"] for r in commands.metrics(run, "validation")] for run in ("one", "two")]
    assert tokens[0] == tokens[1]
    derived = json.loads((commands.temp_data / "runs" / "two" / "config.json").read_text())["derived"]
    assert (derived["world_size"], derived["grad_accumulation_steps"]) == (2, 2)


KILL = """
import os, signal
import pretrain

original = pretrain.train_step

def train_step(run, batches):
    if run.state.progress.step == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(run, batches)

pretrain.train_step = train_step
"""


def test_resume_never_sets_a_run_aside_once_in_a_launch(commands: Commands, data: Path):
    """Although the command says so at every start, the launcher's restart resumes."""
    settings = ("--train.total-steps", "20", "--checkpoint.every-steps", "5")
    assert start(commands, data, *settings).returncode == 0
    commands.environment["LAUNCH_ID"] = "one"
    killed = start_with(commands, KILL, data, *settings, "--resume", "never")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = start(commands, data, *settings, "--resume", "never")
    assert resumed.returncode == 0, resumed.stderr
    assert "resume: from step_00000" in resumed.stderr
    assert [path.name for path in (commands.temp_data / "runs").glob("drill.*")] == ["drill.set-aside-1"]
    assert len(losses(commands, "drill")) == 20
