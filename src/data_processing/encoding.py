"""Documents -> token ids, in order, by any number of processes."""

import hashlib
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import TypeVar

import numpy as np

from src.data_processing.file_formats import Documents
from src.data_processing.tokenizer import load_tokenizer, replace_surrogates
from src.utils.errors import UserError

KEY_BYTES = 16
# Fewer batches than this aren't worth the start of processes, some 0.5 s.
_WORTH_PROCESSES = 5

KeyRange = tuple[bytes, bytes]
Encode = Callable[[Documents], "EncodedBatch"]
T = TypeVar("T")


@dataclass(frozen=True)
class EncodedBatch:
    """Some documents of a corpus, in its order."""

    tokens: np.ndarray
    """All ids in a row, uint16, with the end-of-text token before each document."""
    token_counts: np.ndarray
    """Tokens of each document, its end-of-text token included; int64."""
    text_bytes: np.ndarray
    """UTF-8 bytes of each document; int64."""
    keys: np.ndarray
    """Of each document, see `document_key`, as two numbers; uint64 of shape (documents, 2)."""
    numbers: np.ndarray
    """Which of the batch's non-empty documents each one is; int64. Not all are there where only some were wanted."""
    empty_before: np.ndarray
    """How many documents before each one were left out because they are empty or all white space; int64."""
    is_invalid: np.ndarray
    """Whether what is not UTF-8 in it became U+FFFD; bool."""
    documents: int
    """Documents of the batch that aren't empty."""
    skipped_empty: int
    """Documents of the batch that are."""

    @property
    def replaced_invalid(self) -> int:
        return int(self.is_invalid.sum())

    def first(self, documents: int) -> "EncodedBatch":
        """The batch without what comes after its first `documents` non-empty documents."""
        kept = int(np.searchsorted(self.numbers, documents))
        return EncodedBatch(
            self.tokens[: int(self.token_counts[:kept].sum())],
            self.token_counts[:kept],
            self.text_bytes[:kept],
            self.keys[:kept],
            self.numbers[:kept],
            self.empty_before[:kept],
            self.is_invalid[:kept],
            min(documents, self.documents),
            int(self.empty_before[kept - 1]) if kept else 0,
        )


def encode_all(
    batches: Iterable[tuple[T, Documents]],
    workers: int,
    seed: int,
    ahead: int,
    wanted: Sequence[KeyRange] | None = None,
) -> Iterator[tuple[T, EncodedBatch]]:
    """Encodes batches in their order, each with the label it came with; the same for any number of processes.

    With `wanted`, only documents whose key is in one of the ranges, ends included. Up to `ahead` batches, or 5, are
    read before the first of them is given. Raises UserError where a process was killed, and what reading raises.
    """
    encode = partial(encode_batch, seed=seed, wanted=wanted)
    batches = iter(batches)
    head = list(islice(batches, _WORTH_PROCESSES))
    if workers == 1 or len(head) < _WORTH_PROCESSES:
        yield from ((label, encode(documents)) for label, documents in chain(head, batches))
    else:
        yield from _encode_in_processes(chain(head, batches), workers, encode, ahead)


def encode_batch(documents: Documents, seed: int, wanted: Sequence[KeyRange] | None = None) -> EncodedBatch:
    """Encodes documents, replacing lone surrogates by U+FFFD and leaving out what is empty."""
    tokenizer = load_tokenizer()
    mark = np.array([tokenizer.end_of_text], np.uint16)
    arrays: list[np.ndarray] = []
    text_bytes: list[int] = []
    keys: list[bytes] = []
    numbers: list[int] = []
    empty_before: list[int] = []
    is_invalid: list[bool] = []
    read = full = 0
    for text in documents.texts():
        read += 1
        if not text or text.isspace():
            continue
        full += 1
        invalid = False
        try:
            data = text.encode()
        except UnicodeEncodeError:
            text = replace_surrogates(text)
            data = text.encode()
            invalid = True
        key = document_key(data, seed)
        if wanted is not None and not any(first <= key <= last for first, last in wanted):
            continue
        arrays += [mark, tokenizer.encode_to_numpy(text)]
        text_bytes.append(len(data))
        keys.append(key)
        numbers.append(full - 1)
        empty_before.append(read - full)
        is_invalid.append(invalid)
    return EncodedBatch(
        tokens=np.concatenate(arrays) if arrays else np.empty(0, np.uint16),
        token_counts=np.array([1 + ids.size for ids in arrays[1::2]], np.int64),
        text_bytes=np.array(text_bytes, np.int64),
        keys=np.frombuffer(b"".join(keys), ">u8").astype(np.uint64).reshape(-1, 2),
        numbers=np.array(numbers, np.int64),
        empty_before=np.array(empty_before, np.int64),
        is_invalid=np.array(is_invalid, bool),
        documents=full,
        skipped_empty=read - full,
    )


def document_key(data: bytes, seed: int) -> bytes:
    """The document's place in the dataset's order: 16 bytes that look random and follow from its UTF-8 and the seed.

    Equal documents have the same key; different ones do not (a chance of 1e-24 for ten million documents).
    """
    return hashlib.blake2b(data, digest_size=KEY_BYTES, key=str(seed).encode()).digest()


def _encode_in_processes(
    batches: Iterable[tuple[T, Documents]], n_workers: int, encode: Encode, ahead: int
) -> Iterator[tuple[T, EncodedBatch]]:
    workers: list[_Worker] = []
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def encode_elsewhere(documents: Documents) -> EncodedBatch:
        worker = idle.get()
        try:
            return worker.encode(documents)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(n_workers)  # each waits for one process at a time
    try:
        with _interrupt_for_us_alone():
            workers += [_Worker(encode) for _ in range(n_workers)]
        for worker in workers:
            idle.put(worker)
        pending: deque[tuple[T, Future[EncodedBatch]]] = deque()
        for label, documents in batches:
            pending.append((label, threads.submit(encode_elsewhere, documents)))
            if len(pending) >= ahead:
                label, batch = pending.popleft()
                yield label, batch.result()
        while pending:
            label, batch = pending.popleft()
            yield label, batch.result()
    finally:
        for worker in workers:
            worker.end()
        threads.shutdown(cancel_futures=True)


@contextmanager
def _interrupt_for_us_alone() -> Iterator[None]:
    """Ctrl-C is for the main process: those started inside never see it, from their first instruction on.

    Here it waits until the block ends, because it would leave a process behind that was given half of what it needs.
    """
    asked: list[int] = []
    resource_tracker.ensure_running()  # or the first start does that, and unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which a new process inherits
    handler = signal.getsignal(signal.SIGINT)
    # A thread's mask does not keep the signal from other threads; its handler runs in the main one.
    waits = callable(handler) and threading.current_thread() is threading.main_thread()
    if waits:
        signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        if waits:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if asked:
            signal.raise_signal(signal.SIGINT)


class _Worker:
    """A process that encodes. Not concurrent.futures': its pool can wait for ever for workers that were ended."""

    def __init__(self, encode: Encode) -> None:
        # Not forked: the sources may have started threads, and a fork copies the locks they hold.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, encode), daemon=True)
        self._process.start()
        theirs.close()

    def encode(self, documents: Documents) -> EncodedBatch:
        """Raises UserError where the process was killed, and what encoding raises."""
        try:
            self._connection.send(documents)
            outcome = self._connection.recv()
        except (EOFError, OSError):
            raise UserError(
                "a worker process was killed, most likely for lack of memory; use fewer --workers"
            ) from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def end(self) -> None:
        self._process.kill()  # whatever batch it is at
        self._process.join()


def _serve(connection: Connection, encode: Encode) -> None:
    """Encodes what comes, until the other end is gone, and be it by SIGKILL."""
    with suppress(EOFError, OSError):
        while True:
            documents = connection.recv()
            try:
                outcome: EncodedBatch | Exception = encode(documents)
            except Exception as error:
                outcome = error
            connection.send(outcome)
