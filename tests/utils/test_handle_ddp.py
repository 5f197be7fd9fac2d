"""Decisions that processes share, here with threads for processes; tests/test_processes.py has real ones."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from src.utils.errors import PeerError, StorageError, UserError
from src.utils.handle_ddp import Processes
from src.utils.root import ROOT

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Thread(Processes):
    """One of several processes that meet in `gather`, as they would in a collective."""

    meeting: threading.Barrier
    values: list[Any]

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meeting.wait(timeout=10)
        values = list(self.values)
        self.meeting.wait(timeout=10)  # nobody begins the next one before all have read
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(each) for each in zip(*self.gather(values), strict=True)]

    def from_main(self, value: Any) -> Any:
        return self.gather(value)[0]


def outcomes(action: Callable[[int], Any], method: str = "together", world_size: int = 3) -> list[Any]:
    """What each process gets from `action(rank)`: a result or an exception."""
    meeting, values = threading.Barrier(world_size), [None] * world_size

    def run(rank: int) -> Any:
        try:
            return getattr(Thread(rank, rank, world_size, CPU, meeting=meeting, values=values), method)(
                lambda: action(rank)
            )
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def raising(errors: dict[int, Exception]) -> Callable[[int], int]:
    def action(rank: int) -> int:
        if rank in errors:
            raise errors[rank]
        return rank

    return action


@pytest.mark.parametrize("world_size", [1, 3])
def test_together_gives_each_its_own_result(world_size: int):
    assert outcomes(raising({}), world_size=world_size) == list(range(world_size))


def test_an_error_in_one_process_ends_all_in_its_way():
    for rank in range(3):
        error = StorageError("disk gone")
        found = outcomes(raising({rank: error}))
        assert found.pop(rank) is error
        assert [type(other) for other in found] == [PeerError, PeerError]
        assert [other.exit_code for other in found] == [4, 4]


def test_an_error_that_several_meet_is_raised_by_one_and_another_by_its_own():
    same = [UserError("no data"), UserError("no data")]
    found = outcomes(raising({0: same[0], 1: same[1], 2: UserError("damaged data on this machine")}))
    assert found[0] is same[0]
    assert type(found[1]) is PeerError
    assert str(found[2]) == "damaged data on this machine"


def test_an_unforeseen_error_ends_the_others_with_1():
    error = KeyError("x")
    found = outcomes(raising({1: error}))
    assert found[1] is error
    assert not hasattr(error, "exit_code")
    assert [found[i].exit_code for i in (0, 2)] == [1, 1]


def test_main_only_runs_in_one_process_and_all_get_its_result():
    ran: list[int] = []

    def action(rank: int) -> str:
        ran.append(rank)
        return f"from {rank}"

    assert outcomes(action, "main_only") == ["from 0"] * 3
    assert ran == [0]
    error = UserError("no checkpoint")
    found = outcomes(raising({0: error}), "main_only")
    assert found[0] is error
    assert [type(other) for other in found[1:]] == [PeerError, PeerError]


# Two real processes, which have three seconds for each thing they do.
TWO = """
import sys, time
sys.path.insert(0, {root!r})
from src.utils.errors import StorageError, exit_with
from src.utils.handle_ddp import processes

def main():
    with processes("cpu", timeout_s=3) as procs:
        {action}

exit_with(main)
"""


def two(tmp_path: Path, action: str) -> tuple[int, str]:
    """Exit code and stderr of two processes that do `action` with `procs`."""
    program = tmp_path / "program.py"
    program.write_text(TWO.format(root=str(ROOT), action=action))
    launch = [sys.executable, "-m", "src.utils.torchrun", "--standalone", "--local-addr", "127.0.0.1"]
    launch += ["--nproc-per-node", "2", str(program)]
    result = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return result.returncode, result.stderr


def test_a_process_may_work_longer_than_the_others_wait_for_each_other(tmp_path: Path):
    assert two(tmp_path, "assert procs.main_only(lambda: time.sleep(7) or 'read') == 'read'") == (0, "")


def test_an_error_of_long_work_ends_all_in_its_way(tmp_path: Path):
    action = "procs.together_for_long(lambda: (_ for _ in ()).throw(StorageError('gone')) if procs.rank else None)"
    assert two(tmp_path, action) == (4, "program.py: error (process 1): gone\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_process_whose_launcher_died_before_it_could_follow_stops():
    program = "from src.utils.stop_signals import follow_launcher\nfollow_launcher()"
    for parent, code in ((os.getpid(), 0), (os.getppid(), -signal.SIGTERM)):
        environment = {**os.environ, "LAUNCHER_PID": str(parent)}
        ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=False)
        assert ended.returncode == code
