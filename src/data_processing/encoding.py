"""Texts -> token ids, in order, by any number of processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait

import numpy as np

from src.data_processing.tokenizer import load_tokenizer, replace_surrogates
from src.utils.errors import UserError

# Some 250,000 tokens: long enough to hide the cost of passing it between processes.
_BATCH_CHARS = 1_000_000


@dataclass(frozen=True)
class EncodedBatch:
    """Some documents of a corpus, in its order."""

    tokens: np.ndarray
    """All ids in a row, uint16, with the end-of-text token before each document."""
    token_counts: np.ndarray
    """Tokens of each document, its end-of-text token included; int64."""
    text_bytes: np.ndarray
    """UTF-8 bytes of each document; int64."""
    skipped_empty: int
    """Documents left out because they are empty or all white space."""
    replaced_invalid: int
    """Documents in which what is not UTF-8 became U+FFFD."""


def encode_all(texts: Iterable[str], workers: int) -> Iterator[EncodedBatch]:
    """Encodes `texts` in their order; the batches are the same for any number of processes.

    At most 2 * workers + 1 batches are held at a time. Raises UserError where a process was killed.
    """
    batches = _batched(texts)
    if workers == 1:
        yield from map(encode_batch, batches)
        return
    # Not forked: the sources may have started threads, and a fork copies the locks they hold.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        pending: deque[Future[EncodedBatch]] = deque()
        for batch in batches:
            pending.append(pool.submit(encode_batch, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, most likely for lack of memory; use fewer --workers") from None
    except BaseException:
        for child in active_children():  # or leaving would wait for the batches they are at
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def encode_batch(texts: list[str]) -> EncodedBatch:
    """Encodes `texts`, replacing lone surrogates by U+FFFD and leaving out what is empty."""
    tokenizer = load_tokenizer()
    mark = np.array([tokenizer.end_of_text], np.uint16)
    arrays: list[np.ndarray] = []
    text_bytes: list[int] = []
    replaced = 0
    for text in filter(str.strip, texts):
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            text = replace_surrogates(text)
            size = len(text.encode())
            replaced += 1
        arrays += [mark, tokenizer.encode_to_numpy(text)]
        text_bytes.append(size)
    return EncodedBatch(
        tokens=np.concatenate(arrays) if arrays else np.empty(0, np.uint16),
        token_counts=np.array([1 + ids.size for ids in arrays[1::2]], np.int64),
        text_bytes=np.array(text_bytes, np.int64),
        skipped_empty=len(texts) - len(text_bytes),
        replaced_invalid=replaced,
    )


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _start_worker() -> None:
    """Leaves Ctrl-C to the main process, and ends this one when the main process is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "not a worker"
    wait([parent.sentinel])
    os._exit(1)
