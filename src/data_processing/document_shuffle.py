"""Documents -> shards in a shuffled order: one radix sort on disk, resumable and the same for any number of workers.

A document's key is a hash of its text and the seed, so the order of the keys is a shuffle. Documents are encoded and
appended to 256 buckets by the first byte of their key. Then one bucket after the other is loaded, sorted by key and
cut into shards. At 10B tokens (20 GB) a bucket has about 80 MB: memory holds one of them and its sorted copy, 8 bytes
for each document of the corpus, and what the workers work on. Equal documents share a bucket. The folder of unfinished
work, .preparing in the dataset's, holds:

    plan.json          the request and the details of its sources; written first
    journal.json       length of each bucket file at a position in the sources, then the shards written; replaced at
                       once: a restart truncates the buckets to these lengths and resumes there
    00.records ...     a RECORD of each document, in the order of the sources
    00.tokens ...      their token ids, uint16; deleted once they are in shards

A corpus that fits into one flush has no journal: a restart reads it again.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data_processing.file_formats import LONG_TEXT, Documents
from src.data_processing.shards import (
    SHARD_NAME,
    TOKEN_DTYPE,
    Shard,
    check_shard,
    check_shards,
    check_sources,
    check_types,
    write_shard,
)
from src.data_processing.text_sources import Request, Source
from src.data_processing.tokenizer import Tokenizer, load_tokenizer, replace_surrogates
from src.utils.errors import BusyError, StorageError, UserError, now_and_then, say
from src.utils.files import lies_in, open_regular, read_json, replacing, storage_errors, try_lock

WORK = ".preparing"
DOWNLOADS = "downloads"
PLAN, JOURNAL, _LOCK = "plan.json", "journal.json", "lock"
PLAN_VERSION = 4  # another one is not resumed; change it with the buckets or the way that batches are divided
FLUSH_TOKENS = 1 << 26  # 128 MB in memory between two entries of the journal
_DOCUMENT_COST = 100  # tokens that take as much memory as a document's objects
_BUCKETS = 256
# Validation is a twentieth of the corpus; of a small one more, up to a quarter, to measure anything at all.
_VALIDATION_SHARE, _SMALL_VALIDATION_SHARE, _USEFUL_VALIDATION_TOKENS = 20, 4, 16_384
_FILES_NAMED = 5
_MOST_SHARDS = 100_000
_BUCKET_FILE = re.compile(r"[0-9a-f]{2}\.(records|tokens)")

# NumPy compares byte strings as unsigned bytes, which is the order of the keys. A key's trailing zero bytes are lost
# when it leaves the array (`_write_shard` restores them), but equal keys stay equal.
RECORD = np.dtype([("key", "S16"), ("tokens", "<u4"), ("source", "<u4"), ("text_bytes", "<u8")])


class Position(NamedTuple):
    """A place in the sources, behind a batch."""

    source: int = 0
    unit: int = 0
    batch: int = 0
    share: float = 0.0
    """Share of all sources that lies before it."""


START = Position()


@dataclass
class Journal:
    """The state of a preparation."""

    work: Path
    position: Position = START
    is_complete: bool = False
    """True once the buckets hold all documents."""
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("documents", "tokens", "skipped_empty", "replaced_invalid"), 0)
    )
    """Documents that are not empty and their tokens, duplicates included; documents left out; documents mended."""
    replaced_in: dict[str, int] = field(default_factory=dict)
    """Number of replaced characters by file; of the files beyond the first five together."""
    files: dict[str, int] = field(default_factory=dict)
    """Length in bytes of each bucket file."""
    shards: list[Shard] = field(default_factory=list)
    is_kept: bool = False
    """True if it is on the disk: not for a corpus of one flush."""

    def write(self) -> None:
        """Replace the file, if the journal is kept. Raises StorageError."""
        if self.is_kept:
            content = {name: value for name, value in vars(self).items() if name != "work"}
            _write_json(self.work / JOURNAL, content | {"shards": [asdict(shard) for shard in self.shards]})

    @classmethod
    def read(cls, work: Path, folder: Path) -> "Journal":
        """Read the journal and truncate the buckets to it; an empty one if there is none.

        Raises ValueError, KeyError or TypeError if the journal, a bucket or a shard is damaged.
        """
        if not (work / JOURNAL).exists():
            return cls(work)
        content = read_json(work / JOURNAL)
        content["position"] = Position(*content["position"])
        content["shards"] = [Shard(**entry) for entry in content["shards"]]
        for name, value in content.items():
            check_types(value, cls.__annotations__[name], name)
        journal = cls(work, **content)
        if journal.counts.keys() != cls(work).counts.keys() or not all(map(_BUCKET_FILE.fullmatch, journal.files)):
            raise ValueError("these are not the counts and files of a journal")
        check_shards(journal.shards)
        for name, length in journal.files.items():
            path = work / name
            if journal.shards and not path.exists():
                continue  # its documents are in shards
            if not lies_in(work, name) or not path.exists() or path.stat().st_size < length:
                raise ValueError(f"{path} is cut short or leads elsewhere")
            os.truncate(path, length)
        for shard in journal.shards:
            check_shard(folder, shard, Tokenizer.n_vocab, full=True)
        return journal

    def append(self, name: str, content: bytes) -> None:
        """Append to a bucket file, safe from a power cut if the journal is kept. Raises StorageError."""
        length = self.files.get(name, 0)
        path = self.work / name
        with storage_errors(path):
            if not length:  # a file the journal does not know is left by a start that was killed before it wrote one
                path.unlink(missing_ok=True)
            with open(path, "ab" if length else "xb") as file:
                file.write(content)
                if self.is_kept:
                    file.flush()
                    os.fsync(file.fileno())
        self.files[name] = length + len(content)


@contextmanager
def claimed_work(folder: Path) -> Iterator[Path]:
    """Hold `folder`, created if needed, until the block ends; yield the folder inside it for unfinished work.

    It is deleted when the block ends well, and after a failure if it holds nothing to resume from. Raises
    StorageError if the folder cannot be written, and BusyError if another process holds it.
    """
    work = folder / WORK
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        if work.is_symlink():  # all in this folder may be deleted
            raise StorageError(f"Cannot use {work}: it is a link. Move it away.")
    with storage_errors(work / _LOCK):
        lock = open_regular(work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    with lock:
        if not try_lock(lock) or not os.fstat(lock.fileno()).st_nlink:  # its last holder may have deleted it
            raise BusyError(
                f"Cannot prepare {folder}: another process is preparing it. Wait for it, or choose another --out."
            )
        try:
            yield work
        except BaseException:
            with suppress(OSError):  # the failure itself matters more than leftovers
                if os.listdir(folder) == [WORK] and not {JOURNAL, DOWNLOADS} & set(os.listdir(work)):
                    shutil.rmtree(folder)
            raise
        with storage_errors(work, "delete"):
            shutil.rmtree(work)


def resume(folder: Path, work: Path, request: Request) -> tuple[list[dict[str, Any]], Journal | None]:
    """Return the sources' details and the journal of an earlier start with the same request; else nothing."""
    if (work / PLAN).exists():
        with suppress(ValueError, KeyError, TypeError):
            plan = read_json(work / PLAN)
            check_sources(plan["sources"])
            if (plan["version"], plan["request"]) == (PLAN_VERSION, request.stored()):
                return plan["sources"], Journal.read(work, folder)
        say("starting over: the unfinished work is damaged or of another request")
    return [], None


def start_over(folder: Path, work: Path, request: Request, details: list[dict[str, Any]]) -> Journal:
    """Delete an earlier start's shards and buckets, write the plan, and return an empty journal.

    Raises UserError for shards whose origin is unknown, and StorageError.
    """
    shards = [path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name.removesuffix(".tmp"))]
    if shards and not (work / PLAN).exists():
        raise UserError(
            f"Cannot prepare {folder}: it holds {len(shards)} shards without a manifest, such as {min(shards).name}, "
            "whose preparation is unknown. Move them away or choose another --out."
        )
    with storage_errors(work, "delete the unfinished work in"):
        (work / JOURNAL).unlink(missing_ok=True)  # first: a kill further down must not leave it without its files
        for path in [*shards, *work.glob("??.*")]:  # the plan vouches for the shards until they are gone
            path.unlink()
    _write_json(work / PLAN, {"version": PLAN_VERSION, "request": request.stored(), "sources": details})
    return Journal(work)


def fill_buckets(sources: Sequence[Source], request: Request, journal: Journal, workers: int) -> None:
    """Encode the documents from the journal's position into buckets, up to the request's limits.

    Raises UserError if a source is faulty or changed meanwhile, and StorageError.
    """
    load_tokenizer()  # or a fault of its files would show after the first download
    start, tokens_before, say_if_due = time.monotonic(), journal.counts["tokens"], now_and_then()
    # A limited request may need little of what is read ahead; otherwise the workers stay busy during a flush.
    ahead = workers + 1 if request.is_limited else 8 * workers
    waiting: list[Document] = []
    size = 0
    for position, batch in encode_all(sources, journal.position, workers, request.seed, ahead):
        documents = _within_limits(batch, request, journal)
        waiting += documents
        size += sum(_DOCUMENT_COST + document.tokens for document in documents)
        journal.position = position
        if len(documents) < len(batch):
            break
        if size >= FLUSH_TOKENS:
            journal.is_kept = True
            _flush(waiting, journal)
            waiting, size = [], 0
        counts, limits = journal.counts, (request.max_documents or math.inf, request.max_tokens or math.inf)
        share = max(position.share, counts["documents"] / limits[0], counts["tokens"] / limits[1])
        rate = (counts["tokens"] - tokens_before) / (time.monotonic() - start)
        say_if_due(f"{share:.0%}, {counts['documents']:,} documents, {counts['tokens']:,} tokens, {rate:,.0f} tokens/s")
    try:
        for source in sources:
            source.check_unchanged()
    except UserError:  # what is in the buckets may be of neither version, and the next start must not resume it
        with storage_errors(journal.work / JOURNAL, "delete"):
            (journal.work / JOURNAL).unlink(missing_ok=True)
        raise
    journal.is_complete = True
    _flush(waiting, journal)


class Document(NamedTuple):
    """An encoded document."""

    key: bytes = b""
    """Its place in the dataset's order: 16 bytes that look random, from its UTF-8 and the seed."""
    ids: bytes = b""
    """The end-of-text token and the text's ids, uint16; nothing for a document of white space, which is left out."""
    text_bytes: int = 0
    source: int = 0
    replaced_in: str | None = None
    """Its file, if U+FFFD replaces what is not UTF-8."""
    replaced: int = 0
    """Number of these characters."""

    @property
    def tokens(self) -> int:
        return len(self.ids) // TOKEN_DTYPE.itemsize


def encode_all(
    sources: Sequence[Source], start: Position, workers: int, seed: int, ahead: int
) -> Iterator[tuple[Position, list[Document]]]:
    """Yield the encoded batches behind `start`, in order, each with the position behind it.

    At most `ahead` batches are read before the first of them is taken. Raises UserError if a worker is killed.
    """
    pending: deque[tuple[Position, Future[list[Document]]]] = deque()
    # tiktoken releases Python's lock, but two threads reach only three quarters of two processes' rate. Spawned ones
    # inherit no locks from the threads that download or read parquet.
    pool: Executor = ThreadPoolExecutor(1)
    batches = _batches(sources, start)
    head = list(islice(batches, 2))
    if workers > 1 and len(head) > 1:  # starting processes takes longer than a single batch
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        for position, documents in chain(head, batches):
            # The worker that this may start inherits that Ctrl-C is held back: it ends with its parent instead.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                pending.append((position, pool.submit(encode_batch, documents, seed, position.source)))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            while pending and (len(pending) >= ahead or pending[0][1].done()):
                position, job = pending.popleft()
                yield position, job.result()
        for position, job in pending:
            yield position, job.result()
    except BrokenProcessPool:
        raise UserError(
            f"Cannot tokenise: one of {workers} worker processes was killed or could not start. If memory is short, "
            "use fewer with --workers, and rerun to resume."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _follow_parent() -> None:
    """End this process with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encode_batch(documents: Documents, seed: int, source: int = 0) -> list[Document]:
    """Encode documents, replacing lone surrogates by U+FFFD."""
    tokenizer = load_tokenizer()
    mark = TOKEN_DTYPE.type(tokenizer.end_of_text).tobytes()
    encoded = []
    for text in documents.texts():
        replaced_in, replaced = None, 0
        if not text or text.isspace():
            encoded.append(Document())
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError:
            mended = replace_surrogates(text)
            replaced = mended.count("\ufffd") - text.count("\ufffd")
            text, data, replaced_in = mended, mended.encode(), str(documents.path)
        ids = mark + tokenizer.encode_to_numpy(text).tobytes()
        # Different documents have different keys, but for a chance of 1e-24 in ten million.
        key = hashlib.blake2b(data, digest_size=16, key=str(seed).encode()).digest()
        encoded.append(Document(key, ids, len(data), source, replaced_in, replaced))
    return encoded


class SortedDocuments:
    """The documents of all buckets in the order of their keys; equal ones form a group, which is not divided."""

    def __init__(self, journal: Journal, drop_duplicates: bool, n_sources: int) -> None:
        """Read all records. Of equal documents only the first is kept if `drop_duplicates`. Raises StorageError."""
        self._journal, self._drop = journal, drop_duplicates
        self.documents, self.tokens, self.text_bytes = (np.zeros(n_sources, np.int64) for _ in range(3))
        """By source."""
        lengths = np.zeros(33, np.int64)
        group_tokens: list[np.ndarray] = []
        for bucket in range(_BUCKETS):
            records, _, starts = self._sorted(bucket)
            group_tokens.append(np.add.reduceat(records["tokens"].astype(np.int64), starts))
            self.documents += np.bincount(records["source"], minlength=n_sources)
            np.add.at(self.tokens, records["source"], records["tokens"].astype(np.int64))
            np.add.at(self.text_bytes, records["source"], records["text_bytes"].astype(np.int64))
            lengths += np.bincount(np.frexp(records["tokens"])[1] - 1, minlength=len(lengths))
        self.group_tokens = np.concatenate(group_tokens)
        self.lengths: list[int] = np.trim_zeros(lengths, "b").tolist()
        """Entry k counts the documents of 2^k to 2^(k+1) - 1 tokens."""
        self._first_groups = np.cumsum([0, *map(len, group_tokens)])
        self._load = lru_cache(maxsize=1)(self._read_bucket)  # neighbouring shards share a bucket

    def read(self, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield records and tokens of groups `begin` to `end`, in order, a bucket at a time. Raises StorageError."""
        for bucket in range(_BUCKETS):
            offset, next_offset = self._first_groups[bucket : bucket + 2]
            first, last = max(begin, offset), min(end, next_offset)
            if first < last:
                records, tokens, bounds, starts = self._load(bucket)
                low, high = starts[first - offset], starts[last - offset]
                yield records[low:high], tokens[bounds[low] : bounds[high]]

    def forget(self, end: int) -> None:
        """Delete the tokens of the buckets whose groups all lie before `end`. Raises StorageError."""
        for bucket in range(int(np.searchsorted(self._first_groups[1:], end, side="right"))):
            if self._journal.files.pop(name := f"{bucket:02x}.tokens", None):
                with storage_errors(self._journal.work / name, "delete"):
                    (self._journal.work / name).unlink(missing_ok=True)

    def _sorted(self, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a bucket's sorted records, their places in the file, and where each group starts."""
        records = self._content(f"{bucket:02x}.records", RECORD)
        order = np.argsort(records["key"], kind="stable")  # of equal documents the first stays the first
        starts = np.unique(records["key"][order], return_index=True)[1]
        if self._drop:
            order, starts = order[starts], np.arange(len(starts))
        return records[order], order, starts

    def _read_bucket(self, bucket: int) -> tuple[np.ndarray, ...]:
        """Return sorted records and tokens, the documents' bounds among the tokens, and the groups' among records."""
        records, order, starts = self._sorted(bucket)
        tokens = self._content(f"{bucket:02x}.tokens", TOKEN_DTYPE)
        ends = np.cumsum(self._content(f"{bucket:02x}.records", RECORD)["tokens"], dtype=np.int64)
        parts = [
            tokens[ends[place] - count : ends[place]] for place, count in zip(order, records["tokens"], strict=True)
        ]
        bounds = np.concatenate([[0], np.cumsum(records["tokens"], dtype=np.int64)])
        return records, np.concatenate(parts), bounds, np.append(starts, len(records))

    def _content(self, name: str, dtype: np.dtype) -> np.ndarray:
        with storage_errors(self._journal.work / name, "read"):
            content = (self._journal.work / name).read_bytes() if name in self._journal.files else b""
        if len(content) != self._journal.files.get(name, 0):
            raise StorageError(f"Cannot use the unfinished work: {self._journal.work / name} has changed. Rerun.")
        return np.frombuffer(content, dtype)


Ranges = list[tuple[int, int]]


def plan_shards(group_tokens: np.ndarray, tokens_per_shard: int) -> list[Ranges]:
    """Divide groups of equal documents into shards, validation first; return the ranges of groups of each.

    A shard holds at most `tokens_per_shard` tokens, or one longer group. Most are one range; the shard around the
    validation documents has two. Raises UserError for fewer than two groups.
    """
    if len(group_tokens) < 2:
        raise UserError(
            f"Cannot divide {len(group_tokens)} document(s) that are neither empty nor repeated: at least two are "
            "needed, one to validate and one to train. Give more text, raise the limit, or divide the text: only a "
            f".txt or .md file of more than {LONG_TEXT:,} characters is divided, at ends of paragraphs."
        )
    total = int(group_tokens.sum())
    share = max(total // _VALIDATION_SHARE, min(total // _SMALL_VALIDATION_SHARE, _USEFUL_VALIDATION_TOKENS))
    limit = min(tokens_per_shard, share)
    # Validation must not swallow a long document where a short one will do, so it begins with one that fits.
    fitting = group_tokens <= limit
    begin = int(np.argmax(fitting)) if fitting.any() else int(np.argmin(group_tokens))
    end = begin + next(_cuts(group_tokens[begin:], limit))
    shards: list[Ranges] = [[(begin, end)]]
    first = 0
    for last in _cuts(np.delete(group_tokens, np.s_[begin:end]), tokens_per_shard):
        # Numbers among the training groups -> numbers among all: those behind validation are further on.
        pieces = [(first, min(last, begin)), (max(first, begin) + end - begin, last + end - begin)]
        shards.append([(low, high) for low, high in pieces if low < high])
        first = last
    if len(shards) > _MOST_SHARDS:
        raise UserError(
            f"Cannot divide {total:,} tokens into {len(shards):,} shards: {_MOST_SHARDS:,} are the most. Use at least "
            f"--tokens-per-shard {-(-total // _MOST_SHARDS) * 2}."
        )
    return shards


def write_shards(documents: SortedDocuments, request: Request, folder: Path, journal: Journal) -> None:
    """Write the shards that the journal does not list yet. Raises UserError as `plan_shards`, StorageError."""
    plans, prefix = plan_shards(documents.group_tokens, request.tokens_per_shard), "+".join(request.sources)
    say(f"writing {len(plans)} shards")
    for index, ranges in enumerate(plans):
        if index >= len(journal.shards):
            journal.shards.append(_write_shard(documents, ranges, folder, prefix, index))
            journal.write()
        if index:  # validation may lie behind training documents that are still needed
            documents.forget(ranges[-1][1])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content).encode())


def _batches(sources: Sequence[Source], start: Position) -> Iterator[tuple[Position, Documents]]:
    """Yield all batches from `start`, each with the position behind it."""
    total = max(1, sum(sum(source.unit_bytes) for source in sources))
    before = 0
    for number, source in enumerate(sources):
        for unit, size in enumerate(source.unit_bytes):
            if (number, unit) >= start[:2]:
                skip = start.batch if (number, unit) == start[:2] else 0
                for batch, (documents, share) in enumerate(source.batches(unit, skip), start=skip + 1):
                    yield Position(number, unit, batch, (before + share * size) / total), documents
            before += size


def _within_limits(batch: list[Document], request: Request, journal: Journal) -> list[Document]:
    """Return the documents of `batch` that the request allows, all if no limit is reached, and count them."""
    counts, allowed = journal.counts, 0
    documents, tokens = counts["documents"], counts["tokens"]
    for number, document in enumerate(batch, start=1):
        if document.ids:
            documents, tokens = documents + 1, tokens + document.tokens
            if documents > (request.max_documents or math.inf) or tokens > (request.max_tokens or math.inf):
                break  # empty documents behind the last one don't count
            allowed = number
    else:
        allowed = len(batch)
    for document in batch[:allowed]:
        counts["documents"] += bool(document.ids)
        counts["tokens"] += document.tokens
        counts["skipped_empty"] += not document.ids
        if name := document.replaced_in:
            counts["replaced_invalid"] += 1
            name = name if name in journal.replaced_in or len(journal.replaced_in) < _FILES_NAMED else "other files"
            journal.replaced_in[name] = journal.replaced_in.get(name, 0) + document.replaced
    return batch[:allowed]


def _flush(documents: Sequence[Document], journal: Journal) -> None:
    """Append documents to the buckets, then write the journal. Raises StorageError."""
    buckets: dict[int, list[Document]] = defaultdict(list)
    for document in documents:
        if document.ids:
            buckets[document.key[0]].append(document)
    for bucket, members in buckets.items():
        records = [(document.key, document.tokens, document.source, document.text_bytes) for document in members]
        journal.append(f"{bucket:02x}.records", np.array(records, RECORD).tobytes())
        journal.append(f"{bucket:02x}.tokens", b"".join(document.ids for document in members))
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
    parts: list[np.ndarray] = []

    def arrays() -> Iterator[np.ndarray]:
        for begin, end in ranges:
            for records, tokens in documents.read(begin, end):
                parts.append(records)
                yield tokens

    tokens = sum(int(documents.group_tokens[begin:end].sum()) for begin, end in ranges)
    file, sha256 = write_shard(folder, prefix, index, tokens, arrays())
    records = np.concatenate(parts)
    first, last = (key.ljust(16, b"\0").hex() for key in (records["key"][0], records["key"][-1]))
    split = "train" if index else "validation"
    return Shard(file, split, tokens, len(records), int(records["text_bytes"].sum()), sha256, first, last)
