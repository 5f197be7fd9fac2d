"""Drill 12: a run on two processes, then one, then two."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.pair import fork_pair
from tests.drills.small_run import start, start_with

STEPS = ("--train.total-steps", "12", "--checkpoint.every-steps", "4")

# Notes what each process trains on, and stops the run after some steps.
NOTED = """
import json, os
from src.data_processing.training_data_loader import TrainingDataLoader
from src.utils.logger import RunLogger
original_next, metric = TrainingDataLoader.__next__, RunLogger.metric

def noting(self):
    inputs, targets = original_next(self)
    with open({notes!r} + os.environ.get("RANK", "0"), "a") as file:
        for row in inputs.tolist():
            file.write(json.dumps(row) + chr(10))
    return inputs, targets

def stopping(self, *line, **values):
    metric(self, *line, **values)
    if line == ("train", {last}):
        (self.run_dir / "STOP").touch()

TrainingDataLoader.__next__, RunLogger.metric = noting, stopping
"""


def steps_of(folder: Path, name: str, processes: int) -> list[list[str]]:
    """The sequences of each step, 8 of them in their order: rank after rank, each as the process noted them."""
    files = [(folder / f"{name}_{rank}").read_text().splitlines() for rank in range(processes)]
    share = 8 // processes
    return [[row for rows in files for row in rows[i : i + share]] for i in range(0, len(files[0]), share)]


def test_the_same_samples_in_the_same_order(commands: Commands, dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    parts = []
    for name, processes, last in (("first", 2, 4), ("second", 1, 8), ("third", 2, -1)):
        lines = NOTED.format(notes=str(tmp_path / f"{name}_"), last=last)
        if processes == 2:
            code = fork_pair(commands, tmp_path, lines, data, *STEPS).code
        else:
            code = start_with(commands, lines, data, *STEPS).returncode
        assert code == (0 if name == "third" else 143)
        parts += steps_of(tmp_path, name, processes)
    lines = NOTED.format(notes=str(tmp_path / "whole_"), last=-1)
    assert start_with(commands, lines, data, *STEPS, "--run-name", "whole").returncode == 0
    assert parts == steps_of(tmp_path, "whole", 1)
    assert len(parts) == 12
    changed, whole = ([r["loss"] for r in commands.metrics(run, "train")] for run in ("drill", "whole"))
    assert changed == pytest.approx(whole, rel=1e-5)
    details = [record["detail"] for record in commands.metrics("drill", "event") if record["name"] == "resume"]
    assert all("the same samples, but not the same bits" in detail for detail in details)


def test_a_batch_that_cannot_be_shared(commands: Commands, dataset: Callable[..., Path], tmp_path: Path) -> None:
    """Refused by a run that was begun on one process, which is left as it was."""
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    assert start(commands, data).returncode == 0
    config = commands.temp_data / "runs" / "drill" / "config.json"
    before = config.read_bytes()
    refused = fork_pair(commands, tmp_path, "", data, "--train.micro-batch-size", "8")
    assert refused.code == 2
    assert refused.stderr.count("micro_batch_size can be 1, 2 or 4") == 1
    assert config.read_bytes() == before
    assert json.loads(before)["derived"]["world_size"] == 1
