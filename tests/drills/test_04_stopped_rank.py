"""Drill 4: SIGSTOP one of two ranks, in a step and at points before the first."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.pair import run_pair
from tests.drills.small_run import LONGER

# Seconds until the stopped one, which hears nothing, is killed.
IMPATIENT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
FREEZE = """
import signal
at_step(6, 1, lambda run: (moment(), os.kill(os.getpid(), signal.SIGSTOP)))
"""
# In place of the function {function}.
FREEZE_AT_THE_START = """
import signal
import torch
from src import run_setup
from src.utils import handle_ddp
def freeze(*_, **__):
    moment()
    os.kill(os.getpid(), signal.SIGSTOP)
handle_ddp.MEETING_SECONDS = 10
if os.environ["RANK"] == "1":
    {function} = freeze
"""


def test_the_other_gives_up_and_names_the_step(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    commands.environment |= IMPATIENT
    frozen = run_pair(commands, tmp_path, FREEZE, data, *LONGER, "--train.timeout-s", "15")
    assert frozen.code == 1
    assert "(process 0): no process has moved on for 15 s in step 7" in frozen.stderr
    assert 15 < frozen.seconds < 60
    assert frozen.gone


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("handle_ddp._meet", "error: after 10 s process 1 of 2 has not come: it is stuck or stopped"),
        ("pretrain.open_data", "error (process 0): no process has moved on for 10 s in opening the dataset"),
        ("run_setup.settle", "error (process 0): no process has moved on for 10 s in preparing model and optimizer"),
    ],
)
def test_the_other_gives_up_before_the_first_step(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path, function: str, message: str
) -> None:
    data, lines = dataset(train_tokens=[700, 900], n_vocab=300), FREEZE_AT_THE_START.format(function=function)
    commands.environment |= IMPATIENT
    frozen = run_pair(commands, tmp_path, lines, data, *LONGER, "--train.timeout-s", "10")
    assert frozen.code == 1
    assert message in frozen.stderr
    assert 9 < frozen.seconds < 60
    assert frozen.gone
