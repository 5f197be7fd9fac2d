"""Drill 2: SIGKILL between steps, again and again in one run, at moments that differ in what is already on the disk."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import LONGER, arguments, assert_same_run, start

# Where each start is killed: at which line of metrics.jsonl, and how much of it is written then. Checkpoints are at
# steps 4, 8 and 12, validations at 0, 3, 6, 9 and 12.
KILLS = [
    ("validation", 0, "none"),  # nothing has been trained yet
    ("train", 1, "none"),  # the step is done, nothing is saved
    ("train", 3, "half"),
    ("checkpoint", 4, "all"),  # the checkpoint is there; its first step is not
    ("train", 5, "all"),
    ("validation", 6, "half"),
    ("train", 8, "none"),  # what the next checkpoint would hold
    ("train", 11, "all"),
    ("validation", 12, "none"),  # every step is done, and the last ones are not saved
]

# The program is imported once; each start is a process of its own, which a real signal kills.
STARTS = """
import json, os, signal, sys
import pretrain
from src.utils.errors import exit_with
from src.utils.logger import RunLogger

kills = json.loads(sys.argv.pop(1))
append = RunLogger._append

def kill_at(kind, step, part):
    def appending(self, name, line):
        record = json.loads(line) if name == "metrics.jsonl" else {}
        if (record.get("kind"), record.get("step")) != (kind, step):
            return append(self, name, line)
        with open(self.run_dir / name, "a") as file:
            file.write({"none": "", "half": line[:len(line) // 2], "all": line + "\\n"}[part])
        os.kill(os.getpid(), signal.SIGKILL)
    RunLogger._append = appending

codes = []
for kill in [*kills, None]:
    child = os.fork()
    if child == 0:
        if kill:
            kill_at(*kill)
        exit_with(pretrain.main)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def test_kills_change_nothing(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    assert start(commands, data, *LONGER, "--run-name", "whole").returncode == 0
    program = [sys.executable, "-c", STARTS, json.dumps(KILLS), *arguments(data, *LONGER)]
    result = commands.run(program)
    assert result.stdout.splitlines()[-1:] == [json.dumps([-9] * len(KILLS) + [0])], result.stderr
    runs = commands.temp_data / "runs"
    assert_same_run(runs / "whole", runs / "drill", steps=12)
    resumed = [line["step"] for line in commands.metrics("drill", "event") if line["name"] == "resume"]
    assert len(resumed) == 6  # since the fourth kill, one for each start
    assert resumed == sorted(resumed)
    assert set(resumed) <= {4, 8}
