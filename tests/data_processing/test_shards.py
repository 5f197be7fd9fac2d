"""A damaged dataset is refused with path, expected and actual; a sound one reads back as written."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data_processing.shards import (
    Manifest,
    check_shard,
    read_manifest,
    stray_files,
    unlisted_files,
    write_manifest,
    write_shard,
)
from src.data_processing.shards import Shard as ShardEntry
from src.utils.errors import UserError
from tests.conftest import manifest_of

N_VOCAB = 50_257
TOTALS = {"tokens": 3_000_150, "documents": 6, "text_bytes": 1_200}


def make_dataset(folder: Path) -> Manifest:
    """Three shards of 100, 3,000,000 and 50 tokens."""
    shards = []
    for index, tokens in enumerate((100, 3_000_000, 50)):
        ids = np.random.default_rng(index).integers(0, N_VOCAB, tokens).astype(np.uint16)
        file, sha256 = write_shard(folder, "test", index, tokens, np.array_split(ids, 3))
        split = "train" if index else "validation"
        shards.append(ShardEntry(file, split, tokens, 2, 400, sha256, "0" * 32, "f" * 32))
    write_manifest(folder, manifest_of(shards))
    return read_manifest(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make_dataset(tmp_path)
    return tmp_path


def check_all(folder: Path, full: bool) -> None:
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        check_shard(folder, shard, manifest.n_vocab, full)


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_reads_back(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    assert [shard.file for shard in manifest.validation] == ["test_i_000000_t_100.npy"]
    assert [shard.tokens for shard in manifest.train] == [3_000_000, 50]
    assert manifest.sha256 == hashlib.sha256((dataset / "manifest.json").read_bytes()).hexdigest()
    for index, shard in enumerate(manifest.shards):
        array = np.load(dataset / shard.file)
        assert array.dtype == np.dtype("<u2")
        np.testing.assert_array_equal(array, np.random.default_rng(index).integers(0, N_VOCAB, shard.tokens))
        assert hashlib.sha256((dataset / shard.file).read_bytes()).hexdigest() == shard.sha256
    check_all(dataset, full=True)
    assert unlisted_files(dataset, manifest) == []


def test_strays_are_listed(dataset: Path) -> None:
    assert stray_files(dataset, read_manifest(dataset)) is None
    (dataset / "notes.txt").touch()
    (dataset / ".DS_Store").touch()
    (dataset / "test_i_000003_t_9.npy").touch()
    assert unlisted_files(dataset, read_manifest(dataset)) == ["notes.txt", "test_i_000003_t_9.npy"]
    said = stray_files(dataset, read_manifest(dataset))
    assert said == f"ignoring 2 file(s) in {dataset} that its manifest does not list: notes.txt, test_i_000003_t_9.npy"


def test_ids_of_another_type_are_not_written(tmp_path: Path) -> None:
    """65,536 would become 0."""
    with pytest.raises(AssertionError, match="would wrap around"):
        write_shard(tmp_path, "test", 0, 1, [np.array([65_536])])


def test_origins_are_the_sources_without_their_files(dataset: Path) -> None:
    sources = [
        {"name": "files", "path": "x", "files": [{"path": "x/a"}]},
        {"name": "hub", "hub_files": [], "profiles": 1},
    ]
    edit_manifest(dataset, sources=sources)
    assert read_manifest(dataset).origins == [{"name": "files", "path": "x"}, {"name": "hub", "profiles": 1}]


@pytest.mark.parametrize(
    ("size_change", "message"),
    [
        pytest.param(-1, "expected 228 bytes, found 227.*cut short", id="a byte short"),
        pytest.param(2, "expected 228 bytes, found 230.*don't belong", id="trailing bytes"),
        pytest.param(-228, "expected a .npy file of 50 uint16 tokens, found an empty file", id="empty"),
        pytest.param(-200, "expected a .npy file .* found 28 bytes that are not", id="half a header"),
    ],
)
def test_a_wrong_size_is_found_without_reading_the_shard(dataset: Path, size_change: int, message: str) -> None:
    path = dataset / "test_i_000002_t_50.npy"
    os.truncate(path, path.stat().st_size + size_change)
    with pytest.raises(UserError, match=f"{path}: {message}"):
        check_all(dataset, full=False)


def test_another_dtype_or_shape_is_named(dataset: Path) -> None:
    path = dataset / "test_i_000002_t_50.npy"
    np.save(path, np.zeros(50, np.int32))
    with pytest.raises(UserError, match="expected dtype uint16, found int32"):
        check_all(dataset, full=False)
    np.save(path, np.zeros((5, 10), np.uint16))
    with pytest.raises(UserError, match=r"expected shape \(50,\), found \(5, 10\)"):
        check_all(dataset, full=False)
    path.write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(UserError, match="found 204 bytes that are not"):
        check_all(dataset, full=False)


def test_a_missing_shard_is_named(dataset: Path) -> None:
    (dataset / "test_i_000001_t_3000000.npy").unlink()
    with pytest.raises(UserError, match=r"test_i_000001_t_3000000.npy is missing: expected .* 3000000 tokens"):
        check_all(dataset, full=False)


def test_changed_content_is_found_by_its_hash(dataset: Path) -> None:
    path = dataset / "test_i_000001_t_3000000.npy"
    array = np.load(path, mmap_mode="r+")
    array[2_900_000] = (array[2_900_000] + 1) % N_VOCAB
    array.flush()
    check_all(dataset, full=False)
    with pytest.raises(UserError, match=f"{path}: expected sha256 [0-9a-f]+, found [0-9a-f]+"):
        check_all(dataset, full=True)


def test_an_id_outside_the_vocabulary_is_found(dataset: Path) -> None:
    array = np.load(dataset / "test_i_000001_t_3000000.npy", mmap_mode="r+")
    array[2_900_000] = N_VOCAB
    array[2_950_000] = 65_535
    array.flush()
    with pytest.raises(UserError, match="token 2900000 is 50257; expected ids below 50257"):
        check_all(dataset, full=True)


def test_no_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset at .*data_downloader"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(UserError, match="did not finish"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "has format 1; this program reads format 2; delete the folder"),
        ({"shards": []}, "needs a validation shard first"),
        ({"counts": TOTALS | {"tokens": 1}}, "hold 3000150 tokens, its total says 1"),
        ({"counts": TOTALS | {"documents": 7}}, "hold 6 documents, its total says 7"),
        ({"counts": TOTALS | {"text_bytes": 0}}, "hold 1200 bytes of text, its total says 0"),
        ({"counts": {"tokens": 3_000_150}}, "damaged.*documents"),
        ({"surprise": 1}, "damaged.*surprise"),
        ({"shards": [{"file": "x"}]}, "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(dataset: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(dataset, **changes)
    with pytest.raises(UserError, match=message):
        read_manifest(dataset)


def test_a_manifest_cannot_lead_out_of_its_folder(dataset: Path) -> None:
    shards = json.loads((dataset / "manifest.json").read_text())["shards"]
    shards[0]["file"] = "../test_i_000000_t_100.npy"
    edit_manifest(dataset, shards=shards)
    with pytest.raises(UserError, match="not the name of a shard"):
        read_manifest(dataset)
    (dataset / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_manifest(dataset)
