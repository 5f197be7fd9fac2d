"""How a command ends: the exit codes, the errors behind them, and their one way to the terminal."""

import os
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

EXIT_DONE = 0
EXIT_FAILED = 1  # an error nobody foresaw; starting again may help
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_STORAGE = 4
EXIT_BUSY = 5
EXIT_STOPPED = 143
EXIT_INTERRUPTED = 130  # Ctrl-C in a command that has nothing to save
# Another start would end in the same way, or was not wanted. Other ends of a run may be transient.
FINAL_CODES = (EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_STORAGE, EXIT_BUSY, EXIT_STOPPED)


class UserError(ValueError):
    """Bad input: the message says what, where, the value found, and what to do."""

    exit_code = EXIT_BAD_INPUT


class NonFiniteError(ArithmeticError):
    """Training produced infinities or NaN for too many steps in a row."""

    exit_code = EXIT_NON_FINITE


class StorageError(OSError):
    """A file could not be written: no space, no permission, a broken disk."""

    exit_code = EXIT_STORAGE


class BusyError(RuntimeError):
    """Another process holds the folder of the run or of the dataset."""

    exit_code = EXIT_BUSY


class StoppedError(RuntimeError):
    """A request to stop came where there was nothing to finish."""

    exit_code = EXIT_STOPPED


class LostPeerError(RuntimeError):
    """Another process ended, or does not answer; why is for that one to say."""

    exit_code = EXIT_FAILED


class PeerError(RuntimeError):
    """Another process failed and says why itself; this one ends as it does, in silence."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(f"another process failed: {message}")
        self.exit_code = EXIT_FAILED if exit_code is None else exit_code


def exit_with(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its code; an error that carries an `exit_code` is printed without a traceback."""
    code = EXIT_FAILED
    try:
        code = main() or EXIT_DONE
    except SystemExit as exit:  # from a command-line parser
        _leave_exit_code(exit.code if isinstance(exit.code, int) else EXIT_FAILED)
        raise
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        say("interrupted")
    except PeerError as error:
        code = error.exit_code
    except Exception as error:
        code = getattr(error, "exit_code", EXIT_FAILED)
        if hasattr(error, "exit_code"):
            rank = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
            say(f"{os.path.basename(sys.argv[0])}: error{rank}: {error}")
        else:
            with console_may_fail():
                traceback.print_exc()
    _leave_exit_code(code)
    with suppress(OSError):  # whoever reads it may be gone
        sys.stdout.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # PyTorch's gloo threads take Python's lock once more, and abort the process if it is shutting down (LOG.md).
        os._exit(code)
    sys.exit(code)


def recorded_exit_code() -> int | None:
    """The final exit code that a process of this machine left in EXIT_CODE_FILE, if any."""
    path = os.environ.get("EXIT_CODE_FILE")
    if not path or not os.path.exists(path):
        return None
    with open(path, encoding="ascii") as file:
        return int(file.read() or 0) or None


def _leave_exit_code(code: int) -> None:
    """For the launcher: torchrun answers with 1 whatever its processes said. The first final code counts.

    Written before this process ends, so that those who fail because it ended find the file written.
    """
    if code in FINAL_CODES and "EXIT_CODE_FILE" in os.environ:
        with suppress(OSError):  # on the very disk that is full, perhaps
            if recorded_exit_code() is None:
                with open(os.environ["EXIT_CODE_FILE"], "w", encoding="ascii") as file:
                    file.write(str(code))


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
