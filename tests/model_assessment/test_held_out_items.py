"""Items that only their context can answer, made from held-out documents."""

import random
from collections import Counter

import numpy as np
import pytest

from src.data_processing.tokenizer import load_tokenizer
from src.model_assessment.held_out_items import held_out_items
from src.utils.errors import UserError

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


def test_the_right_ending_continues_the_text_and_the_wrong_ones_do_not(documents: list[str], shard: np.ndarray) -> None:
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
