"""Encoded documents -> a dataset's shards: shuffled, split and written, in a folder held for the purpose.

Tokens go to one file on disk as the documents come. Order, split and shards then follow from the seed and
the documents' lengths alone, so every document is equally likely to be anywhere, whatever order its source
has, and memory holds some 40 bytes a document, never the tokens.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.data_processing.encoding import EncodedBatch
from src.data_processing.shards import MANIFEST, SHARD_NAME, TOKEN_DTYPE, Shard, storage_error, write_shard
from src.utils.disk import try_lock
from src.utils.errors import BusyError, UserError
from src.utils.rand_idx_seq_gen import permutation

# Validation is a twentieth of the corpus; of a small one more, up to a quarter, to measure anything at all.
_VALIDATION_SHARE = 20
_SMALL_VALIDATION_SHARE = 4
_USEFUL_VALIDATION_TOKENS = 16_384

_MARKER = ".preparing"  # there while a preparation goes on, which also locks it, and after one was killed
_SPILL = "tokens.tmp"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds `folder`, made if need be and rid of what a killed preparation left, until the block ends.

    Where the block fails, what it wrote is removed. Raises StorageError where the folder cannot be written,
    BusyError where another process holds it, UserError where it holds shards of unknown origin.
    """
    marker = folder / _MARKER
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        interrupted = marker.exists()
        lock = open(marker, "wb")  # noqa: SIM115 (held open as long as the lock)
    except OSError as error:
        raise storage_error(folder, error) from error
    with lock:
        if not try_lock(lock):
            raise BusyError(f"another process is preparing {folder}; wait for it, or choose another --out")
        try:
            _start_clean(folder, interrupted)
            try:
                yield
            except BaseException:
                _remove_unfinished(folder)
                raise
        finally:
            marker.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def write_shards(
    batches: Iterable[EncodedBatch], folder: Path, prefix: str, seed: int, tokens_per_shard: int
) -> tuple[tuple[Shard, ...], dict[str, int]]:
    """Writes the documents of `batches` as shards into `folder`; returns the shards and the manifest's counts.

    A shard holds whole documents, at most `tokens_per_shard` tokens of them, or a single longer one. Raises
    UserError where there are too few documents, and StorageError.
    """
    corpus = _spill(batches, folder / _SPILL)
    first_tokens = np.cumsum(corpus.token_counts) - corpus.token_counts
    shards = []
    for index, documents in enumerate(_divide(corpus.token_counts, seed, tokens_per_shard)):
        token_counts = corpus.token_counts[documents]
        tokens, text_bytes = int(token_counts.sum()), int(corpus.text_bytes[documents].sum())
        arrays = _read_spilled(folder / _SPILL, first_tokens[documents], token_counts)
        file, sha256 = write_shard(folder, prefix, index, tokens, arrays)
        split = "train" if index else "validation"
        shards.append(Shard(file, split, tokens, len(documents), text_bytes, sha256, "", ""))
    (folder / _SPILL).unlink()
    counts = {
        "documents": len(corpus.token_counts),
        "tokens": int(corpus.token_counts.sum()),
        "text_bytes": int(corpus.text_bytes.sum()),
        "skipped_empty": corpus.skipped_empty,
        "replaced_invalid": corpus.replaced_invalid,
    }
    return tuple(shards), counts


@dataclass(frozen=True)
class _Corpus:
    """What is known of the documents in the spill file, in its order."""

    token_counts: np.ndarray
    text_bytes: np.ndarray
    skipped_empty: int
    replaced_invalid: int


def _start_clean(folder: Path, interrupted: bool) -> None:
    if (folder / MANIFEST).exists():
        raise BusyError(f"another process has just prepared {folder}; start again to use it")
    if interrupted:
        print(f"cleaning up an interrupted preparation in {folder}", file=sys.stderr)
        _remove_unfinished(folder)
    shards = [name for name in os.listdir(folder) if SHARD_NAME.fullmatch(name)]
    if shards:
        raise UserError(
            f"{folder} holds {len(shards)} shards without a manifest, such as {min(shards)}, whose preparation is "
            "unknown; move them away or choose another --out"
        )


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == _SPILL or SHARD_NAME.fullmatch(path.name.removesuffix(".tmp")):
            path.unlink()
    (folder / f"{MANIFEST}.tmp").unlink(missing_ok=True)


def _spill(batches: Iterable[EncodedBatch], path: Path) -> _Corpus:
    """Appends all tokens to `path`, one document after another."""
    token_counts, text_bytes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    skipped_empty = replaced_invalid = 0
    for batch in batches:
        _append(path, batch.tokens.astype(TOKEN_DTYPE, copy=False))
        token_counts.append(batch.token_counts)
        text_bytes.append(batch.text_bytes)
        skipped_empty += batch.skipped_empty
        replaced_invalid += batch.replaced_invalid
    return _Corpus(np.concatenate(token_counts), np.concatenate(text_bytes), skipped_empty, replaced_invalid)


def _append(path: Path, tokens: np.ndarray) -> None:
    try:
        with open(path, "ab") as file:
            file.write(tokens.tobytes())
    except OSError as error:
        raise storage_error(path, error) from error


def _divide(token_counts: np.ndarray, seed: int, tokens_per_shard: int) -> list[np.ndarray]:
    """The documents of each shard, by number, shuffled; validation first. Raises UserError for fewer than two."""
    n = len(token_counts)
    if n < 2:
        raise UserError(
            f"found {'no document' if n == 0 else 'one document'} that isn't empty; at least two are needed, one to "
            "validate and one to train, because documents are not split: give more files, or divide a long text into "
            "the lines of a .jsonl file"
        )
    order = permutation(n, seed)
    ends = np.cumsum(token_counts[order])
    total = int(ends[-1])
    share = max(total // _VALIDATION_SHARE, min(total // _SMALL_VALIDATION_SHARE, _USEFUL_VALIDATION_TOKENS))
    limit = min(tokens_per_shard, share)
    if token_counts[order[0]] > limit:  # validation must not swallow a long document where a short one will do
        fitting_numbers = np.flatnonzero(token_counts[order] <= limit)
        first = int(fitting_numbers[0]) if fitting_numbers.size else int(np.argmin(token_counts[order]))
        order = np.concatenate((order[first : first + 1], np.delete(order, first)))
        ends = np.cumsum(token_counts[order])
    cuts = [0]
    while cuts[-1] < n:
        start = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        fitting = int(np.searchsorted(ends, start + limit, side="right"))
        cuts.append(max(fitting, cuts[-1] + 1))
        limit = tokens_per_shard
    return np.split(order, cuts[1:-1])


def _read_spilled(path: Path, first_tokens: np.ndarray, token_counts: np.ndarray) -> Iterator[np.ndarray]:
    """The documents that begin at `first_tokens` of the spill file."""
    with open(path, "rb") as file:
        for first, count in zip(first_tokens, token_counts, strict=True):
            file.seek(int(first) * TOKEN_DTYPE.itemsize)
            yield np.frombuffer(file.read(int(count) * TOKEN_DTYPE.itemsize), TOKEN_DTYPE)
