"""Drill 2: SIGKILL between steps, again and again in one run, at moments that differ in what is already on the disk."""

import signal
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import LONGER, assert_same_run, start, start_with

# Where each start is killed: at which line of metrics.jsonl, and how much of it is written then. Checkpoints are at
# steps 4, 8 and 12, validations at 0, 3, 6, 9 and 12.
KILLS = [
    ("validation", 0, "none"),  # nothing has been trained yet
    ("train", 1, "none"),  # the step is done, nothing is saved
    ("train", 3, "half"),
    ("checkpoint", 4, "all"),  # the checkpoint exists; its first step does not
    ("train", 5, "all"),
    ("validation", 6, "half"),
    ("train", 8, "none"),  # what the next checkpoint would hold
    ("train", 11, "all"),
    ("validation", 12, "none"),  # every step is done, and the last ones are not saved
]

KILL = """
import json, os, signal
from src.utils.logger import RunLogger
append = RunLogger._append

def appending(self, name, line):
    record = json.loads(line) if name == "metrics.jsonl" else {{}}
    if (record.get("kind"), record.get("step")) != ({kind!r}, {step}):
        return append(self, name, line)
    with open(self.run_dir / name, "a") as file:
        file.write({{"none": "", "half": line[:len(line) // 2], "all": line + "\\n"}}[{part!r}])
    os.kill(os.getpid(), signal.SIGKILL)

RunLogger._append = appending
"""


def test_kills_change_nothing(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    assert start(commands, data, *LONGER, "--run-name", "whole").returncode == 0
    for kind, step, part in KILLS:
        killed = start_with(commands, KILL.format(kind=kind, step=step, part=part), data, *LONGER)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert start(commands, data, *LONGER).returncode == 0
    runs = commands.temp_data / "runs"
    assert_same_run(runs / "whole", runs / "drill", steps=12)
    resumed = [line["step"] for line in commands.metrics("drill", "event") if line["name"] == "resume"]
    assert len(resumed) == 6  # since the fourth kill, one for each start
    assert resumed == sorted(resumed)
    assert set(resumed) <= {4, 8}
