"""Documents -> shards in a shuffled order: one sort on disk, resumable and the same for any number of workers.

A document's key is a hash of its text and the seed, so sorting by key shuffles. Encoded documents are appended to files
in .preparing, the folder of unfinished work inside the dataset's folder:

    journal.json   the request, the details of its sources, counts, and the position of the last entry in the sources
    records        a RECORD of each document
    tokens         their token ids, uint16

Every 64M tokens form an entry: its documents are sorted by key and appended to both files, then the journal is replaced
atomically. A restart resumes there and overwrites anything after the documents that the journal counts. At the end the
records are sorted, and the documents are copied into shards in that order. That reads each sorted stretch of `tokens`
from start to end. Memory holds about 120 bytes per document, 1.2 GB at 10B tokens, and the workers' batches.
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data_processing.shards import SHARD_NAME, TOKEN_DTYPE, Shard, check_sources, check_types, write_shard
from src.data_processing.text_sources import LONG_TEXT, Request, Source
from src.data_processing.tokenizer import load_tokenizer, replace_surrogates
from src.utils.errors import BusyError, StorageError, UserError, now_and_then, say
from src.utils.files import open_regular, read_json, replacing, storage_errors, try_lock

WORK = ".preparing"
DOWNLOADS = "downloads"
JOURNAL, _LOCK = "journal.json", "lock"
JOURNAL_VERSION = 5  # others are not resumed; increase it when the files or the division into batches change
FLUSH_TOKENS = 1 << 26  # 128 MB in memory between two entries of the journal
_BATCH_CHARS = 1 << 20  # that a worker gets at once
_DOCUMENT_COST = 100  # a document's objects take as much memory as this many tokens
# Validation takes a twentieth of the corpus, or up to a quarter of a small one, enough to measure something.
_VALIDATION_SHARE, _SMALL_VALIDATION_SHARE, _USEFUL_VALIDATION_TOKENS = 20, 4, 16_384
_FILES_NAMED = 5
_MOST_SHARDS = 100_000

# NumPy compares byte strings as unsigned bytes, which is the order of the keys. A key's trailing zero bytes are lost
# when it leaves the array (`write_shards` restores them), but equal keys stay equal.
RECORD = np.dtype([("key", "S16"), ("tokens", "<u4"), ("source", "<u4"), ("text_bytes", "<u8")])
RECORDS, TOKENS = "records", "tokens"


class Position(NamedTuple):
    """A place in the sources, after a batch."""

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
    """True once all documents are tokenised."""
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("documents", "tokens", "skipped_empty", "replaced_invalid"), 0)
    )
    """Documents that are not empty and their tokens, including duplicates; empty documents; mended documents."""
    replaced_in: dict[str, int] = field(default_factory=dict)
    """Number of replaced characters by file; files after the first five are counted together."""

    @classmethod
    def read(cls, work: Path, request: Request) -> "Journal | None":
        """Return the journal of an earlier start; None if its request differs or it is damaged."""
        if not (work / JOURNAL).exists():
            return None
        with suppress(ValueError, KeyError, TypeError), storage_errors(work / JOURNAL, "read"):
            content = read_json(work / JOURNAL)
            journal = cls(**content | {"position": Position(*content["position"])})
            check_types(journal, cls, "journal")
            check_sources(journal.sources)
            expected = (JOURNAL_VERSION, request.stored(), cls({}, []).counts.keys())
            if (journal.version, journal.request, journal.counts.keys()) == expected and journal._fits(work):
                return journal
        say("starting over: the unfinished work is damaged or belongs to another request")
        return None

    def _fits(self, work: Path) -> bool:
        """True if records and tokens are files that hold the documents counted."""
        paths = [(work / name, length * size) for name, (length, size) in self._lengths().items() if length]
        return all(not path.is_symlink() and path.is_file() and path.stat().st_size >= size for path, size in paths)

    def _lengths(self) -> dict[str, tuple[int, int]]:
        """Return the length of each file in items, and the bytes of an item."""
        return {
            RECORDS: (self.counts["documents"], RECORD.itemsize),
            TOKENS: (self.counts["tokens"], TOKEN_DTYPE.itemsize),
        }

    def write(self, work: Path) -> None:
        """Replace journal.json. Raises StorageError."""
        with replacing(work / JOURNAL) as file:
            file.write(json.dumps(vars(self)).encode())

    def append(self, work: Path, documents: Sequence["Document"]) -> None:
        """Append `documents`, none of them empty and all counted, then write the journal. Raises StorageError."""
        records = np.array([(each.key, each.tokens, each.source, each.text_bytes) for each in documents], RECORD)
        order = np.argsort(records["key"], kind="stable")  # equal documents keep their order
        contents = {RECORDS: [records[order].tobytes()], TOKENS: [documents[place].ids for place in order]}
        for name, (length, size) in self._lengths().items():
            added = sum(map(len, contents[name]))
            with (
                storage_errors(work / name, needed_bytes=added),
                # Refuses a link or a pipe.
                io.BufferedWriter(open_regular(work / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)) as file,
            ):
                file.seek(length * size - added)
                file.truncate()  # removes leftovers of a killed start
                file.writelines(contents[name])
                file.flush()
                os.fsync(file.fileno())
        self.write(work)


@contextmanager
def claimed_work(folder: Path) -> Iterator[Path]:
    """Hold `folder`, created if needed, until the block ends; yield the folder inside it for unfinished work.

    That folder is deleted if the block succeeds, and after a failure if it holds nothing to resume from. Raises
    StorageError if `folder` cannot be written, and BusyError if another process holds it.
    """
    work = folder / WORK
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        if work.is_symlink():  # this folder may be deleted
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
                names = set(os.listdir(work))
                if os.listdir(folder) == [WORK] and not ({JOURNAL, RECORDS} <= names or DOWNLOADS in names):
                    shutil.rmtree(folder)
            raise
        with storage_errors(work, "delete"):
            shutil.rmtree(work)


def start_over(folder: Path, work: Path, request: Request, sources: list[dict[str, Any]]) -> Journal:
    """Delete an earlier start's shards, then write a new journal and return it.

    Raises UserError for shards of unknown origin, and StorageError.
    """
    shards = [path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name.removesuffix(".tmp"))]
    if shards and not (work / JOURNAL).exists():
        raise UserError(
            f"Cannot prepare {folder}: it holds {len(shards)} shards without a manifest, such as {min(shards).name}. "
            "Their origin is unknown. Move them away or choose another --out."
        )
    for path in [*shards, *work.glob("*.*")]:  # the old journal vouches for the shards until they are gone
        with storage_errors(path, "delete"):
            path.unlink()
    journal = Journal(request.stored(), sources)
    journal.write(work)
    return journal


def encode_sources(sources: Sequence[Source], request: Request, journal: Journal, work: Path, workers: int) -> None:
    """Encode and append the documents after the journal's position, up to the request's limits.

    Raises UserError if a source is faulty or changes while it is read, and StorageError.
    """
    load_tokenizer()  # now, so that a fault in its files shows before the first download
    start, tokens_before, say_if_due = time.monotonic(), journal.counts["tokens"], now_and_then()
    # A limited request may need little of what is read ahead. Otherwise enough to keep workers busy during an append.
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
            journal.append(work, waiting)
            waiting, size = [], 0
        units, counts = [len(source.units) for source in sources], journal.counts
        rate = (counts["tokens"] - tokens_before) / (time.monotonic() - start)
        say_if_due(
            f"part {sum(units[: position.source]) + position.unit + 1:,} of {sum(units):,}: {counts['documents']:,} "
            f"documents, {counts['tokens']:,} tokens, {rate:,.0f} tokens/s"
        )
    for source in sources:
        source.check_unchanged()
    journal.is_complete = True
    journal.append(work, waiting)


@contextmanager
def nothing_to_resume(work: Path, after: type[UserError] = UserError) -> Iterator[None]:
    """Deletes the journal if the block raises `after`, so that the next start does not resume."""
    try:
        yield
    except after:
        with storage_errors(work / JOURNAL, "delete"):
            (work / JOURNAL).unlink()
        raise


class Document(NamedTuple):
    """An encoded document."""

    key: bytes = b""
    """Its place in the dataset's order: a 16-byte hash of its UTF-8 text and the seed."""
    ids: bytes = b""
    """The end-of-text token and the text's ids, uint16; empty for a document of white space, which is left out."""
    text_bytes: int = 0
    source: int = 0
    replaced_in: str | None = None
    """Its file, if invalid UTF-8 was replaced by U+FFFD."""
    replaced: int = 0
    """Number of replaced characters."""

    @property
    def tokens(self) -> int:
        return len(self.ids) // TOKEN_DTYPE.itemsize


def encode_all(
    sources: Sequence[Source], start: Position, workers: int, seed: int, ahead: int
) -> Iterator[tuple[Position, list[Document]]]:
    """Yield the encoded batches after `start`, in order, each with the position after it.

    At most `ahead` batches are read ahead of the result. Raises UserError if a worker is killed.
    """
    pending: deque[tuple[Position, Future[list[Document]]]] = deque()
    # tiktoken releases the GIL, but two threads reach only three quarters of the rate of two processes. Spawned, these
    # inherit no locks from the threads that download or read parquet.
    pool: Executor = ThreadPoolExecutor(1)
    batches = _batches(sources, start)
    head = list(islice(batches, 2))
    if workers > 1 and len(head) > 1:  # starting processes takes longer than a single batch
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        for position, texts in chain(head, batches):
            name = sources[position.source].units[position.unit]
            # A worker started here inherits the blocked SIGINT, so it ends with its parent and not by Ctrl-C.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                pending.append((position, pool.submit(encode_batch, texts, seed, position.source, name)))
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
    """End this process when its parent ends, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encode_batch(texts: list[str], seed: int, source: int, name: str) -> list[Document]:
    """Encode documents from the unit `name` of a source. Lone surrogates become U+FFFD."""
    tokenizer = load_tokenizer()
    mark = TOKEN_DTYPE.type(tokenizer.end_of_text).tobytes()
    encoded = []
    for text in texts:
        replaced_in, replaced = None, 0
        if not text or text.isspace():
            encoded.append(Document())
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError:
            mended = replace_surrogates(text)
            replaced = mended.count("\ufffd") - text.count("\ufffd")
            text, data, replaced_in = mended, mended.encode(), name
        ids = mark + tokenizer.encode_to_numpy(text).tobytes()
        # The chance that two of ten million different documents share a key is 1e-24.
        key = hashlib.blake2b(data, digest_size=16, key=str(seed).encode()).digest()
        encoded.append(Document(key, ids, len(data), source, replaced_in, replaced))
    return encoded


class SortedDocuments:
    """All documents sorted by key. Equal documents form a group, which stays in one shard."""

    def __init__(self, work: Path, journal: Journal, drop_duplicates: bool) -> None:
        """Read all records, and keep only the first of equal documents if `drop_duplicates`. Raises StorageError."""
        self._path = work / TOKENS
        with storage_errors(work / RECORDS, "read"):
            records = np.fromfile(work / RECORDS, RECORD, journal.counts["documents"])
        begins = np.cumsum(records["tokens"], dtype=np.int64) - records["tokens"]
        order = np.argsort(records["key"], kind="stable")
        starts = np.unique(records["key"][order], return_index=True)[1]
        if drop_duplicates:
            order, starts = order[starts], np.arange(len(starts))
        self.records, self._begins, self._starts = records[order], begins[order], np.append(starts, len(order))
        self.group_tokens = np.add.reduceat(self.records["tokens"].astype(np.int64), starts)

    def read(self, groups: np.ndarray) -> tuple[np.ndarray, Iterator[np.ndarray]]:
        """Return records and tokens of the documents in these groups, in order. The iterator raises StorageError."""
        firsts, sizes = self._starts[groups], self._starts[groups + 1] - self._starts[groups]
        # Consecutive places from each group's first document.
        places = np.arange(sizes.sum()) + np.repeat(firsts - (np.cumsum(sizes) - sizes), sizes)
        return self.records[places], self._tokens(places)

    def _tokens(self, places: np.ndarray) -> Iterator[np.ndarray]:
        size = TOKEN_DTYPE.itemsize
        begins, counts = self._begins[places].tolist(), self.records["tokens"][places].tolist()
        with storage_errors(self._path, "read"), open(self._path, "rb") as file:
            for begin, count in zip(begins, counts, strict=True):
                file.seek(begin * size)
                content = file.read(count * size)
                if len(content) < count * size:
                    raise StorageError(f"Cannot use the unfinished work: {self._path} has changed. Rerun.")
                yield np.frombuffer(content, TOKEN_DTYPE)


def plan_shards(group_tokens: np.ndarray, tokens_per_shard: int) -> list[np.ndarray]:
    """Divide groups of equal documents into shards, validation first; return the group numbers of each shard.

    A shard holds at most `tokens_per_shard` tokens, or one longer group. Raises UserError for fewer than two groups.
    """
    if len(group_tokens) < 2:
        raise UserError(
            f"Cannot divide {len(group_tokens)} document(s), not counting empty and repeated ones: at least two are "
            "needed, one to validate and one to train. Give more text, raise the limit, or split the file yourself: "
            f"only a .txt or .md file of more than {LONG_TEXT:,} characters is divided, at ends of paragraphs."
        )
    total = int(group_tokens.sum())
    share = max(total // _VALIDATION_SHARE, min(total // _SMALL_VALIDATION_SHARE, _USEFUL_VALIDATION_TOKENS))
    limit = min(tokens_per_shard, share)
    # Validation begins with a group that fits, so that it does not take a long document when a short one will do.
    fitting = group_tokens <= limit
    begin = int(np.argmax(fitting)) if fitting.any() else int(np.argmin(group_tokens))
    end = begin + next(_cuts(group_tokens[begin:], limit))
    training = np.delete(np.arange(len(group_tokens)), np.s_[begin:end])
    cuts = list(_cuts(group_tokens[training], tokens_per_shard))
    shards = [np.arange(begin, end), *np.split(training, cuts[:-1])]
    if len(shards) > _MOST_SHARDS:
        raise UserError(
            f"Cannot divide {total:,} tokens into {len(shards):,} shards: the maximum is {_MOST_SHARDS:,}. Use at "
            f"least --tokens-per-shard {-(-total // _MOST_SHARDS) * 2}."
        )
    return shards


def write_shards(documents: SortedDocuments, request: Request, folder: Path) -> tuple[Shard, ...]:
    """Write and return all shards. Raises UserError like `plan_shards`, and StorageError."""
    plans, prefix = plan_shards(documents.group_tokens, request.tokens_per_shard), "+".join(request.sources)
    say(f"writing {len(plans)} shards")
    shards = []
    for index, groups in enumerate(plans):
        records, tokens = documents.read(groups)
        n_tokens, text_bytes = int(records["tokens"].sum()), int(records["text_bytes"].sum())
        file, sha256 = write_shard(folder, prefix, index, n_tokens, tokens)
        first, last = (key.ljust(16, b"\0").hex() for key in (records["key"][0], records["key"][-1]))
        split = "train" if index else "validation"
        shards.append(Shard(file, split, n_tokens, len(records), text_bytes, sha256, first, last))
    return tuple(shards)


def _batches(sources: Sequence[Source], start: Position) -> Iterator[tuple[Position, list[str]]]:
    """Yield all batches after `start`, each with the position after it."""
    for number, source in enumerate(sources):
        for unit in range(len(source.units)):
            if (number, unit) >= start[:2]:
                skip = start.batch if (number, unit) == start[:2] else 0
                for count, texts in enumerate(islice(_batched(source.texts(unit)), skip, None), start=skip + 1):
                    yield Position(number, unit, count), texts


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of about _BATCH_CHARS characters."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text) + 1
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _within_limits(batch: list[Document], request: Request, journal: Journal) -> list[Document]:
    """Return the documents of `batch` that the request's limits allow, and count them."""
    counts, most_tokens = journal.counts, request.max_tokens or math.inf
    for number, document in enumerate(batch):
        is_one_too_many = (
            counts["documents"] == request.max_documents or counts["tokens"] + document.tokens > most_tokens
        )
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
