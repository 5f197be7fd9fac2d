"""Signals that ask for a stop: the program finishes its step and saves before it ends."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A scheduler's end of a job, Ctrl-C, a scheduler's early warning, and a closed terminal or connection.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def heeded_signals() -> list[signal.Signals]:
    """The STOP_SIGNALS except those ignored from the start, as nohup does with SIGHUP."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def end_at_once_on_ctrl_c() -> None:
    """Ctrl-C ends this process at once, without a traceback, until a later handler replaces this."""
    if signal.SIGINT in heeded_signals():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def end_at_once() -> Iterator[None]:
    """Inside the block a stop signal ends the process at once, without a traceback: there is nothing to save."""
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in heeded_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], str]]:
    """Yields a function that names the first stop signal received inside the block, or ""; later ones are ignored."""
    received: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in heeded_signals()}
    try:
        yield lambda: signal.Signals(received[0]).name if received else ""
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def follow_launcher() -> None:
    """On Linux, sends this process SIGTERM once its launcher dies, which a SIGKILL of the launcher would hide.

    LAUNCHER_PID: the process id of the parent. torchrun alone does not set it; then the present parent counts.
    """
    launcher = os.environ.get("LAUNCHER_PID", "")
    if launcher.isdecimal() or "TORCHELASTIC_RUN_ID" in os.environ:
        follow_parent(int(launcher) if launcher.isdecimal() else os.getppid())


def follow_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """On Linux: signal `number` comes to this process once process `parent`, which started it, dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), number)
