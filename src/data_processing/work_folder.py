"""The folder inside a dataset's for unfinished work: held by one process at a time, gone on with or cleaned up."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from src.data_processing.document_sort import has_runs
from src.data_processing.shards import SHARD_NAME
from src.utils.errors import BusyError, StorageError, UserError
from src.utils.files import replacing, storage_errors, try_lock

WORK = ".preparing"  # there while a preparation goes on, and after one was stopped
PLAN = "plan.json"
DOWNLOADS = "downloads"
_LOCK = "lock"


@contextmanager
def claimed_work(folder: Path, keep_unfinished: bool = True) -> Iterator[Path]:
    """Holds `folder`, made if need be, until the block ends; gives the folder inside it for unfinished work.

    That is deleted when the block ends well. Where it fails, work that is worth going on with stays, unless
    `keep_unfinished` is False. Raises StorageError where the folder cannot be written, and BusyError where another
    process holds it.
    """
    work = folder / WORK
    with storage_errors(folder):
        made = not folder.exists()
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / _LOCK, "wb")  # noqa: SIM115 (held open as long as the lock)
    with lock:
        if not try_lock(lock) or not _is_there(lock, work / _LOCK):  # its last holder may have deleted it
            raise BusyError(f"another process is preparing {folder}; wait for it, or choose another --out")
        try:
            yield work
        except BaseException:
            with suppress(OSError):  # what failed matters more than what is left behind
                if not (keep_unfinished and _is_begun(work)):
                    shutil.rmtree(work)
                    if made and not any(folder.iterdir()):
                        folder.rmdir()
            raise
        with storage_errors(work, "delete"):
            shutil.rmtree(work)


def _is_begun(work: Path) -> bool:
    """Whether `work` holds anything that took time to make."""
    return has_runs(work) or (work / DOWNLOADS).exists()


def remove_leftovers(folder: Path) -> None:
    """Deletes the unfinished work beside a finished dataset: its process was stopped between its last two steps."""
    if (folder / WORK).exists():
        with suppress(BusyError, StorageError), claimed_work(folder):
            pass


def start_over(folder: Path, work: Path) -> None:
    """Removes what an earlier preparation left, but not shards whose origin is unknown: UserError for those.

    Raises StorageError.
    """
    plan = work / PLAN
    shards = [path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name.removesuffix(".tmp"))]
    if plan.exists():
        with replacing(plan) as file:  # or, after a kill further down, that plan would be gone on with
            file.write(b"{}")
    elif shards:
        raise UserError(
            f"{folder} holds {len(shards)} shards without a manifest, such as {min(shards).name}, whose preparation "
            "is unknown; move them away or choose another --out"
        )
    for path in shards:
        with storage_errors(path, "delete"):
            path.unlink()
    empty(work, keep=(plan.name,))


def empty(work: Path, keep: Sequence[str] = ()) -> None:
    """Deletes what is in the folder for unfinished work, but the lock and `keep`. Raises StorageError."""
    with storage_errors(work, "delete what is in"):
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (_LOCK, *keep):
                path.unlink()


def _is_there(lock: IO, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
