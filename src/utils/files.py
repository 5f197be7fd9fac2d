"""Files that stay: on the disk when they should be, and moved out of the way rather than lost."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from src.utils.errors import BusyError, StoppedError, StorageError, say

REMEDIES = {  # by the error's number
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "mend the permissions"),
    errno.EISDIR: "move the folder of that name away",
    errno.ENOENT: "bring it back",
    errno.EROFS: "make the disk writable",
    errno.EIO: "see to the disk, which may be failing",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.ENFILE, errno.EMFILE), "close files, or raise the limit of open ones (ulimit -n)"),
}


@contextmanager
def storage_errors(path: Path, action: str = "write", needed_bytes: int = 0) -> Iterator[None]:
    """An OSError in the block becomes a StorageError that says what cannot be done with `path` and what to do.

    `needed_bytes`: of disk, where it is known what the rest of the action takes.
    """
    try:
        yield
    except StorageError:
        raise
    except (NotADirectoryError, FileExistsError) as error:
        raise StorageError(
            f"cannot {action} {path}: {error.strerror}; a file lies where a folder should be; choose another folder"
        ) from error
    except OSError as error:
        full = needed_bytes and error.errno in (errno.ENOSPC, errno.EDQUOT)
        needed = f"; {needed_bytes:,} bytes more are needed, {free_bytes(path):,} are free" if full else ""
        raise StorageError(
            f"cannot {action} {path}: {error.strerror or error}{needed}; {remedy(error)}, and the same command goes on "
            "from here; or choose another folder"
        ) from error


def remedy(error: OSError) -> str:
    """What a person can do about an error of the file system."""
    return REMEDIES.get(error.errno or 0, "mend that")


@contextmanager
def replacing(path: Path, expected_bytes: int = 0) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the block ends well: complete, and on the disk.

    Until then it is `path` with .tmp appended, which a failure removes. An OSError becomes a StorageError.
    """
    temporary = path.with_name(path.name + ".tmp")
    with storage_errors(path, needed_bytes=expected_bytes):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_folder(path: Path) -> Path:
    """The folder `path`, or the nearest one above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.isdir(folder))


def refuse_dangling(path: Path) -> None:
    """Raises StorageError where `path` or a folder above it is a link to nothing, as where a disk is not mounted."""
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            raise StorageError(
                f"{link} is a link to {link.readlink()}, which is not there; mount its disk, or remove it"
            )


def free_bytes(path: Path) -> int:
    """Bytes free where `path` lies or would lie."""
    return shutil.disk_usage(existing_folder(path)).free


def bytes_below(folder: Path) -> int:
    """Bytes of all files in `folder` and below it; 0 where there is none."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # removed meanwhile
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def check_writable(folder: Path) -> None:
    """Writes, syncs and removes a file in `folder`. Raises StorageError."""
    probe = folder / f".write-test-{socket.gethostname()}-{os.getpid()}"
    try:
        with open(probe, "xb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        raise StorageError(
            f"cannot write in {folder}: {error.strerror or error}; {remedy(error)}, or set TEMP_DATA_DIR to another "
            "disk"
        ) from error


def size_text(n_bytes: float) -> str:
    """`n_bytes` in a unit that suits it, such as 2.1 GB (10^9 bytes)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1_000:
            return f"{n_bytes:.{0 if unit == 'bytes' else 1}f} {unit}"
        n_bytes /= 1_000
    return f"{n_bytes:.1f} TB"


def fingerprint(path: Path, from_disk: bool = False) -> dict[str, int | str]:
    """A file's size and hash, as {"bytes": ..., "sha256": ...}. Raises OSError.

    `from_disk`: where the system can forget what it keeps of the file in memory, so that the disk has to answer.
    """
    with open(path, "rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def lies_in(folder: Path, name: str) -> bool:
    """Whether `name` names something right in `folder`: no path to elsewhere, and no link that leads out of it."""
    if "\0" in name or Path(name).name != name:
        return False
    return (folder / name).resolve().parent == folder.resolve()


def move(path: Path, target: Path) -> Path:
    """Renames `path`; returns `target`. Raises StorageError."""
    try:
        return path.rename(target)
    except OSError as error:
        raise StorageError(f"cannot rename {path} to {target.name}: {error.strerror}; mend the permissions") from error


def set_aside(path: Path) -> Path:
    """Renames `path` to its name with .set-aside-N, the first that is free; returns that. Raises StorageError."""
    number = 1
    while (target := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    return move(path, target)


def try_lock(file: IO, shared: bool = False) -> bool:
    """Locks an open file until it is closed or the process dies; False if another process holds it.

    Several may hold it `shared`, while none has it alone. Raises StorageError where the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(f"cannot lock {file.name}: {error.strerror}; use a file system that has locks") from error
    return True


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
