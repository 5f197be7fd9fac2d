"""Drill 26: a stop at an epoch's last batch skips nothing and repeats nothing."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.small_run import assert_same_run, shard_paths
from tests.test_processes import SETTINGS

# 27 + 21 windows of 16 + 1 tokens: six batches of 8 an epoch
TRAIN_TOKENS = [27 * 16 + 1, 21 * 16 + 5]
EPOCH_STEPS, STEPS = 6, 15
RUNS = ("whole", "halved")

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


def run(commands: Commands, data: Path, name: str, stop_in_step: int = 0) -> int:
    """Starts the run `name`, or goes on with it; returns its exit code."""
    arguments = ["debug", "--run-name", name, "--data.dir", str(data), *SETTINGS, "--train.total-steps", str(STEPS)]
    arguments += ["--checkpoint.every-steps", "100", "--model.ffn-dropout", "0.2"]
    script, record = commands.temp_data / "recording_run.py", commands.temp_data / name
    script.write_text(
        RECORDING_RUN.format(root=str(ROOT), record=str(record), stop_in_step=stop_in_step, arguments=arguments)
    )
    return commands.run([sys.executable, str(script)]).returncode


def test_a_stop_at_an_epochs_last_batch(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=TRAIN_TOKENS, n_vocab=300)
    assert run(commands, data, "whole") == 0
    assert run(commands, data, "halved", stop_in_step=EPOCH_STEPS) == 143
    runs = commands.temp_data / "runs"
    assert [path.name for path in (runs / "halved" / "checkpoints").iterdir()] == [f"step_{EPOCH_STEPS:07d}"]
    assert run(commands, data, "halved") == 0

    # each epoch trains on every window of the files once, also the one that is made of two runs' batches
    whole, halved = (np.fromfile(commands.temp_data / name, np.int64).reshape(STEPS * 8, 16) for name in RUNS)
    np.testing.assert_array_equal(whole, halved)
    files = [np.load(path) for path in shard_paths(data)[1:]]
    windows = [file[i : i + 16].tolist() for file in files for i in range(0, len(file) - 16, 16)]
    assert len(windows) == EPOCH_STEPS * 8
    for epoch in range(2):
        assert sorted(halved[epoch * 48 : (epoch + 1) * 48].tolist()) == sorted(windows)
    assert halved[:48].tolist() != halved[48:96].tolist()

    assert_same_run(runs / "whole", runs / "halved", STEPS)
