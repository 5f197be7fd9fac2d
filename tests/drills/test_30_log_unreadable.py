"""Drill 30: the log of a run cannot be read, or not rewritten, at a resume; a lock that cannot hold a name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import start, start_with

# Fails the call of a function of `os` with an error number, if the log is among its arguments.
FAILING = """
import os
call = os.{name}
def failing(*arguments, **keywords):
    if any(str(argument).endswith({file!r}) for argument in arguments):
        raise OSError({number}, os.strerror({number}))
    return call(*arguments, **keywords)
os.{name} = failing
"""
ERRORS = [
    ("open", "metrics.jsonl", 13),
    ("open", "metrics.jsonl", 5),
    ("replace", "metrics.jsonl", 28),
    ("replace", "metrics.jsonl", 5),
]


def test_the_start_is_refused_and_no_step_is_logged_twice(commands: Commands, dataset: Callable[..., Path]) -> None:
    data, run = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs" / "drill"
    assert start(commands, data).returncode == 0
    shutil.rmtree(run / "checkpoints" / "step_0000004")  # the next start resumes from step 2
    log = run / "metrics.jsonl"
    with open(log, "a") as file:
        file.write('{"kind": "train", "st')
    before = log.read_bytes()
    for name, file_name, number in ERRORS:
        result = start_with(commands, FAILING.format(name=name, file=file_name, number=number), data)
        assert result.returncode == 4, result.stderr
        assert f"{log}: " in result.stderr
        assert "Traceback" not in result.stderr
        assert log.read_bytes() == before
    log.rename(run / "kept")
    log.mkdir()
    result = start(commands, data)
    assert result.returncode == 4, result.stderr
    assert f"Cannot open {log}: it is not a regular file" in result.stderr
    log.rmdir()
    (run / "kept").rename(log)
    assert start(commands, data).returncode == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]


def test_a_lock_without_a_name_still_locks(commands: Commands, dataset: Callable[..., Path]) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    lines = """
import os
def full(*_):
    raise OSError(28, "No space left on device")
os.pwrite = full
from src.utils import files
files.PATIENCE_S = 0.2
"""
    # A second start while the first one trains.
    inside = """
import subprocess, pretrain
step, ends = pretrain.train_step, []
def acting(run, batches):
    if run.state.progress.step == 2:
        from src.utils.errors import BusyError
        try:
            with files.claimed(run.log.run_dir):
                pass
        except BusyError as error:
            run.log.info(f"refused: {error}")
    return step(run, batches)
pretrain.train_step = acting
"""
    result = start_with(commands, lines + inside, data)
    assert result.returncode == 0, result.stderr
    assert "refused: Cannot use this run name" in result.stderr
    assert "holder unknown" in result.stderr
