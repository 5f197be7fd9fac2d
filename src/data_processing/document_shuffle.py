"""Documents -> shards in a shuffled order: one sort on disk, resumable and the same for any number of workers.

A document's key is a hash of its text and the seed, so the order of the keys is a shuffle. Documents are encoded, and
every 64M tokens of them become a run, sorted by key. Then a 256th of the keys after the other is read from all runs,
sorted and cut into shards. At 10B tokens (20 GB) such a part has about 80 MB: memory holds one of them and its sorted
copy, 8 bytes for each document of the corpus, and what the workers work on. The folder of unfinished work, .preparing
in the dataset's, holds:

    journal.json        the request, the details of its sources, the runs and the position behind them in the sources;
                        replaced at once, last: a restart resumes there, and overwrites files it does not know
    00000.records ...   a RECORD of each document of a run, in the order of the keys
    00000.tokens ...    their token ids, uint16
"""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data_processing.file_formats import LONG_TEXT, Documents
from src.data_processing.shards import SHARD_NAME, TOKEN_DTYPE, Shard, check_sources, check_types, write_shard
from src.data_processing.text_sources import Request, Source
from src.data_processing.tokenizer import load_tokenizer, replace_surrogates
from src.utils.errors import BusyError, StorageError, UserError, now_and_then, say
from src.utils.files import open_regular, read_json, replacing, storage_errors, try_lock

WORK = ".preparing"
DOWNLOADS = "downloads"
JOURNAL, _LOCK = "journal.json", "lock"
JOURNAL_VERSION = 5  # another one is not resumed; change it with the runs or the way that batches are divided
FLUSH_TOKENS = 1 << 26  # of a run: 128 MB in memory before it is written
_DOCUMENT_COST = 100  # tokens that take as much memory as a document's objects
_PARTS = 256  # of the keys, by their first byte
# Validation is a twentieth of the corpus; of a small one more, up to a quarter, to measure anything at all.
_VALIDATION_SHARE, _SMALL_VALIDATION_SHARE, _USEFUL_VALIDATION_TOKENS = 20, 4, 16_384
_FILES_NAMED = 5
_MOST_SHARDS = 100_000

# NumPy compares byte strings as unsigned bytes, which is the order of the keys. A key's trailing zero bytes are lost
# when it leaves the array (`_write_shard` restores them), but equal keys stay equal.
RECORD = np.dtype([("key", "S16"), ("tokens", "<u4"), ("source", "<u4"), ("text_bytes", "<u8")])
_FILES = {"records": RECORD, "tokens": TOKEN_DTYPE}  # of a run


class Position(NamedTuple):
    """A place in the sources, behind a batch."""

    source: int = 0
    unit: int = 0
    batch: int = 0


START = Position()


@dataclass
class Journal:
    """The state of a preparation: the content of journal.json."""

    request: dict[str, Any]
    sources: list[dict[str, Any]]
    """Their details, as the manifest has them."""
    version: int = JOURNAL_VERSION
    position: Position = START
    is_complete: bool = False
    """True once the runs hold all documents."""
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("documents", "tokens", "skipped_empty", "replaced_invalid"), 0)
    )
    """Documents that are not empty and their tokens, duplicates included; documents left out; documents mended."""
    replaced_in: dict[str, int] = field(default_factory=dict)
    """Number of replaced characters by file; of the files beyond the first five together."""
    runs: list[list[int]] = field(default_factory=list)
    """Documents and tokens of each."""

    @classmethod
    def read(cls, work: Path, request: Request) -> "Journal | None":
        """Return the journal of an earlier start with the same request; None for another or a damaged one."""
        if not (work / JOURNAL).exists():
            return None
        with suppress(ValueError, KeyError, TypeError), storage_errors(work / JOURNAL, "read"):
            content = read_json(work / JOURNAL)
            journal = cls(**content | {"position": Position(*content["position"])})
            check_types(journal, cls, "journal")
            check_sources(journal.sources)
            expected = (JOURNAL_VERSION, request.stored(), cls({}, []).counts.keys())
            files = [
                (work / f"{number:05}.{name}", length * dtype.itemsize)
                for number, lengths in enumerate(journal.runs)
                for (name, dtype), length in zip(_FILES.items(), lengths, strict=True)
            ]
            sound = all(not p.is_symlink() and p.is_file() and p.stat().st_size == size for p, size in files)
            if sound and (journal.version, journal.request, journal.counts.keys()) == expected:
                return journal
        say("starting over: the unfinished work is damaged or of another request")
        return None

    def write(self, work: Path) -> None:
        """Replace journal.json. Raises StorageError."""
        with replacing(work / JOURNAL) as file:
            file.write(json.dumps(vars(self)).encode())

    def add_run(self, work: Path, documents: Sequence["Document"]) -> None:
        """Write `documents`, none of them empty, as a run, then the journal. Raises StorageError."""
        if documents:
            records = np.array([(each.key, each.tokens, each.source, each.text_bytes) for each in documents], RECORD)
            order = np.argsort(records["key"], kind="stable")  # of equal documents the first stays the first
            number = len(self.runs)
            with replacing(work / f"{number:05}.records", records.nbytes) as file:
                file.write(records[order].tobytes())
            self.runs.append([len(records), int(records["tokens"].sum())])
            with replacing(work / f"{number:05}.tokens", self.runs[-1][1] * TOKEN_DTYPE.itemsize) as file:
                file.writelines(documents[place].ids for place in order)
        self.write(work)


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
                # A single run may be the whole of a small corpus, which is soon read again.
                if os.listdir(folder) == [WORK] and not {"00001.records", DOWNLOADS} & set(os.listdir(work)):
                    shutil.rmtree(folder)
            raise
        with storage_errors(work, "delete"):
            shutil.rmtree(work)


def start_over(folder: Path, work: Path, request: Request, sources: list[dict[str, Any]]) -> Journal:
    """Delete an earlier start's shards and runs, then write a new journal and return it.

    Raises UserError for shards whose origin is unknown, and StorageError.
    """
    shards = [path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name.removesuffix(".tmp"))]
    if shards and not (work / JOURNAL).exists():
        raise UserError(
            f"Cannot prepare {folder}: it holds {len(shards)} shards without a manifest, such as {min(shards).name}, "
            "whose preparation is unknown. Move them away or choose another --out."
        )
    with storage_errors(work, "delete the unfinished work in"):
        # The old journal vouches for the shards until they are gone.
        for path in [*shards, *work.glob("*.records"), *work.glob("*.tokens")]:
            path.unlink()
    journal = Journal(request.stored(), sources)
    journal.write(work)
    return journal


def encode_sources(sources: Sequence[Source], request: Request, journal: Journal, work: Path, workers: int) -> None:
    """Encode the documents from the journal's position into runs, up to the request's limits.

    Raises UserError if a source is faulty or changed meanwhile, and StorageError.
    """
    load_tokenizer()  # or a fault of its files would show after the first download
    start, tokens_before, say_if_due = time.monotonic(), journal.counts["tokens"], now_and_then()
    # A limited request may need little of what is read ahead; otherwise the workers stay busy while a run is written.
    ahead = workers + 1 if request.is_limited else 8 * workers
    waiting: list[Document] = []
    size = 0
    for position, batch in encode_all(sources, journal.position, workers, request.seed, ahead):
        documents = _within_limits(batch, request, journal)
        waiting += [document for document in documents if document.ids]
        size += sum(_DOCUMENT_COST + document.tokens for document in documents)
        journal.position = position
        if len(documents) < len(batch):
            break
        if size >= FLUSH_TOKENS:
            journal.add_run(work, waiting)
            waiting, size = [], 0
        unit = 1 + position.unit + sum(source.n_units for source in sources[: position.source])
        rate = (journal.counts["tokens"] - tokens_before) / (time.monotonic() - start)
        say_if_due(
            f"file {unit:,} of {sum(source.n_units for source in sources):,}: {journal.counts['documents']:,} documents, "
            f"{journal.counts['tokens']:,} tokens, {rate:,.0f} tokens/s"
        )
    try:
        for source in sources:
            source.check_unchanged()
    except UserError:  # what is in the runs may be of neither version, and the next start must not resume it
        with storage_errors(work / JOURNAL, "delete"):
            (work / JOURNAL).unlink()
        raise
    journal.is_complete = True
    journal.add_run(work, waiting)


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
    """The documents of all runs in the order of their keys; equal ones form a group, which is not divided."""

    def __init__(self, work: Path, journal: Journal, drop_duplicates: bool) -> None:
        """Read all records. Of equal documents only the first is kept if `drop_duplicates`. Raises StorageError."""
        self._work, self._drop = work, drop_duplicates
        self._edges: list[dict[str, np.ndarray]] = []
        """Where each part of the keys begins in a run's files."""
        for number, (n_documents, _) in enumerate(journal.runs):
            records = self._read_run(number, "records", 0, n_documents)
            first_bytes = np.ascontiguousarray(records["key"]).view(np.uint8)[:: RECORD["key"].itemsize]
            edges = np.searchsorted(first_bytes, np.arange(_PARTS + 1))
            ends = np.cumsum(records["tokens"], dtype=np.int64)
            self._edges.append({"records": edges, "tokens": np.append(0, ends)[edges]})
        n_sources = len(journal.sources)
        self.documents, self.tokens, self.text_bytes = (np.zeros(n_sources, np.int64) for _ in range(3))
        """By source."""
        lengths = np.zeros(33, np.int64)
        group_tokens: list[np.ndarray] = []
        for part in range(_PARTS):
            records, _, starts = self._sorted(part)
            group_tokens.append(np.add.reduceat(records["tokens"].astype(np.int64), starts))
            self.documents += np.bincount(records["source"], minlength=n_sources)
            np.add.at(self.tokens, records["source"], records["tokens"].astype(np.int64))
            np.add.at(self.text_bytes, records["source"], records["text_bytes"].astype(np.int64))
            lengths += np.bincount(np.frexp(records["tokens"])[1] - 1, minlength=len(lengths))
        self.group_tokens = np.concatenate(group_tokens)
        self.lengths: list[int] = np.trim_zeros(lengths, "b").tolist()
        """Entry k counts the documents of 2^k to 2^(k+1) - 1 tokens."""
        self._first_groups = np.cumsum([0, *map(len, group_tokens)])
        self._load = lru_cache(maxsize=1)(self._read_part)  # neighbouring shards share a part

    def read(self, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield records and tokens of groups `begin` to `end`, in order, a part at a time. Raises StorageError."""
        for part in range(_PARTS):
            offset, next_offset = self._first_groups[part : part + 2]
            first, last = max(begin, offset), min(end, next_offset)
            if first < last:
                records, tokens, bounds, starts = self._load(part)
                low, high = starts[first - offset], starts[last - offset]
                yield records[low:high], tokens[bounds[low] : bounds[high]]

    def _sorted(self, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a part's sorted records, where each one's tokens begin in the part, and where each group starts."""
        records = self._content(part, "records")
        begins = np.cumsum(records["tokens"], dtype=np.int64) - records["tokens"]
        order = np.argsort(records["key"], kind="stable")
        starts = np.unique(records["key"][order], return_index=True)[1]
        if self._drop:
            order, starts = order[starts], np.arange(len(starts))
        return records[order], begins[order], starts

    def _read_part(self, part: int) -> tuple[np.ndarray, ...]:
        """Return sorted records and tokens, the documents' bounds among the tokens, and the groups' among records."""
        records, begins, starts = self._sorted(part)
        tokens = self._content(part, "tokens")
        texts = [tokens[begin : begin + count] for begin, count in zip(begins, records["tokens"], strict=True)]
        bounds = np.concatenate([[0], np.cumsum(records["tokens"], dtype=np.int64)])
        return records, np.concatenate(texts), bounds, np.append(starts, len(records))

    def _content(self, part: int, name: str) -> np.ndarray:
        """Return a part of the files `name` of all runs, one after the other."""
        edges = [run[name][part : part + 2].tolist() for run in self._edges]
        pieces = [self._read_run(n, name, first, last) for n, (first, last) in enumerate(edges) if first < last]
        return np.concatenate([np.empty(0, _FILES[name]), *pieces])

    def _read_run(self, number: int, name: str, first: int, last: int) -> np.ndarray:
        path, dtype = self._work / f"{number:05}.{name}", _FILES[name]
        with storage_errors(path, "read"):
            content = np.fromfile(path, dtype, last - first, offset=first * dtype.itemsize)
        if len(content) != last - first:
            raise StorageError(f"Cannot use the unfinished work: {path} has changed. Rerun.")
        return content


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


def write_shards(documents: SortedDocuments, request: Request, folder: Path) -> tuple[Shard, ...]:
    """Write and return all shards. Raises UserError as `plan_shards`, StorageError."""
    plans, prefix = plan_shards(documents.group_tokens, request.tokens_per_shard), "+".join(request.sources)
    say(f"writing {len(plans)} shards")
    return tuple(_write_shard(documents, ranges, folder, prefix, index) for index, ranges in enumerate(plans))


def _batches(sources: Sequence[Source], start: Position) -> Iterator[tuple[Position, Documents]]:
    """Yield all batches from `start`, each with the position behind it."""
    for number, source in enumerate(sources):
        for unit in range(source.n_units):
            if (number, unit) >= start[:2]:
                skip = start.batch if (number, unit) == start[:2] else 0
                for batch, documents in enumerate(source.batches(unit, skip), start=skip + 1):
                    yield Position(number, unit, batch), documents


def _within_limits(batch: list[Document], request: Request, journal: Journal) -> list[Document]:
    """Return the documents of `batch` that the request allows, all if no limit is reached, and count them."""
    counts, most_tokens = journal.counts, request.max_tokens or math.inf
    for number, document in enumerate(batch):
        is_one_too_many = counts["documents"] == request.max_documents or counts["tokens"] + document.tokens > most_tokens
        if document.ids and is_one_too_many:
            return batch[:number]
        counts["documents"] += bool(document.ids)
        counts["tokens"] += document.tokens
        counts["skipped_empty"] += not document.ids
        if name := document.replaced_in:
            counts["replaced_invalid"] += 1
            name = name if name in journal.replaced_in or len(journal.replaced_in) < _FILES_NAMED else "other files"
            journal.replaced_in[name] = journal.replaced_in.get(name, 0) + document.replaced
    return batch


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
