"""What ends a process that waits for ever; the watched processes are real ones."""

import subprocess
import sys
import time
from typing import IO

from src.utils.root import ROOT

WAITING = """
import sys, time
from src.utils.watchdog import Watchdog
watchdog = Watchdog(0, {{1: {peer}}}, {limit_s})
{actions}
print("done")
"""


def run(
    actions: str, limit_s: float = 60, peer_ends_after_s: float = 60, stderr: IO | int = subprocess.PIPE
) -> tuple[int, str, float]:
    """Exit code, stderr and seconds of a process that does `actions` beside a peer that ends by itself."""
    with subprocess.Popen(["sleep", str(peer_ends_after_s)]) as peer:
        script = WAITING.format(peer=peer.pid, limit_s=limit_s, actions=actions)
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=stderr, text=True)
        started = time.monotonic()
        if peer_ends_after_s < 10:
            peer.wait()
        _, words = process.communicate(timeout=30)
        seconds = time.monotonic() - started
        peer.kill()
    return process.returncode, words, seconds


def test_a_process_that_is_stuck_ends_and_names_what_it_did():
    code, stderr, seconds = run("watchdog.doing('step 7'); time.sleep(60)", limit_s=1)
    assert code == 1
    assert "(process 0): no process has moved on for 1 s in step 7" in stderr
    assert "--train.timeout-s" in stderr
    assert "<string>" in stderr  # where it waited
    assert seconds < 10


def test_a_console_that_takes_nothing_keeps_no_process_alive():
    with open("/dev/full", "w") as full:
        assert run("watchdog.doing('step 7'); time.sleep(60)", limit_s=1, stderr=full)[0] == 1


def test_a_process_whose_peer_is_gone_ends_too():
    code, stderr, _ = run("watchdog.doing('step 7'); time.sleep(60)", peer_ends_after_s=1)
    assert code == 1
    assert "process 1 is gone; this one was in step 7" in stderr


def test_a_process_that_is_stuck_before_the_first_thing_it_says_ends_too():
    code, stderr, _ = run("time.sleep(60)", limit_s=1)
    assert code == 1
    assert "(process 0): no process has moved on for 1 s in the start" in stderr


def test_signs_of_life_and_an_end_keep_it_quiet():
    """Without a limit after the last thing it does."""
    living = "for _ in range(40): time.sleep(0.1); watchdog.alive()"
    actions = f"{living}\nwatchdog.doing('step 1')\n{living}\nwatchdog.close(); time.sleep(4)"
    assert run(actions, limit_s=3)[:2] == (0, "")
