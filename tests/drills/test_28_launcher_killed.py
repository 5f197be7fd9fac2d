"""Drill 28: SIGKILL of the launcher, or of torchrun, while the ranks start and while they train."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from src.utils.files import refuse_claimed
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.pair import TORCHRUN
from tests.drills.small_run import arguments

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")


@contextmanager
def launched(commands: Commands, data: Path, processes: int, whole: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher, or torchrun as the launcher starts it."""
    run = arguments(data, "--train.total-steps", "100000")
    command = [*TORCHRUN, "--nproc-per-node", str(processes), str(ROOT / "pretrain.py"), *run]
    process = subprocess.Popen(
        [str(ROOT / "run_pre_training_e2e.sh"), *run[1:]] if whole else command,
        env=commands.environment
        | {"PYTHON": sys.executable, "DEBUG_MODE": "True", "NPROC": str(processes), "MAX_RESTARTS": "0"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        for pid in [process.pid, *running(commands)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def running(commands: Commands) -> list[int]:
    """Process ids of this test's pretrain.py and torchrun."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile
            command = (folder / "cmdline").read_text().replace("\0", " ")
            ours = f"TEMP_DATA_DIR={commands.temp_data}\0" in (folder / "environ").read_text()
            if ours and "pretrain.py" in command and "e2e.sh" not in command:
                found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("victim", "processes", "training"),
    [
        ("launcher", 2, True),
        ("launcher", 2, False),
        ("launcher", 1, False),
        ("torchrun", 2, True),
        ("torchrun", 2, False),
    ],
)
def test_ranks_are_gone_soon_and_nothing_holds_the_run(
    commands: Commands, dataset: Callable[..., Path], victim: str, processes: int, training: bool
) -> None:
    data, run_dir = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs" / "drill"
    with launched(commands, data, processes, victim == "launcher") as process:
        if training:
            wait_until(lambda: (run_dir / "metrics.jsonl").exists() and commands.metrics("drill", "train"))
        else:  # each rank imports torch for seconds
            wait_until(lambda: len(running(commands)) == (processes + 1 if processes > 1 else 1))
        process.kill()
        wait_until(lambda: not running(commands), seconds=15)
    refuse_claimed(run_dir)
