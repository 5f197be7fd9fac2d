"""What is printed for people: nothing that a terminal would act on, and nothing that a program depends on."""

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CLEAR = "\r\x1b[K"  # on a terminal: back to the start of the line, which is emptied


def harmless(text: str, keep: str = "") -> str:
    """`text` without what a terminal would act on, such as ESC, carriage return or a change of direction: escaped.

    So are newlines and tabs, which lines don't hold, unless `keep` has them.
    """
    return "".join(
        char
        if char in keep or char.isprintable() or unicodedata.category(char) == "Zs"
        else char.encode("unicode_escape").decode()
        for char in text
    )


def say(line: str) -> None:
    """A line on stderr, which may hold names and messages that others chose.

    On a terminal it comes in place of the line of progress that may stand there.
    """
    with console_may_fail():
        begin = CLEAR if sys.stderr.isatty() else ""
        sys.stderr.write(begin + harmless(line, keep="\n\t") + "\n")  # at once: other threads write too
        sys.stderr.flush()


def now_and_then(every_seconds: float = 10.0) -> Callable[[str], None]:
    """A `say` for lines of progress: it passes over those that come sooner than `every_seconds` after the last one."""
    last = time.monotonic()

    def say_if_due(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            say(line)

    return say_if_due


@contextmanager
def console_may_fail() -> Iterator[None]:
    """Around what is printed on stderr: once that fails, nothing more is printed there, and the program goes on.

    The disk it goes to may be full, its terminal closed, or its pipe without a reader.
    """
    try:
        yield
    except OSError:
        # The interpreter would try again at its end, and answer with an exit code of its own.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
