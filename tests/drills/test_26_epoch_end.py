"""Drill 26: a stop at an epoch's last batch skips nothing and repeats nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.conftest import Commands
from tests.drills.small_run import shard_paths, start_with

# 27 + 21 windows of 16 + 1 tokens: six batches of 8 an epoch
TRAIN_TOKENS = [27 * 16 + 1, 21 * 16 + 5]
EPOCH_STEPS, STEPS = 6, 12

# Writes down what it trains on and sends itself a real signal in one step.
RECORDING = """
import os, signal
import pretrain

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
"""


def run(commands: Commands, data: Path, stop_in_step: int = 0) -> int:
    """Starts or resumes the run; returns its exit code."""
    lines = RECORDING.format(record=str(commands.temp_data / "record"), stop_in_step=stop_in_step)
    more = ("--train.total-steps", str(STEPS), "--checkpoint.every-steps", "100")
    return start_with(commands, lines, data, *more).returncode


def test_a_stop_at_an_epochs_last_batch(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=TRAIN_TOKENS, n_vocab=300)
    assert run(commands, data, stop_in_step=EPOCH_STEPS) == 143
    checkpoints = commands.temp_data / "runs" / "drill" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [f"step_{EPOCH_STEPS:07d}"]
    assert run(commands, data) == 0
    assert [record["step"] for record in commands.metrics("drill", "train")] == list(range(1, STEPS + 1))

    # Each epoch trains once on every window of the files, the first before the stop and the second after it.
    record = np.fromfile(commands.temp_data / "record", np.int64).reshape(STEPS * 8, 16).tolist()
    files = [np.load(path) for path in shard_paths(data)[1:]]
    windows = [file[i : i + 16].tolist() for file in files for i in range(0, len(file) - 16, 16)]
    assert len(windows) == EPOCH_STEPS * 8
    assert sorted(record[:48]) == sorted(record[48:]) == sorted(windows)
    assert record[:48] != record[48:]
