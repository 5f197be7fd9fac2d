"""An external sort: encoded documents go to disk as they come and are taken back in the order of their keys.

They are collected into runs of some 32M tokens, each sorted and then left as it is. A run is

    run_000007.tokens_0 ... _f    token ids, uint16, one file for each value of the keys' first four bits
    run_000007.documents.npy      RECORD of each document, sorted by key
    run_000007.json               the hashes of the others, and what the caller wants to remember; written last, so
                                  the run counts only with it

In the end the records of all runs are merged, and tokens are read run by run in long stretches. Memory holds one
run, later one slice of the documents, whatever the size of the corpus; but documents that are equal share a slice.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from src.data_processing.encoding import EncodedBatch
from src.data_processing.shards import TOKEN_DTYPE
from src.utils.files import fingerprint, lies_in, replacing, storage_errors

RUN_TOKENS, RUN_DOCUMENTS = 1 << 25, 1 << 18
_SLICE_DOCUMENTS = 1 << 20
_CHUNK_TOKENS = 1 << 23
_GROUP_BITS = 4  # of a key, which decide the token file
_GROUPS = 1 << _GROUP_BITS

RECORD = np.dtype(
    [
        ("key", "<u8", (2,)),
        ("first", "<u8"),  # its first token in its file
        ("tokens", "<u4"),
        ("text_bytes", "<u8"),
        ("source", "<u4"),
        ("run", "<u4"),
    ]
)


def write_run(folder: Path, number: int, batches: Sequence[tuple[int, EncodedBatch]], state: dict[str, Any]) -> None:
    """Writes documents, each batch with the number of its source, as run `number`. Raises StorageError."""
    full = [(source, batch) for source, batch in batches if len(batch.token_counts)]
    records = np.concatenate([np.empty(0, RECORD), *(_records_of(batch, source, number) for source, batch in full)])
    documents = [part for _, batch in full for part in np.split(batch.tokens, np.cumsum(batch.token_counts)[:-1])]
    order = _key_order(records["key"])
    records = records[order]
    starts = np.searchsorted(_group_of(records), np.arange(_GROUPS + 1))
    hashes: dict[str, str] = {}
    for group, (begin, end) in enumerate(pairwise(starts)):
        if begin < end:
            records["first"][begin:end] = np.cumsum(records["tokens"][begin:end]) - records["tokens"][begin:end]
            tokens = np.concatenate([documents[document] for document in order[begin:end]])
            path = _path(folder, number, f"tokens_{group:x}")
            hashes[path.name] = _write(path, tokens.astype(TOKEN_DTYPE, copy=False).data)
    path = _path(folder, number, "documents.npy")
    content = io.BytesIO()
    np.save(content, records)
    hashes[path.name] = _write(path, content.getbuffer())
    with replacing(_path(folder, number, "json")) as file:
        file.write(json.dumps({**state, "sha256": hashes}).encode())


def read_states(folder: Path) -> list[dict[str, Any]]:
    """What was remembered with each whole run in `folder`, in their order. Raises ValueError for a damaged one."""
    states: list[dict[str, Any]] = []
    while (path := _path(folder, len(states), "json")).exists():
        states.append(json.loads(path.read_bytes()))
    return states


def has_runs(folder: Path) -> bool:
    """Whether any whole run lies in `folder`."""
    return _path(folder, 0, "json").exists()


def find_damage(folder: Path, tokens_may_be_gone: bool) -> Path | None:
    """The first file of the runs in `folder` that is not as it was written; token files are deleted in the end."""
    for state in read_states(folder):
        for name, sha256 in state["sha256"].items():
            path = folder / name
            if not lies_in(folder, name):
                return path
            if tokens_may_be_gone and not path.exists() and not name.endswith(".npy"):
                continue
            if not path.exists() or fingerprint(path)["sha256"] != sha256:
                return path
    return None


@dataclass(frozen=True)
class SortedDocuments:
    """The documents of all runs in the order of their keys. Raises StorageError where their files fail."""

    folder: Path
    records: np.ndarray
    """RECORD of each document; on disk."""
    slices: tuple[int, ...]
    """Where the records can be cut without parting equal keys: 0, ..., len(records)."""
    dropped_duplicates: int

    def __iter__(self) -> Iterator[np.ndarray]:
        """The records, a slice at a time."""
        for begin, end in pairwise(self.slices):
            yield np.array(self.records[begin:end])

    def tokens(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """The tokens of documents `begin` to `end`, in order, some 8M at a time."""
        while begin < end:
            records = np.array(self.records[begin : min(end, begin + _SLICE_DOCUMENTS)])
            n_documents = int(np.searchsorted(np.cumsum(records["tokens"]), _CHUNK_TOKENS)) + 1
            yield self._read(records[:n_documents])
            begin += len(records[:n_documents])

    def forget(self, begin: int, end: int) -> None:
        """Deletes the token files of documents `begin` to `end`, but those that later documents share with them."""
        bounds = [int(_group_of(self.records[at : at + 1])[0]) for at in (begin, end) if at < len(self.records)]
        for group in range(bounds[0], bounds[1] if len(bounds) == 2 else _GROUPS):
            for path in self.folder.glob(f"run_*.tokens_{group:x}"):
                with storage_errors(path, "delete"):
                    path.unlink()

    def _read(self, records: np.ndarray) -> np.ndarray:
        tokens = np.empty(int(records["tokens"].sum()), TOKEN_DTYPE)
        ends = np.cumsum(records["tokens"], dtype=np.int64)
        files = records["run"].astype(np.int64) * _GROUPS + _group_of(records).astype(np.int64)
        by_file = np.argsort(files, kind="stable")
        for part in np.split(by_file, np.flatnonzero(np.diff(files[by_file])) + 1):
            run, group = divmod(int(files[part[0]]), _GROUPS)
            firsts, counts = records["first"][part].astype(np.int64), records["tokens"][part].astype(np.int64)
            path = _path(self.folder, run, f"tokens_{group:x}")
            with storage_errors(path, "read"):
                stretch = np.fromfile(
                    path,
                    TOKEN_DTYPE,
                    count=int(firsts[-1] + counts[-1] - firsts[0]),
                    offset=int(firsts[0]) * TOKEN_DTYPE.itemsize,
                )
            for end, first, count in zip(ends[part], firsts - firsts[0], counts, strict=True):
                tokens[end - count : end] = stretch[first : first + count]
        return tokens


def sort_documents(folder: Path, drop_duplicates: bool) -> SortedDocuments:
    """Merges the runs in `folder`. Of equal documents only one stays where `drop_duplicates` says so.

    Raises StorageError.
    """
    paths = [_path(folder, run, "documents.npy") for run in range(len(read_states(folder)))]
    runs = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    path = folder / "sorted_documents"
    slices, dropped = [0], 0
    with storage_errors(path), open(path, "wb") as file:
        for low, high in _key_slices(sum(map(len, runs))):
            parts = [run[_place(run, low) : _place(run, high)] for run in runs]
            records = np.concatenate([np.empty(0, RECORD), *parts])
            records = records[_key_order(records["key"])]
            if drop_duplicates and len(records):
                new = np.concatenate(([True], (records["key"][1:] != records["key"][:-1]).any(axis=1)))
                dropped += int((~new).sum())
                records = records[new]
            records.tofile(file)
            slices.append(slices[-1] + len(records))
    merged = np.memmap(path, RECORD, mode="r") if slices[-1] else np.empty(0, RECORD)
    return SortedDocuments(folder, merged, tuple(slices), dropped)


def _key_slices(documents: int) -> Iterator[tuple[int, int]]:
    """First halves of keys, from and to, that hold some _SLICE_DOCUMENTS each."""
    slices = max(1, -(-documents // _SLICE_DOCUMENTS))
    edges = [number * 2**64 // slices for number in range(slices + 1)]
    yield from pairwise(edges)


def _place(run: np.ndarray, half_key: int) -> int:
    """How many of a run's documents come before keys that begin with `half_key`."""
    return len(run) if half_key == 2**64 else int(np.searchsorted(run["key"][:, 0], np.uint64(half_key)))


def _records_of(batch: EncodedBatch, source: int, run: int) -> np.ndarray:
    records = np.zeros(len(batch.token_counts), RECORD)
    records["key"], records["tokens"], records["text_bytes"] = batch.keys, batch.token_counts, batch.text_bytes
    records["source"], records["run"] = source, run
    return records


def _key_order(keys: np.ndarray) -> np.ndarray:
    return np.lexsort((keys[:, 1], keys[:, 0]))


def _group_of(records: np.ndarray) -> np.ndarray:
    return records["key"][:, 0] >> np.uint64(64 - _GROUP_BITS)


def _write(path: Path, content: memoryview) -> str:
    """Writes a file, waits until it is on the disk, and returns its sha256. Raises StorageError."""
    with storage_errors(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _path(folder: Path, run: int, kind: str) -> Path:
    return folder / f"run_{run:06d}.{kind}"
