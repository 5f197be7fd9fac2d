"""What went into the runs comes back in the order of the keys, whatever its size and the runs' borders."""

from pathlib import Path

import numpy as np
import pytest

from src.data_processing import document_sort
from src.data_processing.document_sort import read_states, sort_documents, write_run
from src.data_processing.encoding import EncodedBatch
from src.utils.errors import StorageError


def some_batch(documents: int, rng: np.random.Generator, keys: np.ndarray | None = None) -> EncodedBatch:
    counts = rng.integers(1, 90, documents)
    if keys is None:
        keys = rng.integers(0, 2**64, (documents, 2), dtype=np.uint64, endpoint=False)
    tokens = rng.integers(0, 50_000, counts.sum()).astype(np.uint16)
    return EncodedBatch(
        tokens, counts, counts * 4, keys, np.arange(documents), np.zeros(documents), np.zeros(documents), documents, 0
    )


def as_documents(batch: EncodedBatch) -> list[tuple[int, int, list[int]]]:
    parts = np.split(batch.tokens, np.cumsum(batch.token_counts)[:-1])
    return [(int(k[0]), int(k[1]), part.tolist()) for k, part in zip(batch.keys, parts, strict=True)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_sort, "_SLICE_DOCUMENTS", 64)
    monkeypatch.setattr(document_sort, "_CHUNK_TOKENS", 500)


@pytest.mark.usefixtures("small")
def test_documents_come_back_sorted_by_key(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches = [some_batch(size, rng) for size in (700, 1, 30, 1_000)]
    write_run(tmp_path, 0, [(0, batches[0]), (1, batches[1])], {"n": 1})
    write_run(tmp_path, 1, [(1, batches[2]), (0, batches[3])], {"n": 2})
    assert [state["n"] for state in read_states(tmp_path)] == [1, 2]
    found = sort_documents(tmp_path, drop_duplicates=False)
    expected = sorted(document for batch in batches for document in as_documents(batch))
    assert [tuple(key) for key in found.records["key"].tolist()] == [document[:2] for document in expected]
    assert len(list(found)) > 16
    np.testing.assert_array_equal(np.concatenate(list(found)), found.records)
    for begin, end in ((0, 1_731), (10, 11), (600, 1_500), (1_731, 1_731)):
        tokens = [token for array in found.tokens(begin, end) for token in array.tolist()]
        assert tokens == [token for document in expected[begin:end] for token in document[2]]
    assert found.records["source"].sum() == 31


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("drop", [True, False])
def test_equal_keys_stay_in_one_slice_and_only_one_is_left_if_asked(tmp_path: Path, drop: bool) -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 2**64, (300, 2), dtype=np.uint64, endpoint=False)
    keys[:3] = [(0, 0), (2**64 - 1, 2**64 - 1), (2**60, 5)]
    repeated = keys[rng.integers(0, 300, 900)]
    for run in range(3):
        write_run(tmp_path, run, [(0, some_batch(300, rng, repeated[run * 300 : run * 300 + 300]))], {})
    found = sort_documents(tmp_path, drop_duplicates=drop)
    different = len(np.unique(repeated, axis=0))
    assert len(found.records) == (different if drop else 900)
    assert found.dropped_duplicates == (900 - different if drop else 0)
    per_slice = [{tuple(key) for key in records["key"].tolist()} for records in found]
    assert sum(map(len, per_slice)) == different


def test_no_documents_are_no_documents(tmp_path: Path) -> None:
    write_run(tmp_path, 0, [(0, some_batch(0, np.random.default_rng(0)))], {})
    write_run(tmp_path, 1, [], {})
    found = sort_documents(tmp_path, drop_duplicates=True)
    assert len(found.records) == sum(map(len, found)) == 0


def test_tokens_that_are_not_needed_again_are_deleted(tmp_path: Path) -> None:
    write_run(tmp_path, 0, [(0, some_batch(2_000, np.random.default_rng(2)))], {})
    found = sort_documents(tmp_path, drop_duplicates=False)
    rest = [token for array in found.tokens(1_200, 2_000) for token in array.tolist()]
    found.forget(0, 1_200)
    assert 5 < len(list(tmp_path.glob("*.tokens_*"))) < 9
    assert [token for array in found.tokens(1_200, 2_000) for token in array.tolist()] == rest
    found.forget(1_200, 2_000)
    assert list(tmp_path.glob("*.tokens_*")) == []


def test_files_that_fail_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, 0, [(0, some_batch(200, np.random.default_rng(3)))], {})
    found = sort_documents(tmp_path, drop_duplicates=False)
    (tmp_path / "run_000000.tokens_0").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"cannot read .*/run_000000.tokens_0: No such file or directory; "):
        list(found.tokens(0, 200))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match=r"cannot delete .*/run_000000.tokens_1: Permission denied; "):
        found.forget(0, 200)
