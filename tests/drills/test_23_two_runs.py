"""Drill 23: a second run wants the run directory of one that still runs; then that one is killed."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.pair import TORCHRUN
from tests.drills.small_run import AT_LINE, PROGRAM, arguments, contents, start, start_with

PAUSE = (
    AT_LINE
    + """
import time

def pause():
    print("paused", flush=True)
    time.sleep(600)

at_line("train", 3, pause)
"""
)


# As pretrain.py does where it is the program.
FOLLOWING = """
from src.utils.stop_signals import follow_launcher
follow_launcher()
"""
# The step that is under way takes longer than another start, unless the machine is busy.
SLOW_STEP = PAUSE.replace("time.sleep(600)", "time.sleep(6)")
# A start waits 20 s for the other one to end.
IMPATIENT = "from src.utils import files\nfiles.PATIENCE_S = 0.1\n"


@contextmanager
def until_paused(commands: Commands, *command: str) -> Iterator[subprocess.Popen]:
    """A Python process that has come to its pause; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=commands.environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "paused\n"
            yield process
        finally:
            process.kill()


def test_the_second_names_the_first_and_follows_it_once_it_is_killed(commands: Commands, dataset: Callable[..., Path]):
    data, runs = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    with until_paused(commands, "-c", PAUSE + PROGRAM, *arguments(data)) as first:
        deadline = time.monotonic() + 60  # step 2 is still being saved in the background
        while not (runs / "drill" / "checkpoints" / "step_0000002").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = contents(runs)
        for more in ((), ("--resume", "never")):
            second = start_with(commands, IMPATIENT, data, *more)
            assert second.returncode == 5, second.stderr
            assert "Traceback" not in second.stderr
            assert f"another process is training in {runs / 'drill'}: " in second.stderr
            holder = re.search(r'\{"pid": (\d+), "host": "(.*)"\}', second.stderr)
            assert holder is not None
            assert (int(holder[1]), holder[2]) == (first.pid, socket.gethostname())
            assert contents(runs) == before
        os.kill(first.pid, 0)  # undisturbed
    third = start(commands, data)
    assert third.returncode == 0, third.stderr
    assert [line["step"] for line in commands.metrics("drill", "train")] == [1, 2, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets go of processes whose launcher is gone")
def test_one_whose_launcher_is_killed_is_waited_for(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    """It is asked to stop, and has a step to finish and a checkpoint to save."""
    data, program = dataset(train_tokens=[700, 900], n_vocab=300), tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{FOLLOWING}{SLOW_STEP}{PROGRAM}")
    with until_paused(commands, *TORCHRUN[1:], str(program), *arguments(data)) as launcher:
        launcher.kill()
        second = start(commands, data)
    assert second.returncode == 0, second.stderr
    assert "resume: from step_0000003 of 4 steps" in second.stderr
    assert [line["step"] for line in commands.metrics("drill", "train")] == [1, 2, 3, 4]
