"""A run's folder: claimed by one process at a time, never overwritten."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from src.utils.disk import check_writable, try_lock
from src.utils.errors import BusyError, StorageError


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Holds `run_dir`, making it if need be, until the block ends or the process dies; `claim_file` says who does.

    The lock lies beside the folder, so that the folder itself can be set aside. Raises BusyError naming the
    holder, StorageError where the folder cannot be written.
    """
    lock = claim_file(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        check_writable(run_dir)
        file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 (held open as long as the lock)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write in {run_dir}: {error.strerror or error}; mend its permissions or free space"
        ) from error
    with file:
        patience = time.monotonic() + 1  # with others that only ask, as `refuse_claimed` does
        while not try_lock(file):
            if time.monotonic() > patience:
                raise _busy(run_dir, file)
            time.sleep(0.05)
        with suppress(OSError):  # a full disk may not hold the name, but the lock holds
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
        yield


def refuse_claimed(run_dir: Path) -> None:
    """Raises BusyError naming the holder where another process holds `run_dir`; leaves nothing behind."""
    try:
        with open(claim_file(run_dir), "r+", encoding="utf-8") as file:
            if not try_lock(file, shared=True):
                raise _busy(run_dir, file)
    except FileNotFoundError:
        pass
    except PermissionError as error:
        raise StorageError(f"cannot open {error.filename}: {error.strerror}; mend its permissions") from error


def claim_file(run_dir: Path) -> Path:
    """The file that is locked while a process holds `run_dir`, and names it."""
    return run_dir.with_name(f".{run_dir.name}.lock")


def _busy(run_dir: Path, lock: IO[str]) -> BusyError:
    lock.seek(0)
    return BusyError(
        f"another process is training in {run_dir}: {lock.read() or 'holder unknown'}; "
        "wait for it, stop it, or choose another --run-name"
    )
