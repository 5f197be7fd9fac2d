"""How a command ends: the exit codes, the errors behind them, and their one way to the terminal."""

import os
import sys
from collections.abc import Callable

from src.utils.terminal import say

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_STORAGE = 4
EXIT_BUSY = 5
EXIT_STOPPED = 143
EXIT_INTERRUPTED = 130  # Ctrl-C in a command that has nothing to save


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
    """Another process holds the run directory."""

    exit_code = EXIT_BUSY


class PeerError(RuntimeError):
    """Another process failed and says why itself; this one ends as it does, in silence where it is foreseen."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(f"another process failed: {message}")
        self.exit_code = exit_code


def exit_with(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its code; an error that carries an `exit_code` is printed without a traceback."""
    code: int | None = 1
    try:
        code = main() or EXIT_DONE
    except SystemExit as exit:  # from a command-line parser
        _leave_exit_code(exit.code if isinstance(exit.code, int) else 1)
        raise
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        say("interrupted")
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            _leave_exit_code(1)
            raise
        if not isinstance(error, PeerError):
            rank = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
            say(f"{os.path.basename(sys.argv[0])}: error{rank}: {error}")
    sys.stdout.flush()
    _leave_exit_code(code)
    sys.exit(code)


def _leave_exit_code(code: int) -> None:
    """For the launcher: torchrun answers with 1 whatever its processes said. The first of them to end counts."""
    path = os.environ.get("EXIT_CODE_FILE")
    if path and os.path.exists(path) and os.path.getsize(path) == 0:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(code))
