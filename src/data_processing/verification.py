"""Damaged data is refused before training: every byte of a dataset is read and hashed, but not at every start.

The stamp, .verified.json in the dataset's folder, says which files were found to be what the manifest says: their
sizes, inodes and times. A shard whose file is still that one is not read again; any other is, in full. Writing to
a file, setting its times and renaming another over it all change its inode or its ctime, which nobody can set.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.data_processing.shards import REPAIR, Manifest, Shard, shard_fault
from src.utils.cores import available_cores
from src.utils.errors import StorageError, UserError
from src.utils.terminal import say

STAMP = ".verified.json"
STAMP_FORMAT = 1
REPORT_EVERY_S = 5.0
MAX_THREADS = 8  # a core hashes more than 1 GB/s, so these are ahead of most disks


def ensure_verified(folder: Path, manifest: Manifest, trust_stamp: bool = True) -> None:
    """Raises UserError naming every fault that `find_faults` finds."""
    if faults := find_faults(folder, manifest, trust_stamp):
        found = "\n".join(f"  {fault}" for fault in faults.values())
        raise UserError(
            f"{len(faults)} of {len(manifest.shards)} shards of {folder} are not as prepared:\n{found}\n"
            f"put back the files as they were, or make them anew with: {REPAIR} '{folder}'"
        )


def find_faults(folder: Path, manifest: Manifest, trust_stamp: bool = True) -> dict[int, str]:
    """What is wrong with each shard that is not as prepared, with path, expected and actual, by its number.

    Reads the shards that the stamp does not vouch for, and stamps the sound ones. stderr gets a line of progress every
    few seconds, and one where the stamp cannot be written, which only makes the next start slower.
    """
    stamped = _read_stamp(folder) if trust_stamp else {}
    known = {file: entry for file, entry in _entries(folder, manifest).items() if stamped.get(file) == entry}
    unread = [number for number, shard in enumerate(manifest.shards) if shard.file not in known]
    if not unread:
        return {}
    faults: dict[int, str] = {}
    with ThreadPoolExecutor(min(MAX_THREADS, available_cores())) as pool:
        jobs = {pool.submit(_verify, folder, manifest.shards[number], manifest.n_vocab): number for number in unread}
        last = time.monotonic()
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                entry, fault = job.result()
                if fault:
                    faults[jobs[job]] = fault
                else:
                    known[manifest.shards[jobs[job]].file] = entry
                if time.monotonic() - last >= REPORT_EVERY_S:
                    last = time.monotonic()
                    say(f"verifying {folder}: {done} of {len(unread)} shards read")
                    with suppress(StorageError):  # said at the end
                        _write_stamp(folder, known)  # a start that is cut off here is not begun again
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    try:
        _write_stamp(folder, known)
    except StorageError as error:
        say(f"the next start will read the dataset again: {error}")
    return dict(sorted(faults.items()))


def _verify(folder: Path, shard: Shard, n_vocab: int) -> tuple[dict[str, Any] | None, str | None]:
    """The shard's entry, as it was before its content was read, and what is wrong with it."""
    return _entry(folder, shard, n_vocab), shard_fault(folder, shard, n_vocab, full=True)


def _entries(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Entries by file name, of the shards that are there."""
    found = {shard.file: _entry(folder, shard, manifest.n_vocab) for shard in manifest.shards}
    return {file: entry for file, entry in found.items() if entry}


def _entry(folder: Path, shard: Shard, n_vocab: int) -> dict[str, Any] | None:
    """What was asked of the shard, and which file answered; None where there is none."""
    try:
        found = os.stat(folder / shard.file)
    except OSError:
        return None
    return {
        "sha256": shard.sha256,
        "n_vocab": n_vocab,
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
