"""Drill 5: an unexpected exception on rank 1."""

from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.pair import fork_pair
from tests.drills.small_run import LONGER

FAIL = """
def fail(run):
    moment()
    raise ZeroDivisionError("of the drill")
at_step(6, 1, fail)
"""


def test_its_traceback_comes_first_and_is_the_only_one(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    failed = fork_pair(commands, tmp_path, FAIL, data, *LONGER)
    assert failed.code == 1
    assert failed.seconds < 15
    assert failed.gone
    assert failed.stderr.count("Traceback") == 1
    before, after = failed.stderr.split("ZeroDivisionError: of the drill\n")
    assert "in fail" in before.split("Traceback")[1]
    assert "another process ended" not in before
    assert "error: Cannot finish step 7: another process ended or hangs" in after
