"""Drill 14: a loss that is not a number on one of two ranks."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Commands
from tests.drills.bad_numbers import BAD_LOSS, WATCHED, assert_given_up, changed_steps
from tests.drills.pair import fork_pair
from tests.drills.small_run import LONGER, PUBLISHED, module, shard_paths


@pytest.mark.parametrize("recipe", [PUBLISHED, ()], ids=["adamw", "muon"])
def test_both_skip_the_step_and_its_samples_are_recorded(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path, recipe: tuple[str, ...]
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    ended = fork_pair(commands, tmp_path, BAD_LOSS.format(first=5, last=5) + WATCHED, data, *LONGER, *recipe)
    assert ended.code == 0, ended.stderr
    assert changed_steps(tmp_path) == [[step for step in range(12) if step != 5]] * 2
    (event,) = [record for record in commands.metrics("drill", "event") if record["name"] == "skipped step"]
    assert event["step"] == 6
    assert "not finite: loss nan" in event["detail"]
    assert event["n_ctx"] == 16
    # the spoiled micro-batch is among the eight sequences of the step
    shards = [np.load(path) for path in shard_paths(data)]
    recorded = [shards[shard][window * 16 : window * 16 + 16].tolist() for shard, window in event["windows"]]
    assert len(recorded) == 8
    assert all(window in recorded for window in json.loads((tmp_path / "spoiled").read_text()))
    options = shlex.split(event["detail"].partition("data_downloader ")[2].partition(" shows")[0])
    shown = module(commands, "src.data_processing.data_downloader", *options)
    assert shown.returncode == 0, shown.stderr
    assert '"places": 4' in shown.stdout


def test_too_many_in_a_row_end_the_run_with_what_was_good(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    assert_given_up(commands, tmp_path, BAD_LOSS.format(first=5, last=1000) + WATCHED, data)
