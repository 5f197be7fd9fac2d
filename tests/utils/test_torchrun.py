"""torchrun as the launcher starts it, with small programs in place of training."""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from src.utils import torchrun
from src.utils.root import ROOT

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from src.utils.errors import StorageError, exit_with
from src.utils.stop_signals import stop_on_signals

rank, folder = os.environ["RANK"], Path(sys.argv[1])

def main():
    with stop_on_signals() as stop:
        (folder / f"ready-{{rank}}").touch()
        while len(list(folder.glob("ready-*"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.01)
        {case}

exit_with(main)
"""


def start(tmp_path: Path, case: str) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), case=case))
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", "src.utils.torchrun", *options, str(program), str(tmp_path)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    with process:
        _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


@pytest.mark.parametrize(
    ("ends", "recorded", "code", "message"),
    [
        ({1: -9}, 0, 1, "process 1 died of SIGKILL\n"),
        ({0: 1, 1: -9}, 0, 1, "process 1 died of SIGKILL\nprocess 0 ended with exit code 1\n"),
        ({0: 4, 1: 1}, 4, 4, ""),
        ({0: 4, 1: -15}, 0, 4, ""),  # the disk was too full to record it
        ({0: 1, 1: 1}, 2, 2, ""),
        ({0: 143, 1: 143}, 143, 143, ""),
        ({1: -15, 0: -15}, 0, 143, ""),  # stopped before the handler was set
        ({0: 143, 1: -11}, 143, 1, "process 1 died of SIGSEGV\nprocess 0 ended with exit code 143\n"),
    ],
)
def test_the_exit_code_and_what_is_printed(
    ends: Mapping[int, int], recorded: int, code: int, message: str, capsys: pytest.CaptureFixture[str]
):
    assert torchrun.exit_code(ends, recorded) == code
    assert capsys.readouterr().err == message


def test_a_final_code_counts_though_its_peer_fails_because_of_it(tmp_path: Path):
    case = 'if rank == "1": raise StorageError("disk gone")\n'
    case += '        while not os.path.getsize(os.environ["EXIT_CODE_FILE"]): time.sleep(0.01)\n'
    case += '        raise RuntimeError("connection closed by peer")'
    code, stderr = end(start(tmp_path, case))
    assert code == 4
    assert "program.py: error (process 1): disk gone" in stderr
    assert "torch" not in stderr


def test_a_stop_is_passed_on_once_and_lets_the_processes_save(tmp_path: Path):
    number = signal.SIGUSR1
    case = "while not stop(): time.sleep(0.01)\n"
    case += "        time.sleep(2)\n        (folder / f'saved-{rank}-{stop()}').touch()\n        return 143"
    process = start(tmp_path, case)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(3):  # the later ones come while the processes save
        process.send_signal(number)
        time.sleep(0.3)
    assert end(process) == (143, "")
    assert {path.name for path in tmp_path.glob("saved-*")} == {f"saved-{rank}-{number.name}" for rank in range(2)}
