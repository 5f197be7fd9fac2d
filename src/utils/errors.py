"""Exit codes, the errors behind them, and how messages and results are printed."""

import io
import json
import os
import re
import ssl
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

HUB_TIMEOUT_SECONDS = 5
EXIT_DONE = 0
EXIT_FAILED = 1  # an unexpected error; a restart may help
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_STORAGE = 4
EXIT_BUSY = 5
EXIT_STOPPED = 143
EXIT_INTERRUPTED = 130  # Ctrl-C in a command that has nothing to save
# A restart would end in the same way, or is not wanted.
FINAL_CODES = (EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_STORAGE, EXIT_BUSY, EXIT_STOPPED)

CLEAR = "\r\x1b[K"  # clears a terminal's line


class UserError(ValueError):
    """Bad input. The message names the place, the value found and a remedy."""

    exit_code = EXIT_BAD_INPUT


class NonFiniteError(ArithmeticError):
    """Training produced infinities or NaN for too many steps in a row."""

    exit_code = EXIT_NON_FINITE


class StorageError(OSError):
    """A file that cannot be written: no space, no permission, a broken disk."""

    exit_code = EXIT_STORAGE


class BusyError(RuntimeError):
    """Another process holds the folder of the run or of the dataset."""

    exit_code = EXIT_BUSY


class StoppedError(RuntimeError):
    """A request to stop that came while there was nothing to save."""

    exit_code = EXIT_STOPPED


class LostPeerError(RuntimeError):
    """Another process ended or hangs; its own message has the cause."""

    exit_code = EXIT_FAILED


class PeerError(RuntimeError):
    """Another process failed and prints the cause; this one ends with the same exit code and prints nothing."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(f"another process failed: {message}")
        self.exit_code = EXIT_FAILED if exit_code is None else exit_code


def exit_with(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its code. An error that has an `exit_code` is printed without a traceback."""
    patient_streams()
    try:
        code = main() or EXIT_DONE
    except SystemExit as exit:  # from a command-line parser
        code = exit.code if isinstance(exit.code, int) else EXIT_FAILED if exit.code else EXIT_DONE
        if isinstance(exit.code, str):
            say(exit.code)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        say("interrupted")
    except Exception as error:
        code = getattr(error, "exit_code", EXIT_FAILED)
        if not hasattr(error, "exit_code"):
            traceback.print_exc()
        elif not isinstance(error, PeerError):
            rank = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
            say(f"{os.path.basename(sys.argv[0])}: error{rank}: {error}")
    if path := os.environ.get("EXIT_CODE_FILE"):  # for the launcher: torchrun itself exits with 1 after any failure
        with suppress(OSError), open(path, "a", encoding="ascii") as file:  # the disk may be full
            file.write(f"{code}\n")
    sys.stdout.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # gloo's threads take the GIL again, and abort a process that is shutting down (LOG.md).
        os._exit(code)
    sys.exit(code)


def patient_streams() -> None:
    """Makes stdout and stderr drop what cannot be written and escape what their encoding lacks.

    The disk behind them may be full, or their terminal or pipe closed. Neither may change a program's result.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and isinstance(stream.buffer, (io.BufferedWriter, io.FileIO)):
            buffer = io.BufferedWriter(_Patient(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True))


class _Patient(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)  # None: a terminal that is blocked
        except OSError:
            return len(data)  # buffered data would fail again when the interpreter exits, and change the exit code


def cause_of(error: BaseException) -> str:
    """The cause of an error that a library or Python raised, without Python's jargon."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, KeyError):
        return f"{error.args[0] if error.args else 'a field'} is missing"
    if match := re.search(r"unexpected keyword argument '(\w+)'|required positional arguments?: (.*)", str(error)):
        return f"the field {match[1]} is unknown" if match[1] else f"fields are missing: {match[2]}"
    if isinstance(error, (TypeError, AttributeError, IndexError)):  # in a file's fields
        return "a field is missing or of a wrong type"
    return str(error)


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors of the hub's client: no answer, a refusal, a malformed answer, a proxy without its package."""
    import httpx2  # its import takes a third of a second, and most commands don't use the hub

    return httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError, ImportError


def hub_answers() -> bool:
    """Return True if an HTTP server answers at the hub's address, within seconds."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except hub_errors():
        return False
    return True


def connection_advice() -> str:
    """Return advice for a hub that cannot be reached, naming the environment variable that is the likely cause."""
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if value := os.environ.get(name):
            try:
                kind = "capath" if os.path.isdir(value) else "cafile"
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(**{kind: value})
            except OSError as error:  # SSLError is one
                return f"{name} is {value!r}: {error.strerror}. Unset it, or set it to a file of certificates"
    scheme = os.environ.get("HF_ENDPOINT", "https:").partition(":")[0]
    for name, value in os.environ.items():
        if value and name.lower() in ("all_proxy", f"{scheme}_proxy"):
            proxy = f"{name} is {value.rpartition('@')[2]!r}"  # without a password
            if value.lower().startswith("socks") and not find_spec("socksio"):
                return f"{proxy}, which needs a package. Run pip install socksio, or unset {name}"
            return f"{proxy}. Check that this proxy works, or unset {name}"
    return "Check the connection, or name a mirror in HF_ENDPOINT"


def hub_failure(action: str, error: Exception, remedy: str) -> UserError:
    """Return the error for a failed `action`, such as "list X at". `remedy` is for a hub that refuses."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    advice = remedy if isinstance(error, HfHubHTTPError) else connection_advice()
    return UserError(f"Cannot {action} {constants.ENDPOINT}: {hub_reason(error)}. {advice}.")


def hub_reason(error: Exception) -> str:
    """Describe an error in one short line, with the hub's own message if it refused."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        message = f": {error.server_message}" if error.server_message else ""
        text = f"HTTP {error.response.status_code} {error.response.reason_phrase}{message}"
    else:
        text = f"{type(error).__name__}: {str(error).strip() or 'no details'}"
    return text.splitlines()[0][:200].rstrip(".")


def recorded_exit_code() -> int | None:
    """The exit code of a run, from the codes in EXIT_CODE_FILE; None if no process left one.

    The first final code counts, because its end may make other processes fail; otherwise the highest.
    """
    try:
        with open(os.environ.get("EXIT_CODE_FILE", ""), encoding="ascii") as file:
            codes = [int(line) for line in file]
    except (OSError, ValueError):
        return None
    return next((code for code in codes if code in FINAL_CODES), max(codes, default=None))


def harmless(text: str, keep: str = "") -> str:
    """Escapes the characters that a terminal would act on (ESC, newlines, text direction), except those in `keep`."""
    return "".join(
        char
        if char in keep or char.isprintable() or unicodedata.category(char) == "Zs"
        else char.encode("unicode_escape").decode()
        for char in text
    )


def print_result(result: dict[str, Any], text: str = "") -> None:
    """Prints a command's result on stdout: `text`, if any, on a terminal; otherwise `result` as JSON, the last line."""
    if not sys.stdout.isatty():
        print(json.dumps(result))
    elif text:
        print(harmless(text, keep="\n\t"))


def say(line: str) -> None:
    """Prints a line on stderr, over a progress line if there is one. Escapes control characters."""
    begin = CLEAR if sys.stderr.isatty() else ""
    sys.stderr.write(begin + harmless(line, keep="\n\t") + "\n")  # one call: other threads write too
    sys.stderr.flush()


def now_and_then(every_seconds: float = 10.0) -> Callable[[str], None]:
    """A `say` for progress that drops a line within `every_seconds` of the last one."""
    last = time.monotonic()

    def say_if_due(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            say(line)

    return say_if_due
