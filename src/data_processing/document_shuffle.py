"""Documents -> shards in a shuffled order: one radix sort on disk, resumable and the same for any number of threads.

A document's key is a hash of its text and the seed, so the order of the keys is a shuffle. Documents are encoded and
appended to 256 buckets by the first byte of their key. Then one bucket after the other is loaded, sorted by key and
cut into shards. At 10B tokens (20 GB) a bucket has about 80 MB: memory holds one of them and its sorted copy, 8 bytes
for each document of the corpus, and what the threads work on. Equal documents share a bucket. The folder of unfinished
work, .preparing in the dataset's, holds:

    plan.json          the request and the details of its sources; written first
    journal.json       length and checksum of each bucket file at a position in the sources, then the shards written;
                       replaced at once: a restart truncates the buckets to these lengths and resumes there
    00.records ...     a RECORD of each document, in the order of the sources
    00.tokens ...      their token ids, uint16; deleted once they are in shards
"""

import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from src.data_processing.file_formats import Documents
from src.data_processing.shards import SHARD_NAME, TOKEN_DTYPE, Shard, check_names, shard_fault, write_shard
from src.data_processing.text_sources import Request, Source
from src.data_processing.tokenizer import Tokenizer, load_tokenizer, replace_surrogates
from src.utils.errors import BusyError, StorageError, UserError, now_and_then, say
from src.utils.files import bytes_below, lies_in, replacing, storage_errors, try_lock

WORK = ".preparing"
DOWNLOADS = "downloads"
PLAN, JOURNAL, _LOCK = "plan.json", "journal.json", "lock"
PLAN_VERSION = 2  # another one is not resumed; change it with the buckets or the way that batches are divided
FLUSH_TOKENS = 1 << 26  # 128 MB in memory between two entries of the journal
_BUCKETS = 256
# Validation is a twentieth of the corpus; of a small one more, up to a quarter, to measure anything at all.
_VALIDATION_SHARE, _SMALL_VALIDATION_SHARE, _USEFUL_VALIDATION_TOKENS = 20, 4, 16_384
_MAX_FILES_NAMED = 100

# NumPy compares byte strings as unsigned bytes, which is the order of the keys. A key's trailing zero bytes are lost
# when it leaves the array (`key_text` restores them), but equal keys stay equal.
RECORD = np.dtype([("key", "S16"), ("tokens", "<u4"), ("source", "<u4"), ("text_bytes", "<u8")])


class Position(NamedTuple):
    """A place in the sources, behind a batch."""

    source: int = 0
    unit: int = 0
    batch: int = 0
    share: float = 0.0
    """Share of the unit that lies before it."""


START = Position()


@dataclass
class Journal:
    """How far a preparation is."""

    work: Path
    position: Position = START
    is_complete: bool = False
    """True once the buckets hold all documents."""
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("documents", "tokens", "skipped_empty", "replaced_invalid"), 0)
    )
    """Documents that are not empty and their tokens, duplicates included; documents left out; documents mended."""
    replaced_in: dict[str, int] = field(default_factory=dict)
    """Documents with replaced characters by file; the files beyond the first hundred together."""
    files: dict[str, list[int]] = field(default_factory=dict)
    """Length in bytes and CRC-32 of each bucket file."""
    shards: list[Shard] = field(default_factory=list)

    def write(self) -> None:
        """Replace the file. Raises StorageError."""
        content = {name: value for name, value in vars(self).items() if name != "work"}
        with replacing(self.work / JOURNAL) as file:
            file.write(json.dumps(content | {"shards": [asdict(shard) for shard in self.shards]}).encode())

    @classmethod
    def read(cls, work: Path, folder: Path) -> "Journal | None":
        """Read the journal and truncate the buckets to it; None if there is none.

        Raises ValueError, KeyError or TypeError if the journal, a bucket or a shard is damaged.
        """
        if not (work / JOURNAL).exists():
            return None
        content = json.loads((work / JOURNAL).read_bytes())
        content["position"] = Position(*content["position"])
        content["shards"] = [Shard(**entry) for entry in content["shards"]]
        journal = cls(work, **content)
        check_names(journal.shards)
        for name, (length, _) in journal.files.items():
            path = work / name
            if not lies_in(work, name):
                raise ValueError(f"{path} leads elsewhere")
            if journal.shards and not path.exists():
                continue  # its documents are in shards
            if not path.exists() or path.stat().st_size < length:
                raise ValueError(f"{path} is cut short")
            os.truncate(path, length)
            journal.content(name)
        for shard in journal.shards:
            if fault := shard_fault(folder, shard, Tokenizer.n_vocab, full=True):
                raise ValueError(fault)
        return journal

    def append(self, name: str, content: bytes, is_synced: bool) -> None:
        """Append to a bucket file, on the disk when this returns if `is_synced`. Raises StorageError."""
        length, checksum = self.files.get(name, (0, 0))
        # A file the journal does not know is left by a start that was killed before it wrote one.
        with storage_errors(self.work / name), open(self.work / name, "ab" if length else "wb") as file:
            file.write(content)
            if is_synced:
                file.flush()
                os.fsync(file.fileno())
        self.files[name] = [length + len(content), zlib.crc32(content, checksum)]

    def content(self, name: str) -> bytes:
        """Read a bucket file. Raises ValueError if it is damaged, StorageError if it cannot be read."""
        with storage_errors(self.work / name, "read"):
            content = (self.work / name).read_bytes() if name in self.files else b""
        if [len(content), zlib.crc32(content)] != self.files.get(name, [0, 0]):
            raise ValueError(f"{self.work / name} has changed")
        return content


@contextmanager
def claimed_work(folder: Path) -> Iterator[Path]:
    """Hold `folder`, made if need be, until the block ends; yield the folder inside it for unfinished work.

    It is deleted when the block ends well. After a failure it stays if it holds anything to resume from. Raises
    StorageError if the folder cannot be written, and BusyError if another process holds it.
    """
    work = folder / WORK
    with storage_errors(folder):
        is_new = not folder.exists()
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / _LOCK, "ab")  # noqa: SIM115 (held open as long as the lock)
    with lock:
        if not try_lock(lock) or not _is_same(lock, work / _LOCK):  # its last holder may have deleted it
            raise BusyError(f"another process is preparing {folder}; wait for it, or choose another --out")
        try:
            yield work
        except BaseException:
            with suppress(OSError):  # the failure itself matters more than leftovers
                if not ((work / JOURNAL).exists() or (work / DOWNLOADS).exists()):
                    shutil.rmtree(work)
                    if is_new and not any(folder.iterdir()):
                        folder.rmdir()
            raise
        with storage_errors(work, "delete"):
            shutil.rmtree(work)


def resume(folder: Path, work: Path, request: Request) -> tuple[list[dict[str, Any]], Journal | None]:
    """Return the sources' details and the journal of an earlier start with the same request; else nothing."""
    if not (work / PLAN).exists():
        return [], None
    try:
        plan = json.loads((work / PLAN).read_bytes())
        if (plan["version"], plan["request"]) == (PLAN_VERSION, request.stored()):
            return plan["sources"], Journal.read(work, folder)
        say("the unfinished work is of another request: starting over")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        say(f"the unfinished work is damaged ({error}): starting over")
    return [], None


def start_over(
    folder: Path, work: Path, request: Request, details: list[dict[str, Any]], keep_downloads: bool = False
) -> Journal:
    """Delete an earlier start's leftovers, write the plan, and return an empty journal.

    Raises UserError for shards whose origin is unknown, and StorageError.
    """
    shards = [path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name.removesuffix(".tmp"))]
    if shards and not (work / PLAN).exists():
        raise UserError(
            f"{folder} holds {len(shards)} shards without a manifest, such as {min(shards).name}, whose preparation "
            "is unknown; move them away or choose another --out"
        )
    with storage_errors(work, "delete the unfinished work in"):
        (work / JOURNAL).unlink(missing_ok=True)  # first: a kill further down must not leave it without its files
        for path in [*shards, *work.iterdir()]:
            if path.is_dir():
                if path.name != DOWNLOADS or not keep_downloads:
                    shutil.rmtree(path)
            elif path.name not in (PLAN, _LOCK):  # the plan vouches for the shards until they are gone
                path.unlink()
    with replacing(work / PLAN) as file:
        content = {"version": PLAN_VERSION, "request": request.stored(), "sources": details}
        file.write(json.dumps(content).encode())
    return Journal(work)


def fill_buckets(sources: Sequence[Source], request: Request, journal: Journal, workers: int) -> None:
    """Encode the documents from the journal's position into buckets, up to the request's limits.

    Raises UserError if a source is faulty or changed meanwhile, and StorageError.
    """
    load_tokenizer()  # or a fault of its files would show after the first download
    report = _Progress(sources, request, journal)
    # A limited request may need little of what is read ahead; otherwise the threads stay busy during a flush.
    ahead = workers + 1 if request.is_limited else 8 * workers
    waiting: list[EncodedBatch] = []
    for position, batch in encode_all(sources, journal.position, workers, request.seed, ahead):
        batch, is_limit_reached = _within_limits(batch, request, journal.counts)
        waiting.append(batch)
        journal.position = position
        for origin in batch.replaced.values():
            name = origin if origin in journal.replaced_in or len(journal.replaced_in) < _MAX_FILES_NAMED else "others"
            journal.replaced_in[name] = journal.replaced_in.get(name, 0) + 1
        if is_limit_reached:
            break
        if sum(batch.tokens.size for batch in waiting) >= FLUSH_TOKENS:
            _flush(waiting, journal)
            waiting = []
        report.say_if_due()
    for source in sources:
        source.check_unchanged()
    journal.is_complete = True
    _flush(waiting, journal)


@dataclass(frozen=True)
class EncodedBatch:
    """Some documents of a corpus, in its order."""

    records: np.ndarray
    """RECORD of each document that is not empty."""
    tokens: np.ndarray
    """All ids in a row, uint16, with the end-of-text token before each document."""
    empty_before: np.ndarray
    """For each document, how many were left out before it because they are empty or all white space."""
    replaced: dict[int, str]
    """Numbers of the documents in which U+FFFD replaces what is not UTF-8, with their files."""
    skipped_empty: int

    def first(self, documents: int) -> "EncodedBatch":
        """Return the batch cut behind its first `documents` documents."""
        records = self.records[:documents]
        return EncodedBatch(
            records,
            self.tokens[: int(records["tokens"].sum())],
            self.empty_before[:documents],
            {number: origin for number, origin in self.replaced.items() if number < documents},
            int(self.empty_before[documents - 1]) if documents else 0,
        )


def encode_all(
    sources: Sequence[Source], start: Position, workers: int, seed: int, ahead: int
) -> Iterator[tuple[Position, EncodedBatch]]:
    """Yield the encoded batches behind `start`, in order, each with the position behind it.

    Threads are enough: tiktoken, hashing and decompression release Python's lock. At most `ahead` batches are read
    before the first of them is taken.
    """
    pending: deque[tuple[Position, Future[EncodedBatch]]] = deque()
    is_leaving = threading.Event()
    pool = ThreadPoolExecutor(workers)
    try:
        for position, documents in _batches(sources, start):
            job = pool.submit(encode_batch, documents, seed, position.source, is_leaving)
            pending.append((position, job))
            while pending and (len(pending) >= ahead or pending[0][1].done()):
                position, job = pending.popleft()
                yield position, job.result()
        while pending:
            position, job = pending.popleft()
            yield position, job.result()
    finally:
        is_leaving.set()  # on an error or Ctrl-C: no further document is begun
        pool.shutdown(wait=False, cancel_futures=True)


def encode_batch(
    documents: Documents, seed: int, source: int = 0, is_leaving: threading.Event | None = None
) -> EncodedBatch:
    """Encode documents, replacing lone surrogates by U+FFFD and leaving out what is empty."""
    tokenizer = load_tokenizer()
    mark = np.array([tokenizer.end_of_text], TOKEN_DTYPE)
    records: list[tuple[bytes, int, int, int]] = []
    arrays: list[np.ndarray] = [np.empty(0, TOKEN_DTYPE)]
    empty_before: list[int] = []
    replaced: dict[int, str] = {}
    skipped = 0
    for number, text in enumerate(documents.texts()):
        if is_leaving is not None and is_leaving.is_set():
            break
        if not text or text.isspace():
            skipped += 1
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError:
            text = replace_surrogates(text)
            data = text.encode()
            replaced[len(records)] = documents.origin(number)
        ids = tokenizer.encode_to_numpy(text)
        arrays += [mark, ids]
        records.append((document_key(data, seed), 1 + ids.size, source, len(data)))
        empty_before.append(skipped)
    return EncodedBatch(
        np.array(records, RECORD), np.concatenate(arrays), np.array(empty_before, np.int64), replaced, skipped
    )


def document_key(data: bytes, seed: int) -> bytes:
    """Return the document's place in the dataset's order: 16 bytes that look random, from its UTF-8 and the seed.

    Equal documents have the same key; different ones do not (a chance of 1e-24 for ten million documents).
    """
    return hashlib.blake2b(data, digest_size=16, key=str(seed).encode()).digest()


def key_text(key: bytes) -> str:
    """Return a key as the manifest has it, 32 hexadecimal digits."""
    return key.ljust(16, b"\0").hex()


class SortedDocuments:
    """The documents of all buckets in the order of their keys; equal ones form a group, which is not divided."""

    def __init__(self, journal: Journal, drop_duplicates: bool, n_sources: int) -> None:
        """Read all records. Of equal documents only the first is kept if `drop_duplicates`. Raises StorageError."""
        self._journal, self._drop = journal, drop_duplicates
        self.documents, self.tokens, self.text_bytes = (np.zeros(n_sources, np.int64) for _ in range(3))
        """By source."""
        lengths = np.zeros(33, np.int64)
        group_tokens: list[np.ndarray] = []
        self._first_groups, self._forgotten = [0], 0
        for bucket in range(_BUCKETS):
            if f"{bucket:02x}.records" not in journal.files:
                self._first_groups.append(self._first_groups[-1])
                continue
            records, starts, _ = self._sorted(bucket)
            self._first_groups.append(self._first_groups[-1] + len(starts))
            group_tokens.append(np.add.reduceat(records["tokens"].astype(np.int64), starts))
            self.documents += np.bincount(records["source"], minlength=n_sources)
            np.add.at(self.tokens, records["source"], records["tokens"].astype(np.int64))
            np.add.at(self.text_bytes, records["source"], records["text_bytes"].astype(np.int64))
            lengths += np.bincount(np.frexp(records["tokens"])[1] - 1, minlength=len(lengths))
        self.group_tokens = np.concatenate([np.empty(0, np.int64), *group_tokens])
        self.lengths: list[int] = np.trim_zeros(lengths, "b").tolist()
        """Entry k counts the documents of 2^k to 2^(k+1) - 1 tokens."""

    def read(self, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield records and tokens of groups `begin` to `end`, in order, a bucket at a time. Raises StorageError."""
        for bucket in range(_BUCKETS):
            offset = self._first_groups[bucket]
            first, last = max(begin, offset), min(end, self._first_groups[bucket + 1])
            if first < last:
                records, tokens, ends, starts = _load(self, bucket)
                low, high = starts[first - offset], starts[last - offset]
                yield records[low:high], tokens[ends[low] : ends[high]]

    def forget(self, end: int) -> None:
        """Delete the tokens of the buckets whose groups all lie before `end`. Raises StorageError."""
        while self._forgotten < _BUCKETS and self._first_groups[self._forgotten + 1] <= end:
            path = self._journal.work / f"{self._forgotten:02x}.tokens"
            if path.name in self._journal.files:
                with storage_errors(path, "delete"):
                    path.unlink(missing_ok=True)
            self._forgotten += 1

    def _sorted(self, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a bucket's sorted records, where each group starts, and the records' places in the file."""
        records = np.frombuffer(self._content(f"{bucket:02x}.records"), RECORD)
        order = np.argsort(records["key"], kind="stable")  # of equal documents the first stays the first
        keys = records["key"][order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        if self._drop:
            order, is_first = order[is_first], is_first[is_first]
        return records[order], np.flatnonzero(is_first), order

    def _load_sorted(self, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return sorted records and tokens, where each document's tokens begin and end, and where groups start."""
        records, starts, order = self._sorted(bucket)
        counts = np.frombuffer(self._content(f"{bucket:02x}.records"), RECORD)["tokens"].astype(np.int64)
        tokens = np.frombuffer(self._content(f"{bucket:02x}.tokens"), TOKEN_DTYPE)
        ends = np.cumsum(counts)
        tokens = np.concatenate([tokens[ends[place] - counts[place] : ends[place]] for place in order.tolist()])
        bounds = np.concatenate([[0], np.cumsum(counts[order])])
        return records, tokens, bounds, np.append(starts, len(records))

    def _content(self, name: str) -> bytes:
        try:
            return self._journal.content(name)
        except ValueError as error:
            raise StorageError(f"cannot use the unfinished work: {error}. Rerun to start over.") from None


@lru_cache(maxsize=1)  # neighbouring shards share a bucket
def _load(documents: SortedDocuments, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return documents._load_sorted(bucket)


Ranges = list[tuple[int, int]]


def plan_shards(group_tokens: np.ndarray, tokens_per_shard: int) -> list[Ranges]:
    """Divide groups of equal documents into shards, validation first; return the ranges of groups of each.

    A shard holds at most `tokens_per_shard` tokens, or one longer group. Most are one range; the shard around the
    validation documents has two. Raises UserError for fewer than two groups.
    """
    if len(group_tokens) < 2:
        found = "one document" if len(group_tokens) else "no document"
        raise UserError(
            f"found {found} that isn't empty, repetitions not counted; at least two are needed, one to validate and "
            "one to train, because documents are not split: give more files, or divide a long text into the lines of "
            "a .jsonl file"
        )
    total = int(group_tokens.sum())
    share = max(total // _VALIDATION_SHARE, min(total // _SMALL_VALIDATION_SHARE, _USEFUL_VALIDATION_TOKENS))
    limit = min(tokens_per_shard, share)
    # Validation must not swallow a long document where a short one will do, so it begins with one that fits.
    fitting = group_tokens <= limit
    begin = int(np.argmax(fitting)) if fitting.any() else int(np.argmin(group_tokens))
    end = begin + next(_cuts(group_tokens[begin:], limit))
    shards: list[Ranges] = [[(begin, end)]]
    training = np.delete(group_tokens, np.s_[begin:end])
    first = 0
    for last in _cuts(training, tokens_per_shard):
        # Numbers among the training groups -> numbers among all: those behind validation are further on.
        pieces = [(first, min(last, begin)), (max(first, begin) + end - begin, last + end - begin)]
        pieces = [(low, high) for low, high in pieces if low < high]
        if len(pieces) == 2 and pieces[0][1] == pieces[1][0]:
            pieces = [(pieces[0][0], pieces[1][1])]
        shards.append(pieces)
        first = last
    return shards


def write_shards(
    documents: SortedDocuments, plans: Sequence[Ranges], folder: Path, prefix: str, journal: Journal
) -> None:
    """Write the planned shards that the journal does not list yet into `folder`. Raises StorageError."""
    for index, ranges in enumerate(plans):
        if index >= len(journal.shards):
            journal.shards.append(_write_shard(documents, ranges, folder, prefix, index))
            journal.write()
        if index:  # validation may lie behind training documents that are still needed
            documents.forget(ranges[-1][1])


def disk_needed(folder: Path, tokens: int, download_bytes: int = 0) -> int:
    """Estimate the bytes that preparing `tokens` tokens in `folder` needs beyond the leftovers of an earlier start."""
    # The buckets, which go as the shards come, with an eighth for records and what is there twice meanwhile.
    return max(0, tokens * TOKEN_DTYPE.itemsize * 9 // 8 + download_bytes - bytes_below(folder))


def _is_same(lock: IO, path: Path) -> bool:
    """Return True if the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _batches(sources: Sequence[Source], start: Position) -> Iterator[tuple[Position, Documents]]:
    """Yield all batches from `start`, each with the position behind it."""
    for number, source in enumerate(sources):
        for unit in range(len(source.unit_bytes)):
            if (number, unit) < start[:2]:
                continue
            skip = start.batch if (number, unit) == start[:2] else 0
            for batch, (documents, share) in enumerate(source.batches(unit, skip), start=skip + 1):
                yield Position(number, unit, batch, share), documents


def _within_limits(batch: EncodedBatch, request: Request, counts: dict[str, int]) -> tuple[EncodedBatch, bool]:
    """Return the part of `batch` that the request allows, and True if there was more; add it to `counts`."""
    allowed = len(batch.records)
    if request.max_documents is not None:
        allowed = min(allowed, request.max_documents - counts["documents"])
    if request.max_tokens is not None:
        ends = np.cumsum(batch.records["tokens"], dtype=np.int64)
        allowed = min(allowed, int(np.searchsorted(ends, request.max_tokens - counts["tokens"], side="right")))
    is_limit_reached = allowed < len(batch.records)
    if is_limit_reached:
        batch = batch.first(allowed)
    counts["documents"] += len(batch.records)
    counts["tokens"] += batch.tokens.size
    counts["skipped_empty"] += batch.skipped_empty
    counts["replaced_invalid"] += len(batch.replaced)
    return batch, is_limit_reached


def _flush(batches: Sequence[EncodedBatch], journal: Journal) -> None:
    """Append batches to the buckets, then write the journal. Raises StorageError."""
    # A corpus of one flush is sooner read again than synced, 512 files: after a power cut the checksums tell.
    is_synced = bool(journal.files) or not journal.is_complete
    records = np.concatenate([np.empty(0, RECORD), *(batch.records for batch in batches)])
    tokens = np.concatenate([np.empty(0, TOKEN_DTYPE), *(batch.tokens for batch in batches)])
    ends = np.cumsum(records["tokens"], dtype=np.int64).tolist()
    first_bytes = np.ascontiguousarray(records["key"]).view(np.uint8)[::16]
    order = np.argsort(first_bytes, kind="stable")
    bounds = np.searchsorted(first_bytes[order], np.arange(_BUCKETS + 1))
    for bucket in range(_BUCKETS):
        places = order[bounds[bucket] : bounds[bucket + 1]].tolist()
        if places:
            parts = [tokens[ends[place] - int(records["tokens"][place]) : ends[place]] for place in places]
            journal.append(f"{bucket:02x}.records", records[places].tobytes(), is_synced)
            journal.append(f"{bucket:02x}.tokens", np.concatenate(parts).tobytes(), is_synced)
    journal.write()


def _cuts(tokens: np.ndarray, limit: int) -> Iterator[int]:
    """Yield the end of each shard of at most `limit` tokens, or of one longer group."""
    total = np.cumsum(tokens)
    end = 0
    while end < len(tokens):
        before = int(total[end - 1]) if end else 0
        end = max(end + 1, int(np.searchsorted(total, before + limit, side="right")))
        yield end


def _write_shard(documents: SortedDocuments, ranges: Ranges, folder: Path, prefix: str, index: int) -> Shard:
    """Write shard `index`. Raises StorageError."""
    tokens = sum(int(documents.group_tokens[begin:end].sum()) for begin, end in ranges)
    count = text_bytes = 0
    keys: list[bytes] = []

    def arrays() -> Iterator[np.ndarray]:
        nonlocal count, text_bytes
        for begin, end in ranges:
            for records, array in documents.read(begin, end):
                count += len(records)
                text_bytes += int(records["text_bytes"].sum(dtype=np.int64))
                keys.extend((records["key"][0], records["key"][-1]))
                yield array

    file, sha256 = write_shard(folder, prefix, index, tokens, arrays())
    split = "train" if index else "validation"
    return Shard(file, split, tokens, count, text_bytes, sha256, key_text(keys[0]), key_text(keys[-1]))


class _Progress:
    """Lines on stderr, now and then: how much is done, how fast, and how long the rest takes."""

    def __init__(self, sources: Sequence[Source], request: Request, journal: Journal) -> None:
        self._sizes = [np.array(source.unit_bytes, np.float64) for source in sources]
        self._request, self._journal = request, journal
        self._first = (time.monotonic(), self._share(), journal.counts["tokens"])
        self._say = now_and_then()

    def say_if_due(self) -> None:
        start, first_share, first_tokens = self._first
        share, counts = self._share(), self._journal.counts
        seconds = max(1e-9, time.monotonic() - start)
        rate = (counts["tokens"] - first_tokens) / seconds
        left = seconds * (1 - share) / (share - first_share) if share > first_share + 0.002 else None
        eta = "" if left is None else f", about {f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'} left"
        self._say(f"{share:.0%}, {counts['documents']:,} documents, {counts['tokens']:,} tokens, {rate:,.0f}/s{eta}")

    def _share(self) -> float:
        """Return the share of the sources that was read, or of the request's limits if that is more."""
        place, counts, request = self._journal.position, self._journal.counts, self._request
        before = sum(sizes.sum() for sizes in self._sizes[: place.source])
        sizes = self._sizes[place.source]
        read = before + sizes[: place.unit].sum() + place.share * sizes[place.unit : place.unit + 1].sum()
        shares = [float(read) / max(1.0, float(sum(sizes.sum() for sizes in self._sizes)))]
        shares += [counts["documents"] / request.max_documents] if request.max_documents else []
        shares += [counts["tokens"] / request.max_tokens] if request.max_tokens else []
        return max(shares)
