"""Files that survive a crash, errors that say what to do, and the lock on a run's folder."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from src.utils.errors import BusyError, StoppedError, StorageError, UserError, say

MAX_JSON_BYTES = 200_000_000  # a manifest of 100,000 shards has 30 MB
PATIENCE_S = 20.0  # for another holder: if its launcher was killed, it still finishes its step and saves


@contextmanager
def storage_errors(path: Path, action: str = "write", needed_bytes: int = 0) -> Iterator[None]:
    """Turns an OSError in the block into a StorageError that names `path` and the cause.

    `needed_bytes`: disk space that the rest of the action takes, if known.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        full = needed_bytes and error.errno in (errno.ENOSPC, errno.EDQUOT)
        needed = f", {needed_bytes:,} bytes more are needed and {free_bytes(path):,} are free" if full else ""
        raise StorageError(
            f"Cannot {action} {path}: {error.strerror or error}{needed}. Fix that and rerun, or use another folder."
        ) from error


@contextmanager
def replacing(path: Path, expected_bytes: int = 0) -> Iterator[BinaryIO]:
    """Yields a file that is renamed to `path` when the block succeeds: complete, and safe from a power cut.

    Until then it is called `path` with .tmp appended; a failure removes it. Raises StorageError.
    """
    temporary = path.with_name(path.name + ".tmp")
    with storage_errors(path, needed_bytes=expected_bytes):
        # Removed and created again, because opening a leftover link would empty the file that it points to.
        with storage_errors(temporary, "remove"):
            temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder that is renamed to `path` when the block succeeds and removed if it fails.

    Raises UserError if `path` exists, StorageError, and the block's errors.
    """
    with storage_errors(path):
        if os.path.lexists(path):
            raise UserError(f"Cannot write {path}: it exists. Choose another name, or move it away.")
        temporary = path.absolute().with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(path)
            sync(temporary.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the entries of a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> IO[bytes]:
    """Opens a file unbuffered. Raises OSError, and StorageError for a FIFO, folder or device."""
    if flags & os.O_NOFOLLOW and path.is_symlink():
        raise StorageError(f"Cannot open {path}: it is a link. Move it away.")
    # Without O_NONBLOCK, opening a FIFO waits for another process.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(f"Cannot open {path}: it is not a regular file. Move it away.")
    return os.fdopen(descriptor, "rb+" if flags & os.O_RDWR else "rb", buffering=0)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises UserError for what `parse_json` refuses, OSError if it cannot be read."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"Cannot read {path}: {error}. Restore the file.") from error


def parse_json(text: bytes) -> dict[str, Any]:
    """The content of a JSON object. Raises ValueError.

    Also refuses what Python's parser accepts but later code cannot handle: NaN, numbers that no float can hold, lone
    surrogates, deep nesting, and repeated keys, where one value would be lost.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
    try:
        content = json.loads(text, parse_int=_integer, object_pairs_hook=_without_repeats)
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    return content


def _integer(digits: str) -> int | float:
    # A float beyond 40 digits: Python refuses to parse or print integers with thousands of digits.
    return int(digits) if len(digits) <= 40 else float(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError(f"it has a key twice among {str(list(content))[:80]}")
    return content


def existing_folder(path: Path) -> Path:
    """The folder `path`, or its nearest parent that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.isdir(folder))


def refuse_dangling(path: Path) -> None:
    """Raises StorageError if `path` or a parent is a file or a dangling link, such as one to an unmounted disk."""
    for place in (path, *path.parents):
        if os.path.isfile(place):
            raise StorageError(f"Cannot use {place}: it is a file, not a folder. Move it away, or use another folder.")
        if place.is_symlink() and not place.exists():
            raise StorageError(
                f"Cannot use {place}: it is a link to {place.readlink()}, which does not exist. Mount its disk."
            )


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds `path` or would hold it."""
    return shutil.disk_usage(existing_folder(path)).free


def bytes_below(folder: Path) -> int:
    """Total bytes of all files in `folder` and its subfolders; 0 for a missing folder."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # removed by another process
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def check_writable(folder: Path) -> None:
    """Writes, syncs and deletes a file in `folder`. Raises StorageError."""
    with storage_errors(folder, "write in"), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(b"x")
        os.fsync(file.fileno())


def size_text(n_bytes: float) -> str:
    """`n_bytes` in a readable unit, such as 2.1 GB (10^9 bytes)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1_000:
            return f"{n_bytes:.{0 if unit == 'bytes' else 1}f} {unit}"
        n_bytes /= 1_000
    return f"{n_bytes:.1f} TB"


def fingerprint(path: Path, from_disk: bool = False) -> dict[str, int | str]:
    """A file's size and hash as {"bytes": ..., "sha256": ...}. Raises OSError.

    `from_disk` drops the system's cached copy first, so that the hash checks the disk.
    """
    with open_regular(path) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def identity(path: Path) -> dict[str, int]:
    """Size, times and inode of a file, which change when its content does. Empty for a missing file."""
    with suppress(OSError):
        file = os.stat(path)
        times = {"mtime_ns": file.st_mtime_ns, "ctime_ns": file.st_ctime_ns}
        return {"size": file.st_size, **times, "inode": file.st_ino}
    return {}


def lies_in(folder: Path, name: str) -> bool:
    """True if `name` is a plain name in `folder`, not a path elsewhere or a link that leads out of it."""
    if "\0" in name or Path(name).name != name:
        return False
    return (folder / name).resolve().parent == folder.resolve()


def move(path: Path, target: Path) -> Path:
    """Renames `path` and returns `target`. Raises StorageError."""
    with storage_errors(path, "rename"):
        return path.rename(target)


def set_aside(path: Path) -> Path:
    """Renames `path` to its name with .set-aside-N, the first free N, and returns that. Raises StorageError."""
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.name}.set-aside-{number}")):
        number += 1
    return move(path, target)


def try_lock(file: IO) -> bool:
    """Locks an open file until it is closed or the process dies; False if another process holds it.

    Raises StorageError if the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(f"Cannot lock {file.name}: {error.strerror}. Use a file system that has locks.") from error
    return True


@contextmanager
def claimed(run_dir: Path, stop: Callable[[], object] = lambda: False) -> Iterator[None]:
    """Creates `run_dir` if needed and holds it until the block ends or the process dies.

    Waits PATIENCE_S for another holder. Raises BusyError naming it, StorageError, or StoppedError once `stop()` is
    true.
    """
    refuse_dangling(run_dir)
    with storage_errors(run_dir, "write in"):
        run_dir.mkdir(parents=True, exist_ok=True)
    check_writable(run_dir)
    with _locked(run_dir, os.O_CREAT, stop) as lock:
        with suppress(OSError):  # on a full disk the holder's name may be missing, but the lock works
            lock.truncate(0)
            os.pwrite(lock.fileno(), json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield


def refuse_claimed(run_dir: Path) -> None:
    """Raises BusyError naming the holder if another process holds `run_dir` for longer than PATIENCE_S."""
    if os.path.lexists(claim_file(run_dir)):
        with _locked(run_dir):
            pass


def claim_file(run_dir: Path) -> Path:
    """The lock file of `run_dir`, which names the holder. It is outside the folder, so that the folder can be moved."""
    return run_dir.with_name(f".{run_dir.name}.lock")


@contextmanager
def _locked(run_dir: Path, flags: int = 0, stop: Callable[[], object] = lambda: False) -> Iterator[IO[bytes]]:
    path = claim_file(run_dir)
    with storage_errors(path, "open"):
        # O_NOFOLLOW, so that nothing is written to a file that a link points to.
        lock = open_regular(path, os.O_RDWR | os.O_NOFOLLOW | flags)
    with lock:
        deadline = time.monotonic() + PATIENCE_S
        if not try_lock(lock):
            say(f"another process holds {run_dir}: waiting up to {PATIENCE_S:g} s for it to end")
        while not try_lock(lock):
            holder = os.pread(lock.fileno(), 1000, 0).decode(errors="replace") or "holder unknown"
            if stop():
                raise StoppedError("Stopped on request before the first step.")
            if time.monotonic() > deadline:
                raise BusyError(
                    f"Cannot use this run name: another process is training in {run_dir}: {holder}. Wait for it, stop "
                    "it, or choose another --run-name."
                )
            time.sleep(0.05)
        yield lock
