"""Drill 3: SIGKILL one of two ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.pair import run_pair
from tests.drills.small_run import LONGER, assert_same_run

KILL = """
import signal
at_step(6, {rank}, lambda run: (moment(), os.kill(os.getpid(), signal.SIGKILL)))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_both_are_gone_soon_and_the_run_goes_on(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path, rank: int
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    killed = run_pair(commands, tmp_path, KILL.format(rank=rank), data, *LONGER)
    assert killed.code not in (0, 2, 3, 4, 5, 143)
    assert killed.seconds < 15
    assert killed.gone
    assert f"process {rank} was killed by SIGKILL" in killed.stderr
    assert run_pair(commands, tmp_path, "", data, *LONGER).code == 0
    assert run_pair(commands, tmp_path, "", data, *LONGER, "--run-name", "whole").code == 0
    runs = commands.temp_data / "runs"
    assert_same_run(runs / "whole", runs / "drill", steps=12)
