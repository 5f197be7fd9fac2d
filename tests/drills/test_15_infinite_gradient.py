"""Drill 15: an infinite gradient of a finite loss on one of two ranks."""

from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.bad_numbers import BAD_GRADIENT, WATCHED, assert_given_up, changed_steps
from tests.drills.pair import fork_pair
from tests.drills.small_run import LONGER


def test_both_skip_the_step(commands: Commands, dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    ended = fork_pair(commands, tmp_path, WATCHED + BAD_GRADIENT.format(first=5, last=5), data, *LONGER)
    assert ended.code == 0, ended.stderr
    assert changed_steps(tmp_path) == [[step for step in range(12) if step != 5]] * 2
    (event,) = [record for record in commands.metrics("drill", "event") if record["name"] == "skipped step"]
    assert event["step"] == 6
    assert "gradient norm inf" in event["detail"] or "gradient norm nan" in event["detail"]
    assert len(event["windows"]) == 8  # whose gradient it was is not known


def test_too_many_in_a_row_end_the_run_with_what_was_good(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    assert_given_up(commands, tmp_path, WATCHED + BAD_GRADIENT.format(first=5, last=1000), data)
