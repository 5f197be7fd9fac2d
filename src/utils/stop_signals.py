"""Stop signals: the program finishes its step and saves before it ends."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread

from src.utils.errors import EXIT_INTERRUPTED, say

# The end of a scheduler's job, Ctrl-C, a scheduler's early warning, and a closed terminal or connection.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def heeded_signals() -> list[signal.Signals]:
    """The STOP_SIGNALS except those ignored from the start, such as SIGHUP under nohup."""
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


class StopRequest:
    """Called, it names the first stop signal received, or returns ""."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.answer: Callable[[], str] = lambda: ""
        """Says what follows the first signal, for the console; called in another thread."""

    def __call__(self) -> str:
        return signal.Signals(self.received[0]).name if self.received else ""


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yields a StopRequest that is set by the first stop signal inside the block.

    Later signals are ignored, except that Ctrl-C more than a second later ends the process at once, with exit code 130.
    """
    request = StopRequest()
    previous = {s: signal.signal(s, lambda number, _: request.received.append(number)) for s in heeded_signals()}
    # A backward pass keeps Python's own handlers waiting for seconds. This pipe receives the number at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    Thread(target=_answer_signals, args=(reader, request), daemon=True).start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the thread
        for number, handler in previous.items():
            signal.signal(number, handler)


def second_ctrl_c_quits() -> bool:
    """True if a second Ctrl-C ends the run. False under plain torchrun, which passes one Ctrl-C on as two."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or "LAUNCHER_PID" in os.environ


def _answer_signals(reader: int, request: StopRequest) -> None:
    requested_at: float | None = None
    while numbers := os.read(reader, 64):
        for number in (number for number in numbers if number in STOP_SIGNALS):
            if requested_at is None:
                requested_at = time.monotonic()
                with suppress(Exception):  # a failing answer does not prevent the stop
                    if text := request.answer():
                        say(text)
            # Within a second it is a repeat by a program between the terminal and this one; people are slower.
            elif number == signal.SIGINT and time.monotonic() - requested_at > 1 and second_ctrl_c_quits():
                say("quitting at once")
                os._exit(EXIT_INTERRUPTED)
    os.close(reader)


def follow_launcher() -> None:
    """On Linux, sends this process SIGTERM once its launcher dies, which a SIGKILL of the launcher would hide.

    LAUNCHER_PID: the process id of the parent. torchrun alone does not set it; then the current parent counts.
    """
    launcher = os.environ.get("LAUNCHER_PID", "")
    if sys.platform == "linux" and (launcher.isdecimal() or "TORCHELASTIC_RUN_ID" in os.environ):
        parent, pr_set_pdeathsig = int(launcher) if launcher.isdecimal() else os.getppid(), 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGTERM)
