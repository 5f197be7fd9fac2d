"""Items from files, from the hub, and from held-out documents; refusals of every line that is not one."""

import gzip
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from huggingface_hub import constants as hub

from src.data_processing.tokenizer import load_tokenizer
from src.model_assessment.hellaswag_items import Item, fetch_items, held_out_items, load_items
from src.utils.errors import UserError

RECORD: dict[str, Any] = {
    "ind": 7,
    "ctx": "A man sits. then HE",
    "endings": ["stands up.", "is a roof.", "sings it.", "ate."],
    "label": 2,
    "activity_label": "Sitting",
    "ctx_a": "A man sits.",
    "ctx_b": "then HE",
}
PARTS = ("Sitting", "A man sits.", "then HE")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_files_are_read_plain_or_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"items{suffix}"
    text = "".join(json.dumps({**RECORD, "ind": ind, "other": None}) + "\n" for ind in range(3)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    items = load_items(path)
    assert items[1] == Item(1, RECORD["ctx"], ("stands up.", "is a roof.", "sings it.", "ate."), 2, *PARTS)
    assert [item.ind for item in items] == [0, 1, 2]
    assert load_items(path, limit=2) == items[:2]
    assert load_items(path, limit=9) == items


def test_the_parts_of_a_context_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({k: v for k, v in RECORD.items() if k != "ctx_b"} | {"activity_label": None}))
    (item,) = load_items(path)
    assert (item.activity_label, item.ctx_a, item.ctx_b) == (None, "A man sits.", None)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("not json", "'not json', not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ("[1, 2]", "'[1, 2]', not a JSON object"),
        (json.dumps({**RECORD, "label": 4}), "wrong: label."),
        (json.dumps({**RECORD, "label": True}), "wrong: label."),
        (json.dumps({**RECORD, "ind": "x", "ctx": " "}), "wrong: ind, ctx."),
        (json.dumps({**RECORD, "endings": ["a", "b", "c"]}), "wrong: endings."),
        (json.dumps({**RECORD, "endings": ["a", "b", "c", ""]}), "wrong: endings."),
        (json.dumps({k: v for k, v in RECORD.items() if k != "endings"}), "wrong: endings."),
        (json.dumps({**RECORD, "ctx_b": ["he"]}), "wrong: activity_label, ctx_a, ctx_b."),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        load_items(path)
    assert f"{path}, line 2: " in str(error.value)
    assert fault in str(error.value)
    assert "Needed: ind" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("absent.jsonl", None, "No such file"),
        ("not_gzip.jsonl.gz", json.dumps(RECORD).encode(), "gzip"),
        ("cut_short.jsonl.gz", gzip.compress(json.dumps(RECORD).encode() * 50, mtime=0)[:-20], "end-of-stream"),
        ("damaged.jsonl.gz", gzip.compress(b"x" * 9, mtime=0)[:10] + b"\xff" * 30, "decompressing"),
        ("binary.jsonl", b"\xff\xfe\x00", "codec"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_items(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_the_hubs_records_become_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)  # no look at the network
    records = [{**RECORD, "ind": ind, "label": "3"} for ind in range(3)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: {("Rowan/hellaswag", "validation"): records}[name, split]
    )
    assert fetch_items() == [Item(ind, RECORD["ctx"], tuple(RECORD["endings"]), 3, *PARTS) for ind in range(3)]
    assert len(fetch_items(2)) == 2


def test_an_unreachable_hub_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 does not answer.*local copy.*held-out"):
        fetch_items()
    assert time.monotonic() - started < 10


def test_the_real_validation_set(shared: Path) -> None:
    items = load_items(shared / "eval" / "hellaswag_val.jsonl.gz")
    assert len(items) == 10_042
    assert (items[0].ind, items[0].ctx, items[0].label) == (24, "A man is sitting on a roof. he", 3)
    assert items[0].endings[3] == "starts pulling up roofing on a roof."
    assert all(item.ctx == f"{item.ctx_a} {item.ctx_b}".strip() for item in items)


TOKENIZER = load_tokenizer()
WORDS = "the old river naïve, runs below (every) house; Zürich 1848 and `code` never\nstops talking  twice —about\tit"


def make_documents(count: int, words: int = 400, seed: int = 0) -> list[str]:
    """Prose of a kind: each document says its own number often, so that its passages can be told."""
    rng = random.Random(seed)
    vocabulary = WORDS.split(" ")
    return [" ".join(rng.choice([*vocabulary, f"doc{d}x"]) + str(i) for i in range(words)) for d in range(count)]


def as_shard(documents: list[str]) -> np.ndarray:
    ids = [i for document in documents for i in (TOKENIZER.end_of_text, *TOKENIZER.encode(document))]
    return np.array(ids, dtype=np.uint16)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return make_documents(12)


@pytest.fixture(scope="module")
def shard(documents: list[str]) -> np.ndarray:
    return as_shard(documents)


def test_the_right_ending_goes_on_and_the_wrong_ones_are_from_elsewhere(
    documents: list[str], shard: np.ndarray
) -> None:
    for item in held_out_items(shard, TOKENIZER, 60, seed=0):
        (home,) = [d for d, document in enumerate(documents) if item.ctx in document]
        assert f"{item.ctx} {item.endings[item.label]}" in documents[home]
        for ending in set(item.endings) - {item.endings[item.label]}:
            assert ending not in documents[home]
            assert any(f" {ending}" in document for document in documents)


def test_nothing_but_content_tells_the_endings_apart(documents: list[str], shard: np.ndarray) -> None:
    words = {word for document in documents for word in document.split()}
    items = held_out_items(shard, TOKENIZER, 60, seed=0)
    assert [item.ind for item in items] == list(range(60))
    for item in items:
        assert len(set(item.endings)) == 4
        assert {len(TOKENIZER.encode(" " + ending)) for ending in item.endings} == {16}
        assert 40 <= len(TOKENIZER.encode(" " + item.ctx)) <= 64
        for text in (item.ctx, *item.endings):
            assert text == text.strip()
            assert set(text.split()) <= words


def test_the_right_places_are_uniform(shard: np.ndarray) -> None:
    counts = Counter(item.label for seed in range(10) for item in held_out_items(shard, TOKENIZER, 100, seed))
    total = sum(counts.values())
    assert total > 500
    chi_square = sum((counts[label] - total / 4) ** 2 / (total / 4) for label in range(4))
    assert chi_square < 16.3  # the 99.9% point with 3 degrees of freedom; the seeds are fixed


def test_the_seed_decides(shard: np.ndarray) -> None:
    first = held_out_items(shard, TOKENIZER, 20, seed=1)
    assert held_out_items(shard.copy(), TOKENIZER, 20, seed=1) == first
    assert held_out_items(shard, TOKENIZER, 20, seed=2) != first


def test_a_short_text_gives_fewer_items_and_none_twice(shard: np.ndarray) -> None:
    items = held_out_items(shard, TOKENIZER, 100_000, seed=0)
    assert 60 < len(items) < len(shard) / 56
    assert len({item.endings[item.label] for item in items}) == len(items)


def test_boilerplate_is_not_right_and_wrong_at_once() -> None:
    """Half of the documents are the same text: an ending of one would be as right as the other's."""
    copies = as_shard(make_documents(4) + make_documents(4))
    items = held_out_items(copies, TOKENIZER, 1_000, seed=0)
    assert len({item.endings[item.label] for item in items}) == len(items)
    assert len(items) == len(held_out_items(as_shard(make_documents(4)), TOKENIZER, 1_000, seed=0))


@pytest.mark.parametrize("documents", [[], ["one word"] * 50, make_documents(3), make_documents(40, words=15)])
def test_too_few_documents_are_said(documents: list[str]) -> None:
    with pytest.raises(UserError, match=r": [0-3] held-out documents with .*hellaswag-items 0"):
        held_out_items(as_shard(documents), TOKENIZER, 10, seed=0)
