"""A run of two processes for the drills: the real program after a few lines that a drill adds."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch.distributed import TCPStore

from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.forks import run_forks
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


def program(folder: Path, lines: str) -> str:
    """The program of each process: pretrain.py after `lines`, with notes in `folder`."""
    return PREPARED.format(root=str(ROOT), folder=str(folder)) + lines + PROGRAM


def run_pair(commands: Commands, folder: Path, lines: str, data: Path, *more: str) -> Pair:
    """Runs two processes of the run that `arguments` describes, after `lines`, under torchrun."""
    (folder / "program.py").write_text(program(folder, lines))
    command = [*TORCHRUN, "--nproc-per-node", "2", str(folder / "program.py"), *arguments(data, *more)]
    result: subprocess.CompletedProcess[str] = commands.run(command)
    return _ended(folder, result.returncode, result.stderr)


def fork_pair(
    commands: Commands,
    folder: Path,
    lines: str,
    data: Path,
    *more: str,
    variables: Mapping[int, Mapping[str, str]] = MappingProxyType({}),
) -> Pair:
    """The same without torchrun, in half the time: for drills in which both processes end by themselves, alike.

    `variables`: of the environment of single ranks.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet, as torchrun provides it
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [
        commands.environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(variables.get(rank, {}))
        for rank in range(2)
    ]
    codes, result = run_forks(program(folder, lines), arguments(data, *more), ranks)
    assert codes[0] == codes[1], result.stderr
    return _ended(folder, codes[0], result.stderr)


def _ended(folder: Path, code: int, stderr: str) -> Pair:
    moment, notes = folder / "moment", list(folder.glob("pid_*"))
    seconds = time.time() - float(moment.read_text()) if moment.exists() else math.inf
    assert len(notes) == 2, stderr
    gone = not any(os.path.exists(f"/proc/{note.read_text()}") for note in notes)
    for note in (*notes, *folder.glob("moment")):
        note.unlink()
    return Pair(code, stderr, seconds, gone)
