"""A polite end: a signal asks, the program finishes what it is doing."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What schedulers send when a job must go, Ctrl-C, what they send a while before they take the machine away, and what
# comes when a terminal or a connection is closed. One that is ignored when we start, as nohup has it, stays ignored.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def heeded_signals() -> list[signal.Signals]:
    """Those of STOP_SIGNALS that this process was not started to ignore."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def end_at_once_on_ctrl_c() -> None:
    """Until there is something to finish, Ctrl-C ends this process as the others do: at once, without a traceback."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def follow_parent(parent: int, number: signal.Signals) -> None:
    """Where Linux can: `number` comes to this process once process `parent`, which started it, is gone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
        if os.getppid() != parent:  # gone before that
            os.kill(os.getpid(), number)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], str]]:
    """A function that names the first stop signal that came inside the block, or ""; later ones change nothing."""
    asked: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in heeded_signals()}
    try:
        yield lambda: signal.Signals(asked[0]).name if asked else ""
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
