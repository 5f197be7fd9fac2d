"""What a preparation says on stderr: how far it is, now and then, also while it waits for a download; and notes."""

import shutil
import sys
import threading
import time
from collections.abc import Sequence

from src.data_processing.text_sources import Source
from src.utils.errors import CLEAR

_EVERY_S = 10.0
_EVERY_S_ON_A_TERMINAL = 1.0


class Progress:
    """Writes a line from a thread of its own until the `with` block ends; on a terminal, the same line again."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """`sources` say how far their downloads are."""
        self._sources = sources
        self._start = time.monotonic()
        self._first_share = self._share = 0.0
        self._documents = self._tokens = self._earlier_tokens = 0
        self._ended = threading.Event()
        self._terminal = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def begin(self, share: float, documents: int, tokens: int) -> None:
        """Says where an earlier start came to; `share` is that of the whole, 0 to 1."""
        self._first_share = self._share = share
        self._documents, self._tokens, self._earlier_tokens = documents, tokens, tokens

    def update(self, share: float, documents: int, tokens: int) -> None:
        """`share` of the whole is done; `documents` and `tokens` came to it since the last call."""
        self._share = share
        self._documents += documents
        self._tokens += tokens

    def line(self) -> str:
        elapsed = max(1e-9, time.monotonic() - self._start)
        parts = [
            f"{self._share:.0%}",
            f"{self._documents:,} documents",
            f"{self._tokens:,} tokens",
            f"{(self._tokens - self._earlier_tokens) / elapsed:,.0f} tokens/s",
        ]
        seconds_left = self._seconds_left(elapsed)
        if seconds_left is not None:
            parts.append(f"about {_duration(seconds_left)} left")
        return ", ".join([*parts, *filter(None, (source.status() for source in self._sources))])

    def _seconds_left(self, elapsed: float) -> float | None:
        """What the slower of the download and the tokenising will still take; None where it is not known."""
        downloads = [download for source in self._sources if (download := source.download())]
        busy = elapsed - sum(download.waited_s for download in downloads)
        done = self._share - self._first_share
        estimates = []
        if done > 0.002 and elapsed > 2:
            estimates.append(busy * (1 - self._share) / done)
        for download in downloads:
            if download.bytes_left:
                if not download.bytes_per_s:
                    return None
                estimates.append(download.bytes_left / download.bytes_per_s)
        return max(estimates, default=None)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._terminal:
            print(CLEAR, end="", file=sys.stderr, flush=True)

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S_ON_A_TERMINAL if self._terminal else _EVERY_S):
            line = self.line()
            if self._terminal:  # a line that is wrapped cannot be written over
                line = "\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
            else:
                line += "\n"
            sys.stderr.write(line)
            sys.stderr.flush()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
