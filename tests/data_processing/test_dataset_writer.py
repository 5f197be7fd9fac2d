"""How documents are divided into shards."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from src.data_processing.dataset_writer import ShardPlan, plan_shards
from src.data_processing.document_sort import RECORD, SortedDocuments
from src.data_processing.preparation import prepare
from src.data_processing.tokenizer import load_tokenizer
from src.utils.errors import UserError
from tests.data_processing.documents import (
    all_decoded,
    decoded,
    request,
    some_texts,
    write_json_lines,
)


def greedily(groups: list[tuple[int, int, int]], limit: int) -> list[ShardPlan]:
    """Shards of as many whole groups in a row as fit; a group is from, to and tokens of equal documents."""
    shards: list[list[tuple[int, int, int]]] = []
    for group in groups:
        if not shards or sum(tokens for _, _, tokens in [*shards[-1], group]) > limit:
            shards.append([])
        shards[-1].append(group)
    plans = []
    for shard in shards:
        numbers = [number for begin, end, _ in shard for number in range(begin, end)]
        begins = [number for number in numbers if number - 1 not in numbers]
        ends = [number + 1 for number in numbers if number + 1 not in numbers]
        plans.append(ShardPlan(tuple(zip(begins, ends, strict=True)), sum(tokens for _, _, tokens in shard)))
    return plans


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tokens_per_shard", [1, 300, 1_500, 10**9])
def test_the_plan_is_that_of_a_plain_loop(tmp_path: Path, tokens_per_shard: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = np.zeros(120, RECORD)
    records["key"][:, 0] = np.sort(rng.integers(0, 90, 120))
    records["tokens"] = rng.integers(1, 100, 120) * rng.choice([1, 30], 120, p=[0.9, 0.1])
    edges = np.flatnonzero(np.diff(records["key"][:, 0])) + 1
    bounds = [0, *edges.tolist(), 120]
    slices = (0, *sorted(rng.choice(edges, 3, replace=False).tolist()), 120)
    found = plan_shards(SortedDocuments(tmp_path, records, slices, 0), tokens_per_shard)

    tokens = records["tokens"].tolist()
    groups = [(begin, end, sum(tokens[begin:end])) for begin, end in itertools.pairwise(bounds)]
    limit = min(tokens_per_shard, max(sum(tokens) // 20, min(sum(tokens) // 4, 16_384)))
    first = next((n for n, group in enumerate(groups) if group[2] <= limit), None)
    if first is None:
        first = min(range(len(groups)), key=lambda n: groups[n][2])
    validation = greedily(groups[first:], limit)[0]
    [(begin, end)] = validation.ranges
    rest = [group for group in groups if not begin <= group[0] < end]
    assert found == [validation, *greedily(rest, tokens_per_shard)]


def test_every_document_is_in_one_shard_whole(tmp_path: Path) -> None:
    texts = some_texts(500)
    manifest = prepare(
        request(write_json_lines(tmp_path / "a.jsonl", texts), tokens_per_shard=7_000), tmp_path / "out", 1
    )
    found = [decoded(tmp_path / "out", shard.file) for shard in manifest.shards]
    assert sorted(all_decoded(tmp_path / "out")) == sorted(texts)
    assert all_decoded(tmp_path / "out") != texts, "not shuffled"
    for shard, documents in zip(manifest.shards, found, strict=True):
        assert shard.tokens == len(np.load(tmp_path / "out" / shard.file)) <= 7_000
        assert (shard.documents, shard.text_bytes) == (len(documents), len("".join(documents).encode()))
    assert manifest.counts["documents"] == 500
    assert manifest.counts["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest.counts["tokens"] == sum(len(load_tokenizer().encode(text)) + 1 for text in texts)


def test_validation_is_a_modest_share(tmp_path: Path) -> None:
    """A twentieth; of a small corpus up to a quarter; never more than a shard."""
    for count, low, high in ((100, 0.20, 0.25), (10_000, 0.045, 0.05)):
        path = write_json_lines(tmp_path / f"{count}.jsonl", some_texts(count))
        manifest = prepare(request(path), tmp_path / str(count), 1)
        assert low < manifest.shards[0].tokens / manifest.counts["tokens"] <= high
        assert [shard.split for shard in manifest.shards] == ["validation", "train"]
    manifest = prepare(request(path, tokens_per_shard=5_000), tmp_path / "capped", 1)
    assert 4_900 < manifest.shards[0].tokens <= 5_000


def test_seeds_decide_the_order(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    orders = [
        decoded(tmp_path / out, prepare(request(path, seed=seed), tmp_path / out, 1).shards[1].file)
        for out, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_shard_that_begins_with_a_long_document_takes_no_more(tmp_path: Path) -> None:
    """For any number of tokens a shard may hold; and validation never takes all."""
    texts = some_texts(30, words=500) + some_texts(3, words=9_000, seed=1)
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    for limit in (1, 400, 700, 3_000, 20_000):
        manifest = prepare(request(path, tokens_per_shard=limit), tmp_path / str(limit), 1)
        for shard in manifest.shards:
            assert shard.tokens <= limit or shard.documents == 1
    for seed in range(30):
        few = request(write_json_lines(tmp_path / "few.jsonl", texts[-2:]), seed=seed)
        manifest = prepare(few, tmp_path / f"few {seed}", 1)
        assert [shard.documents for shard in manifest.shards] == [1, 1]


def test_equal_documents_are_never_on_both_sides(tmp_path: Path) -> None:
    """Whether they are dropped or not."""
    texts = some_texts(200) * 3 + ["once"]
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    kept = prepare(request(path, tokens_per_shard=3_000), tmp_path / "kept", 1)
    assert sorted(all_decoded(tmp_path / "kept")) == sorted(texts)
    sides = [set(decoded(tmp_path / "kept", shard.file)) for shard in kept.shards]
    assert len(sides) > 5
    assert sum(map(len, sides)) == len(set.union(*sides)) == 201
    dropped = prepare(request(path, drop_duplicates=True), tmp_path / "dropped", 1)
    assert sorted(all_decoded(tmp_path / "dropped")) == sorted(set(texts))
    assert (dropped.counts["dropped_duplicates"], dropped.counts["documents_read"]) == (400, 601)


def test_the_order_of_the_files_does_not_matter(tmp_path: Path) -> None:
    texts = some_texts(100)
    for name, part in (("a", texts), ("b", texts[::-1])):
        write_json_lines(tmp_path / f"{name}.jsonl", part)
        prepare(request(tmp_path / f"{name}.jsonl"), tmp_path / name, 1)
    assert all_decoded(tmp_path / "a") == all_decoded(tmp_path / "b")


@pytest.mark.parametrize("texts", [[], ["one"], ["the same", "the same"]])
def test_one_document_is_not_enough(tmp_path: Path, texts: list[str]) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match="at least two are needed"):
        prepare(request(path), tmp_path / "out", 1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_long_document_is_not_validation_where_a_short_one_will_do(tmp_path: Path) -> None:
    """Whatever the order in which the seed shuffles them."""
    for seed in range(4):
        folder = tmp_path / f"texts {seed}"
        folder.mkdir()
        (folder / "long.txt").write_text("word " * 20_000)
        (folder / "short.txt").write_text("other " * 500)
        manifest = prepare(request(folder, seed=seed), tmp_path / f"out {seed}", 1)
        assert manifest.validation[0].tokens < 1_000
        assert manifest.train[0].tokens > 19_000
