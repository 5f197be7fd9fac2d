"""Drill 4: SIGSTOP one of two ranks, in a step and before the first."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.pair import run_pair
from tests.drills.small_run import LONGER

FREEZE = """
import signal
at_step(6, 1, lambda run: (moment(), os.kill(os.getpid(), signal.SIGSTOP)))
"""
FREEZE_AT_THE_START = """
import signal
def freeze(*_, **__):
    moment()
    os.kill(os.getpid(), signal.SIGSTOP)
if os.environ["RANK"] == "1":
    pretrain.open_data = freeze
"""


@pytest.mark.parametrize(
    ("lines", "activity"), [(FREEZE, "step 7"), (FREEZE_AT_THE_START, "the start")], ids=["step", "start"]
)
def test_the_time_out_ends_the_run_and_names_the_step(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path, lines: str, activity: str
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    frozen = run_pair(commands, tmp_path, lines, data, *LONGER, "--train.timeout-s", "8")
    assert frozen.code == 1
    assert f"error: Cannot finish {activity}: another process ended or hangs" in frozen.stderr
    assert 7 < frozen.seconds < 60  # torchrun kills the stopped one 30 s later
    assert frozen.gone
