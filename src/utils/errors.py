"""How a command ends: the exit codes, the errors behind them, and their one way to the terminal."""

import os
import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_STORAGE = 4
EXIT_BUSY = 5
EXIT_STOPPED = 143


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


def exit_with(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its code; an error that carries an `exit_code` is printed without a traceback."""
    try:
        code = main() or EXIT_DONE
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("interrupted", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(code)
