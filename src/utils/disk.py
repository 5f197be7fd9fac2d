"""Files that stay: on the disk when they should be, and moved out of the way rather than lost."""

import errno
import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from src.utils.errors import StorageError

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
