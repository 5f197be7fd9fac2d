"""Making sure that what was written is on the disk."""

import os
import shutil
from pathlib import Path


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
