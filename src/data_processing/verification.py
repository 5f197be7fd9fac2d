"""Damaged data is refused before training: every byte of a dataset is read and hashed, but not at every start.

The stamp, .verified.json in the dataset's folder, says which files were found to be what the manifest says: their
sizes, inodes and times. A shard whose file is still that one is not read again; any other is, in full. Writing to
a file, setting its times and renaming another over it all change its inode or its ctime, which nobody can set.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from src import available_cores
from src.data_processing.shards import REPAIR, TOKEN_DTYPE, Manifest, Shard, shard_fault
from src.utils.errors import StoppedError, StorageError, UserError, say

STAMP = ".verified.json"
STAMP_FORMAT = 1
REPORT_EVERY_S = 5.0
MAX_THREADS = 8  # a core hashes more than 1 GB/s, so these are ahead of most disks
_SECONDS_BYTES = 256 << 20  # a slow disk or network brings so much in a few seconds


def ensure_verified(
    folder: Path, manifest: Manifest, trust_stamp: bool = True, stop: Callable[[], object] = lambda: False
) -> None:
    """Raises UserError naming every fault that `find_faults` finds, and StoppedError as it does."""
    _refuse(folder, manifest, find_faults(folder, manifest, trust_stamp, stop))


def check_in_seconds(folder: Path, manifest: Manifest) -> int:
    """As `ensure_verified` where it is quick, else header and length of every shard; returns the bytes left to read."""
    known = _vouched_for(folder, manifest)
    unread = sum(shard.tokens * TOKEN_DTYPE.itemsize for shard in manifest.shards if shard.file not in known)
    if unread <= _SECONDS_BYTES:
        ensure_verified(folder, manifest)
        return 0
    found = ((number, shard_fault(folder, shard, manifest.n_vocab)) for number, shard in enumerate(manifest.shards))
    _refuse(folder, manifest, {number: fault for number, fault in found if fault})
    return unread


def _refuse(folder: Path, manifest: Manifest, faults: dict[int, str]) -> None:
    if faults:
        found = "\n".join(f"  {fault}" for fault in faults.values())
        raise UserError(
            f"{len(faults)} of {len(manifest.shards)} shards of {folder} are not as prepared:\n{found}\n"
            f"put back the files as they were, or make them anew with: {REPAIR} '{folder}'"
        )


def find_faults(
    folder: Path, manifest: Manifest, trust_stamp: bool = True, stop: Callable[[], object] = lambda: False
) -> dict[int, str]:
    """What is wrong with each shard that is not as prepared, with path, expected and actual, by its number.

    Reads the shards that the stamp does not vouch for, and stamps the sound ones. stderr gets a line of progress every
    few seconds, and one where the stamp cannot be written, which only makes the next start slower. Raises StoppedError
    once `stop()` is true, which several threads ask; sound shards that were read by then are stamped.
    """
    known = _vouched_for(folder, manifest) if trust_stamp else {}
    unread = [number for number, shard in enumerate(manifest.shards) if shard.file not in known]
    if not unread:
        return {}
    faults: dict[int, str] = {}
    last = time.monotonic()
    try:
        with closing(_read_all(folder, manifest, unread, stop)) as shards_read:
            for done, (number, entry, fault) in enumerate(shards_read, start=1):
                if fault:
                    faults[number] = fault
                else:
                    known[manifest.shards[number].file] = entry
                if time.monotonic() - last >= REPORT_EVERY_S:
                    last = time.monotonic()
                    say(f"verifying {folder}: {done} of {len(unread)} shards read")
                    with suppress(StorageError):  # said at the end
                        _write_stamp(folder, known)  # a start that is killed here is not begun again
    finally:
        try:
            _write_stamp(folder, known)
        except StorageError as error:
            say(f"the next start will read the dataset again: {error}")
    return dict(sorted(faults.items()))


def _read_all(
    folder: Path, manifest: Manifest, numbers: Sequence[int], stop: Callable[[], object]
) -> Generator[tuple[int, dict[str, Any] | None, str | None], None, None]:
    """Number, entry and fault of each shard, as they are read; then StoppedError if some were not, being stopped."""
    leaving = threading.Event()
    pool = ThreadPoolExecutor(min(MAX_THREADS, available_cores()))

    def read(number: int) -> tuple[int, dict[str, Any] | None, str | None]:
        shard = manifest.shards[number]
        entry = _entry(folder, shard, manifest)  # as it was before its content was read
        fault = shard_fault(
            folder,
            shard,
            manifest.n_vocab,
            full=True,
            stop=lambda: leaving.is_set() or stop(),
            end_of_text=manifest.end_of_text,
        )
        return number, entry, fault

    is_stopped = False
    try:
        for job in as_completed([pool.submit(read, number) for number in numbers]):
            try:
                yield job.result()
            except StoppedError:
                is_stopped = True  # the others end as soon, or have just been read
    finally:
        leaving.set()
        pool.shutdown(cancel_futures=True)
    if is_stopped:
        raise StoppedError("stopped on request before anything was trained")


def _vouched_for(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Entries by file name, of the shards that are the files that the stamp says were sound."""
    stamped = _read_stamp(folder)
    return {file: entry for file, entry in _entries(folder, manifest).items() if stamped.get(file) == entry}


def _entries(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Entries by file name, of the shards that are there."""
    found = {shard.file: _entry(folder, shard, manifest) for shard in manifest.shards}
    return {file: entry for file, entry in found.items() if entry}


def _entry(folder: Path, shard: Shard, manifest: Manifest) -> dict[str, Any] | None:
    """What was asked of the shard, and which file answered; None where there is none."""
    try:
        found = os.stat(folder / shard.file)
    except OSError:
        return None
    return {
        "sha256": shard.sha256,
        "documents": shard.documents,
        "n_vocab": manifest.n_vocab,
        "end_of_text": manifest.end_of_text,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
    }


def _read_stamp(folder: Path) -> dict[str, Any]:
    """Entries by file name; none where the stamp is absent, damaged or of another format."""
    try:
        content = json.loads((folder / STAMP).read_bytes())
        return dict(content["shards"]) if content["format"] == STAMP_FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_stamp(folder: Path, entries: dict[str, Any]) -> None:
    """Replaces the stamp at once. Not synced: a stamp that a power cut damages counts as absent."""
    temporary = folder / f"{STAMP}.tmp"
    try:
        temporary.write_text(json.dumps({"format": STAMP_FORMAT, "shards": entries}, indent=1) + "\n")
        os.replace(temporary, folder / STAMP)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(f"cannot write {folder / STAMP}: {error.strerror or error}") from error
