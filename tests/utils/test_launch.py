"""Starting, restarting and ending the processes of one machine, with small programs in place of training."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from src import available_cores
from src.utils.root import ROOT

# Each process writes its attempt into a file, waits until its peers have, and then does what its case says.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from src.utils.errors import StorageError, exit_with

rank, attempt = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
folder = Path(sys.argv[1])

def main():
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    asked = []
    (folder / f"{{attempt}}-{{rank}}").touch()
    while len(list(folder.glob(f"{{attempt}}-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
{case}

exit_with(main)
"""


def start(tmp_path: Path, case: str, *options: str, stderr: IO | int = subprocess.PIPE) -> subprocess.Popen[str]:
    (tmp_path / "seen").mkdir(exist_ok=True)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), case="\n".join(f"    {line}" for line in case.splitlines())))
    command = [sys.executable, "-m", "src.utils.launch", *options, "--folder", str(tmp_path), str(program), "seen"]
    return subprocess.Popen(command, cwd=ROOT, stderr=stderr, text=True)


def outcome(tmp_path: Path, case: str, *options: str) -> tuple[int, str, int]:
    """Exit code, stderr, and how many times the processes were started."""
    with start(tmp_path, case, *options) as process:
        _, words = process.communicate(timeout=120)
    return process.returncode, words, starts(tmp_path)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def starts(tmp_path: Path) -> int:
    return len({path.name.split("-")[0] for path in (tmp_path / "seen").iterdir()})


@pytest.mark.parametrize("number", ["SIGKILL", "SIGABRT", "SIGSEGV"])
def test_killed_once_is_started_again_and_the_end_counts(number: str, tmp_path: Path):
    case = f"if attempt == 0 and rank == '1': os.kill(os.getpid(), signal.{number})\ntime.sleep(0.3)"
    code, words, starts = outcome(tmp_path, case, "--processes", "2")
    assert (code, starts) == (0, 2)
    assert words == f"launch: process 1 was killed by {number}; starting again, 1 of 3 times\n"


def test_an_unforeseen_error_is_tried_again_so_many_times(tmp_path: Path):
    code, words, starts = outcome(tmp_path, "raise KeyError('lost')", "--max-restarts", "2")
    assert (code, starts) == (1, 3)
    assert words.count("KeyError: 'lost'") == 3
    assert words.endswith("launch: process 0 ended with exit code 1; giving up\n")
    assert "torch" not in words


@pytest.mark.parametrize("code", [2, 3, 4, 5, 143])
def test_a_final_code_is_not_started_again(code: int, tmp_path: Path):
    assert outcome(tmp_path, f"return {code}") == (code, "", 1)


def test_the_first_final_code_counts_though_its_peer_dies_of_it(tmp_path: Path):
    """The peer is seen to fail first, and its code says nothing final."""
    case = "\n".join(
        [
            "if rank == '1':",
            "    import atexit; atexit.register(time.sleep, 2)",
            "    raise StorageError('disk gone')",
            "while not Path(os.environ['EXIT_CODE_FILE']).read_text(): time.sleep(0.01)",
            "raise RuntimeError('connection closed by peer')",
        ]
    )
    code, words, starts = outcome(tmp_path, case, "--processes", "2")
    assert (code, starts) == (4, 1)
    assert "program.py: error (process 1): disk gone" in words


def test_a_console_that_takes_nothing_prevents_no_restart(tmp_path: Path):
    case = "if attempt == 0: os.kill(os.getpid(), signal.SIGKILL)\nif attempt == 1: raise KeyError('lost')\nreturn 2"
    with open("/dev/full", "w") as full, start(tmp_path, case, stderr=full) as process:
        assert process.wait(timeout=120) == 2
    assert starts(tmp_path) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_lets_the_processes_save_and_is_quiet(number: signal.Signals, tmp_path: Path):
    """However often it is asked for: three times, in the first half of the save."""
    case = (
        "for s in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP): signal.signal(s, signal.getsignal(signal.SIGTERM))\n"
    )
    case += "(folder / 'ready').touch()\n"
    case += "while not asked: time.sleep(0.01)\ntime.sleep(2)\n(folder / f'saved-{rank}').touch()\nreturn 143"
    with start(tmp_path, case, "--processes", "2") as process:
        wait_for(tmp_path / "seen" / "ready")
        time.sleep(0.3)
        for _ in range(3):
            process.send_signal(number)
            time.sleep(0.3)
        _, words = process.communicate(timeout=60)
    assert (process.returncode, words) == (143, "")
    assert {path.name for path in (tmp_path / "seen").glob("saved-*")} == {"saved-0", "saved-1"}


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_stop_of_one_process_that_cannot_heed_it_yet_is_a_stop(number: str, tmp_path: Path):
    case = f"signal.signal(signal.{number}, signal.SIG_DFL)\n"
    case += f"if rank == '1': os.kill(os.getpid(), signal.{number})\ntime.sleep(1)"
    code, words, starts = outcome(tmp_path, case, "--processes", "2")
    assert (code, starts) == (143, 1)
    assert words == "launch: stopped before there was anything to save, or without saving\n"


def test_what_dies_of_its_peers_end_was_not_stopped(tmp_path: Path):
    """The launcher ends it with the signal that asks for a stop."""
    case = "signal.signal(signal.SIGTERM, signal.SIG_DFL)\nif attempt: return 0\n"
    case += "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    code, words, starts = outcome(tmp_path, case, "--processes", "2")
    assert (code, starts) == (0, 2)
    assert "process 1 was killed by SIGKILL" in words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_processes_learn_which_signal_it_was(number: signal.Signals, tmp_path: Path):
    case = "from src.utils.stop_signals import stop_on_signals\n"
    case += "with stop_on_signals() as stop:\n    (folder / 'ready').touch()\n    while not stop(): time.sleep(0.01)\n"
    case += "    (folder / stop()).touch()\nreturn 143"
    with start(tmp_path, case) as process:
        wait_for(tmp_path / "seen" / "ready")
        process.send_signal(number)
        assert process.wait(timeout=60) == 143
    assert (tmp_path / "seen" / number.name).exists()


def test_a_stop_that_comes_too_late_is_no_stop(tmp_path: Path):
    """The processes are at their end, where they heed no signal, and end well."""
    case = "for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\n"
    case += "(folder / 'ready').touch()\ntime.sleep(2)\nreturn 0"
    with start(tmp_path, case, "--processes", "2") as process:
        wait_for(tmp_path / "seen" / "ready")
        process.send_signal(signal.SIGTERM)
        _, words = process.communicate(timeout=60)
    assert (process.returncode, words) == (0, "")


def test_an_interrupt_that_is_ignored_from_the_start_stays_so(tmp_path: Path):
    """As in the background of a script, whose Ctrl-C is not for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(tmp_path, "(folder / 'ready').touch()\ntime.sleep(1)")
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        for _ in range(3):  # some of them while it still starts
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        wait_for(tmp_path / "seen" / "ready")
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
    assert (process.returncode, words) == (0, "")


def test_a_final_code_counts_where_there_is_no_room_to_record_it(tmp_path: Path):
    case = "os.environ['EXIT_CODE_FILE'] = '/nowhere/code'\nraise StorageError('the disk is full')"
    code, words, starts = outcome(tmp_path, case)
    assert (code, words, starts) == (4, "program.py: error: the disk is full\n", 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_the_cores_that_there_are(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    case = "(folder.parent / f'threads-{os.environ[\"OMP_NUM_THREADS\"]}').touch()"
    assert outcome(tmp_path, case, "--processes", str(processes))[0] == 0
    (found,) = tmp_path.glob("threads-*")
    assert found.name == f"threads-{max(1, available_cores() // processes)}"
