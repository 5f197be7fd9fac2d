"""Drill 4: SIGSTOP one of two ranks, in a step and before the first."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills import pair
from tests.drills.pair import fork_pair, run_pair
from tests.drills.small_run import LONGER

IMPATIENT = """
import sys
from torch.distributed.elastic.multiprocessing import api
api.PContext.close.__defaults__ = (None, 3)  # the seconds before torchrun kills a process, instead of 30
from src.utils import torchrun
sys.exit(torchrun.main())
"""
FREEZE = """
import signal
at_step(6, 1, lambda run: (moment(), os.kill(os.getpid(), signal.SIGSTOP)))
"""
# Without SIGSTOP, since torchrun is not there to end it.
HANG_AT_THE_START = """
if os.environ["RANK"] == "1":
    pretrain.open_data = lambda *_, **__: (moment(), time.sleep(8), os._exit(1))
"""


def test_the_time_out_ends_the_run_and_names_the_step(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    monkeypatch.setattr(pair, "TORCHRUN", [sys.executable, "-c", IMPATIENT, *pair.TORCHRUN[3:]])
    frozen = run_pair(commands, tmp_path, FREEZE, data, *LONGER, "--train.timeout-s", "4")
    assert frozen.code == 1
    assert "error: Cannot finish step 7: another process ended or hangs" in frozen.stderr
    assert 3 < frozen.seconds < 60
    assert frozen.gone


def test_a_process_that_hangs_at_the_start(commands: Commands, dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    hanging = fork_pair(commands, tmp_path, HANG_AT_THE_START, data, *LONGER, "--train.timeout-s", "4")
    assert hanging.code == 1
    assert "error: Cannot finish the start: another process ended or hangs" in hanging.stderr
