"""A run of two processes for the drills: the real program after a few lines that a drill adds."""

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.small_run import PROGRAM, arguments

# As the launcher starts it.
TORCHRUN = [sys.executable, "-m", "src.utils.torchrun", "--standalone", "--local-addr", "127.0.0.1"]

# For those lines: `at_step(step, rank, action)` calls `action(run)` in that process at the start of the step after
# `step` completed ones. Each process leaves its id in a file, and `moment()` the time.
PREPARED = """
import os, sys, time
sys.path.insert(0, {root!r})
import pretrain

folder = {folder!r}
with open(os.path.join(folder, "pid_" + os.environ["RANK"]), "w") as file:
    file.write(str(os.getpid()))

def moment():
    with open(os.path.join(folder, "moment"), "w") as file:
        file.write(str(time.time()))

def at_step(step, rank, action):
    original = pretrain.train_step
    def acting(run, batches):
        if (run.state.progress.step, run.procs.rank) == (step, rank):
            action(run)
        return original(run, batches)
    pretrain.train_step = acting
"""


@dataclass(frozen=True)
class Pair:
    """The end of a run of two processes."""

    code: int
    stderr: str
    seconds: float
    """From the last `moment()` to the end of torchrun; infinite if there was no moment."""
    gone: bool
    """True if both processes had ended by then."""


def run_pair(commands: Commands, folder: Path, lines: str, data: Path, *more: str) -> Pair:
    """Runs two processes of the run that `arguments` describes, after `lines`; notes lie in `folder`."""
    program, moment = folder / "program.py", folder / "moment"
    for note in (moment, *folder.glob("pid_*")):  # of a run before this one
        note.unlink(missing_ok=True)
    program.write_text(PREPARED.format(root=str(ROOT), folder=str(folder)) + lines + PROGRAM)
    command = [*TORCHRUN, "--nproc-per-node", "2", str(program), *arguments(data, *more)]
    result: subprocess.CompletedProcess[str] = commands.run(command)
    ended = time.time()
    seconds = ended - float(moment.read_text()) if moment.exists() else math.inf
    pids = [int(path.read_text()) for path in folder.glob("pid_*")]
    assert len(pids) == 2, result.stderr
    return Pair(result.returncode, result.stderr, seconds, not any(os.path.exists(f"/proc/{pid}") for pid in pids))
