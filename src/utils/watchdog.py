"""What ends a process whose peers are gone or stuck, also while it waits for them in code that never returns.

A collective waits for every process, and not all backends notice when one of them has died. So a thread looks
whether this machine's other processes are still there, and how long the last sign of life of its own process is ago.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence

from src.utils.errors import EXIT_FAILED, say

LOOK_EVERY_S = 0.5
GRACE_S = 3.0  # for a collective that does notice a lost peer, and says more


class Watchdog(threading.Thread):
    """Watches until `close`; ends the process with exit code 1, its step named, if it must."""

    def __init__(self, rank: int, peers: Mapping[int, int], limit_s: float) -> None:
        """`peers`: rank and process id of the other processes of this machine; `limit_s`: for each thing `doing`."""
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.peers, self.limit_s = rank, peers, limit_s
        self.what = "the start"
        self._last_sign = time.monotonic()
        self._closed = threading.Event()
        self.start()

    def doing(self, what: str) -> None:
        """From now on the process does `what`, in words, and must finish or give a sign of life within the limit."""
        self.what, self._last_sign = what, time.monotonic()

    def alive(self) -> None:
        """A sign of life: all processes have just answered each other."""
        self._last_sign = time.monotonic()

    def close(self) -> None:
        """Called once no process needs this one any more, or this one is about to end.

        Waits for the thread: one that is still there while Python shuts down can abort the process.
        """
        self._closed.set()
        self.join()

    def run(self) -> None:
        gone_since: float | None = None
        while not self._closed.wait(LOOK_EVERY_S):
            now, last_sign = time.monotonic(), self._last_sign
            gone = [rank for rank, pid in self.peers.items() if not _is_there(pid)]
            if not gone:
                gone_since = None
            elif gone_since is None:
                gone_since = now
            elif now - gone_since > GRACE_S:
                self._end(f"process {gone[0]} is gone; this one was in {self.what} and ends too")
            if now - last_sign > self.limit_s:
                self._end(
                    f"no process has moved on for {self.limit_s:g} s in {self.what}: one of them is stuck or stopped. "
                    "See above where this one waits; if a step really takes so long, raise --train.timeout-s",
                    traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0]),
                )

    def _end(self, message: str, stack: Sequence[str] = ()) -> None:
        try:
            say("".join([*stack, f"{os.path.basename(sys.argv[0])}: error (process {self.rank}): {message}"]))
        finally:
            os._exit(EXIT_FAILED)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
