"""Drill 4: SIGSTOP one of two ranks."""

from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.pair import run_pair
from tests.drills.small_run import LONGER

FREEZE = """
import signal
at_step(6, 1, lambda run: (moment(), os.kill(os.getpid(), signal.SIGSTOP)))
"""


def test_the_other_gives_up_and_names_the_step(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    commands.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = (
        "3"  # until the stopped one, which hears nothing, is killed
    )
    frozen = run_pair(commands, tmp_path, FREEZE, data, *LONGER, "--train.timeout-s", "15")
    assert frozen.code == 1
    assert "(process 0): no process has moved on for 15 s in step 7" in frozen.stderr
    assert 15 < frozen.seconds < 60
    assert frozen.gone
