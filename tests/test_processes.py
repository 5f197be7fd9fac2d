"""Runs of several processes, started as a user starts them."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src.utils.root import ROOT
from tests.conftest import Commands

SETTINGS = [
    *("--model.n-vocab", "300", "--model.n-ctx", "16", "--model.n-embd", "16", "--model.n-head", "2"),
    *("--model.n-layer", "2", "--train.batch-tokens", "128", "--train.micro-batch-size", "2"),
    *("--train.device", "cpu", "--train.precision", "float32", "--train.log-every-steps", "1"),
    *("--train.compile", "off"),  # which auto would try for runs as long as some of these claim to be
    *("--eval.val-tokens", "160", "--eval.hellaswag-items", "0", "--eval.sample-prompts"),
]


@pytest.fixture
def data(dataset: Callable[..., Path]) -> str:
    return str(dataset(train_tokens=[700, 900], n_vocab=300))


def train(commands: Commands, data: str, run: str, *more: str, processes: int = 1) -> None:
    result = commands.pretrain("debug", "--run-name", run, "--data.dir", data, *more, *SETTINGS, processes=processes)
    assert result.returncode == 0, result.stderr


def losses(commands: Commands, run: str, kind: str = "train") -> list[float]:
    return [record["loss"] for record in commands.metrics(run, kind)]


def test_two_processes_train_as_one_does(commands: Commands, data: str):
    for run, processes in (("one", 1), ("two", 2)):
        train(commands, data, run, "--train.total-steps", "20", processes=processes)
    assert len(losses(commands, "one")) == 20
    assert losses(commands, "two") == pytest.approx(losses(commands, "one"), rel=1e-5)
    assert losses(commands, "two", "validation") == pytest.approx(losses(commands, "one", "validation"), rel=1e-5)
    tokens = [[r["tokens"] for r in commands.metrics(run, "validation")] for run in ("one", "two")]
    assert tokens[0] == tokens[1]
    derived = json.loads((commands.temp_data / "runs" / "two" / "config.json").read_text())["derived"]
    assert (derived["world_size"], derived["grad_accumulation_steps"]) == (2, 2)


KILLED_ONCE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pretrain
from src.utils.errors import exit_with

original = pretrain.train_step

def train_step(run, batches):
    if run.state.progress.step == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(run, batches)

pretrain.train_step = train_step
sys.argv = ["pretrain.py", *{arguments!r}]
exit_with(pretrain.main)
"""


def test_resume_never_sets_a_run_aside_once_in_a_launch(commands: Commands, data: str, tmp_path: Path):
    """Although the command says so at every start, the launcher's restart resumes."""
    settings = ["--train.total-steps", "20", "--checkpoint.every-steps", "5"]
    train(commands, data, "again", *settings)
    arguments = ["debug", "--run-name", "again", "--data.dir", data, *settings, *SETTINGS, "--resume", "never"]
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE.format(root=str(ROOT), arguments=arguments))
    commands.environment["LAUNCH_ID"] = "one"
    assert commands.run([sys.executable, str(script)]).returncode == -signal.SIGKILL
    result = commands.pretrain(*arguments)
    assert result.returncode == 0, result.stderr
    assert "resume: from step_00000" in result.stderr
    assert [path.name for path in (commands.temp_data / "runs").glob("again.*")] == ["again.set-aside-1"]
    assert len(losses(commands, "again")) == 20
