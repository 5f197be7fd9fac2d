"""Drill 26: a stop at an epoch's last batch skips nothing and repeats nothing."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.small_run import shard_paths
from tests.test_processes import SETTINGS

# 27 + 21 windows of 16 + 1 tokens: six batches of 8 an epoch
TRAIN_TOKENS = [27 * 16 + 1, 21 * 16 + 5]
EPOCH_STEPS, STEPS = 6, 12

# The real program, which writes down what it trains on and sends itself a real signal in one step.
RECORDING_RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pretrain
from src.utils.errors import exit_with

train_step = pretrain.train_step

def recording_step(run, batches):
    def recorded():
        for inputs, targets in batches:
            with open({record!r}, "ab") as file:
                file.write(inputs.numpy().tobytes())
            yield inputs, targets
    if run.state.progress.step + 1 == {stop_in_step}:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(run, recorded())

pretrain.train_step = recording_step
sys.argv = ["pretrain.py", *{arguments!r}]
exit_with(pretrain.main)
"""


def run(commands: Commands, data: Path, stop_in_step: int = 0) -> int:
    """Start or resume the run; return its exit code."""
    arguments = ["debug", "--run-name", "halved", "--data.dir", str(data), *SETTINGS, "--train.total-steps", str(STEPS)]
    arguments += ["--checkpoint.every-steps", "100"]
    script, record = commands.temp_data / "recording_run.py", commands.temp_data / "record"
    script.write_text(
        RECORDING_RUN.format(root=str(ROOT), record=str(record), stop_in_step=stop_in_step, arguments=arguments)
    )
    return commands.run([sys.executable, str(script)]).returncode


def test_a_stop_at_an_epochs_last_batch(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=TRAIN_TOKENS, n_vocab=300)
    assert run(commands, data, stop_in_step=EPOCH_STEPS) == 143
    checkpoints = commands.temp_data / "runs" / "halved" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [f"step_{EPOCH_STEPS:07d}"]
    assert run(commands, data) == 0
    assert [record["step"] for record in commands.metrics("halved", "train")] == list(range(1, STEPS + 1))

    # Each epoch trains once on every window of the files, the first before the stop and the second after it.
    record = np.fromfile(commands.temp_data / "record", np.int64).reshape(STEPS * 8, 16).tolist()
    files = [np.load(path) for path in shard_paths(data)[1:]]
    windows = [file[i : i + 16].tolist() for file in files for i in range(0, len(file) - 16, 16)]
    assert len(windows) == EPOCH_STEPS * 8
    assert sorted(record[:48]) == sorted(record[48:]) == sorted(windows)
    assert record[:48] != record[48:]
