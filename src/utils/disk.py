"""Files that stay: on the disk when they should be, and moved out of the way rather than lost."""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import IO

from src.utils.errors import StorageError


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes free where `path` lies or would lie."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())).free


def size_text(n_bytes: float) -> str:
    """`n_bytes` in a unit that suits it, such as 2.1 GB (10^9 bytes)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1_000:
            return f"{n_bytes:.{0 if unit == 'bytes' else 1}f} {unit}"
        n_bytes /= 1_000
    return f"{n_bytes:.1f} TB"


def fingerprint(path: Path) -> dict[str, int | str]:
    """A file's size and hash, as {"bytes": ..., "sha256": ...}. Raises OSError."""
    with open(path, "rb") as file:
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


def try_lock(file: IO) -> bool:
    """Locks an open file until it is closed or the process dies; False if another process holds it.

    Raises StorageError where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(f"cannot lock {file.name}: {error.strerror}; use a file system that has locks") from error
    return True
