"""A run's folder: claimed by one process at a time, never overwritten."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from src.utils.disk import check_writable, refuse_dangling, remedy, try_lock
from src.utils.errors import BusyError, StoppedError, StorageError
from src.utils.terminal import say

PATIENCE_S = 1.0  # with others that only ask, as `refuse_claimed` does
# With a process whose launcher is gone: it has been asked to stop, and finishes its step and its save.
ENDING_PATIENCE_S = 120.0


@contextmanager
def claimed(run_dir: Path, stop: Callable[[], object] = lambda: False) -> Iterator[None]:
    """Holds `run_dir`, making it if need be, until the block ends or the process dies; `claim_file` says who does.

    The lock lies beside the folder, so that the folder itself can be set aside. A holder that is about to end is waited
    for. Raises BusyError naming any other, StorageError where the folder cannot be written, and StoppedError once
    `stop()` is true in the wait.
    """
    lock = claim_file(run_dir)
    refuse_dangling(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        check_writable(run_dir)
        file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 (held open as long as the lock)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write in {run_dir}: {error.strerror or error}; {remedy(error)}") from error
    with file:
        _lock(run_dir, file, stop)
        with suppress(OSError):  # a full disk may not hold the name, but the lock holds
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **_launcher()}))
            file.flush()
        yield


def refuse_claimed(run_dir: Path) -> None:
    """Raises BusyError naming the holder where another process holds `run_dir`; leaves nothing behind.

    Waits for one that is about to end, as `claimed` does.
    """
    try:
        with open(claim_file(run_dir), "r+", encoding="utf-8") as file:
            _lock(run_dir, file, shared=True)
    except FileNotFoundError:
        pass
    except PermissionError as error:
        raise StorageError(f"cannot open {error.filename}: {error.strerror}; mend its permissions") from error


def claim_file(run_dir: Path) -> Path:
    """The file that is locked while a process holds `run_dir`, and names it."""
    return run_dir.with_name(f".{run_dir.name}.lock")


def _lock(run_dir: Path, file: IO[str], stop: Callable[[], object] = lambda: False, shared: bool = False) -> None:
    started, is_ending = time.monotonic(), False
    while not try_lock(file, shared):
        if not is_ending and (holder := _left_by_its_launcher(file)):
            is_ending = True
            say(
                f"process {holder} has lost its launcher and still holds {run_dir}: it finishes its step, saves and "
                f"ends; waiting for that, at most {ENDING_PATIENCE_S:g} s"
            )
        if stop():
            raise StoppedError("stopped on request before anything was trained")
        if time.monotonic() - started > (ENDING_PATIENCE_S if is_ending else 0 if shared else PATIENCE_S):
            raise _busy(run_dir, file)
        time.sleep(0.05)


def _launcher() -> dict[str, int]:
    """Its process id, where this process is asked to stop once it is gone (see handle_ddp)."""
    return {"launcher": os.getppid()} if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux" else {}


def _left_by_its_launcher(file: IO[str]) -> int | None:
    """The holder's process id, if it is one of this machine whose launcher is gone."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        pid, host, launcher = int(holder["pid"]), holder["host"], holder["launcher"]
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return pid if host == socket.gethostname() and parent != launcher else None


def _busy(run_dir: Path, lock: IO[str]) -> BusyError:
    lock.seek(0)
    return BusyError(
        f"another process is training in {run_dir}: {lock.read() or 'holder unknown'}; "
        "wait for it, stop it, or choose another --run-name"
    )
