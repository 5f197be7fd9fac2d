"""Documents become ids in their order, whoever encodes them, and no more of them are held than needed."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from src.data_processing.encoding import EncodedBatch, encode_all, encode_batch
from src.data_processing.file_formats import Texts
from src.data_processing.tokenizer import load_tokenizer
from src.utils.errors import UserError
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing.documents import MODULE, some_texts, write_json_lines


def test_a_batch_holds_ids_lengths_and_keys() -> None:
    texts = ["one two", "", " \n", "caf\udce9", "three"]
    batch = encode_batch(Texts(texts), seed=7)
    clean = ["one two", "caf\ufffd", "three"]
    ids = [[50256, *load_tokenizer().encode(text)] for text in clean]
    assert batch.tokens.tolist() == list(chain.from_iterable(ids))
    assert batch.tokens.dtype == np.uint16
    assert batch.token_counts.tolist() == [len(i) for i in ids]
    assert batch.text_bytes.tolist() == [7, 6, 5]
    assert (batch.documents, batch.skipped_empty, batch.replaced_invalid) == (3, 2, 1)
    expected = [hashlib.blake2b(text.encode(), digest_size=16, key=b"7").digest() for text in clean]
    assert [bytes(key.astype(">u8")) for key in batch.keys] == expected


def test_the_first_documents_of_a_batch() -> None:
    batch = encode_batch(Texts(some_texts(10)), seed=0)
    same(batch.first(4), encode_batch(Texts(some_texts(10)[:4]), seed=0))
    assert batch.first(0).tokens.size == batch.first(0).documents == 0


def test_only_wanted_keys_are_encoded_but_all_documents_are_counted() -> None:
    texts = some_texts(40)
    whole = encode_batch(Texts(texts), seed=0)
    keys = sorted(bytes(key.astype(">u8")) for key in whole.keys)
    part = encode_batch(Texts(texts), seed=0, wanted=[(keys[3], keys[5]), (keys[9], keys[9])])
    assert sorted(bytes(key.astype(">u8")) for key in part.keys) == [*keys[3:6], keys[9]]
    assert part.documents == 40
    assert [texts[number] for number in part.numbers] == load_tokenizer().decode(part.tokens.tolist()).split(
        "<|endoftext|>"
    )[1:]
    assert len(part.first(20).token_counts) == sum(number < 20 for number in part.numbers)


@pytest.mark.parametrize("workers", [1, 2])
def test_labels_and_order_are_kept(workers: int) -> None:
    lists = [some_texts(30, seed=number) for number in range(20)]
    found = list(encode_all(enumerate(map(Texts, lists)), workers, seed=0, ahead=3))
    assert [label for label, _ in found] == list(range(20))
    for (_, batch), texts in zip(found, lists, strict=True):
        same(batch, encode_batch(Texts(texts), seed=0))


@pytest.mark.parametrize(("workers", "ahead", "held"), [(1, 7, 5), (2, 7, 7), (2, 12, 12)])
def test_memory_does_not_grow_with_the_corpus(workers: int, ahead: int, held: int) -> None:
    """Batches are read as they are asked for, not before; `held` counts those at the first result."""
    taken = 0

    def batches() -> Iterator[tuple[int, Texts]]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number, Texts(["word " * 20_000])

    encoded = encode_all(batches(), workers, seed=0, ahead=ahead)
    counts = []
    for _ in range(8):
        next(encoded)
        counts.append(taken)
    encoded.close()  # type: ignore[attr-defined]
    assert counts == [max(5, number) if workers == 1 else held + number - 1 for number in range(1, 9)]


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    encoded = encode_all(((number, Texts(some_texts(200))) for number in range(100)), workers=2, seed=0, ahead=8)
    next(encoded)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(UserError, match="a worker process was killed, most likely for lack of memory"):
        list(encoded)
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_while_workers_start_is_one_line(tmp_path: Path, commands: Commands, delay_s: float) -> None:
    """To all processes, as a terminal sends it, so long after the first of them is there."""
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(500, words=20_000))
    command = [sys.executable, "-m", MODULE, "--source", "files", "--path", str(path), "--out", "x", "--workers", "4"]
    with subprocess.Popen(
        command, cwd=ROOT, env=commands.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            assert process.poll() is None, "ended before a process was started"
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=30)[1]  # to its end, which all that hold it open have come to
    assert process.returncode == 130
    assert said.splitlines()[-1:] == ["interrupted"], said
    assert "Traceback" not in said


def same(found: EncodedBatch, expected: EncodedBatch) -> None:
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), value)
