"""A damaged dataset is refused with path, expected and actual; a sound one reads back as written."""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data_processing import shards
from src.data_processing.shards import (
    STAMP,
    Manifest,
    check_shard,
    ensure_verified,
    read_manifest,
    shard_fault,
    stray_files,
    write_manifest,
    write_shard,
)
from src.data_processing.shards import Shard as ShardEntry
from src.utils.errors import StoppedError, UserError
from tests.conftest import manifest_of

N_VOCAB = 50_257
TOTALS = {"tokens": 3_000_150, "documents": 6, "text_bytes": 1_200}


def make_dataset(folder: Path) -> Manifest:
    """Three shards of 100, 3,000,000 and 50 tokens."""
    entries = []
    for index, tokens in enumerate((100, 3_000_000, 50)):
        ids = np.random.default_rng(index).integers(0, N_VOCAB, tokens).astype(np.uint16)
        file, sha256 = write_shard(folder, "test", index, tokens, np.array_split(ids, 3))
        split = "train" if index else "validation"
        entries.append(ShardEntry(file, split, tokens, 2, 400, sha256, "0" * 32, "f" * 32))
    write_manifest(folder, manifest_of(entries))
    return read_manifest(folder)


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    make_dataset(tmp_path)
    return tmp_path


def check_all(folder: Path, full: bool) -> None:
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        check_shard(folder, shard, manifest.n_vocab, full)


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_reads_back(three_shards: Path) -> None:
    manifest = read_manifest(three_shards)
    assert [shard.file for shard in manifest.validation] == ["test_i_000000_t_100.npy"]
    assert [shard.tokens for shard in manifest.train] == [3_000_000, 50]
    assert manifest.sha256 == hashlib.sha256((three_shards / "manifest.json").read_bytes()).hexdigest()
    for index, shard in enumerate(manifest.shards):
        array = np.load(three_shards / shard.file)
        assert array.dtype == np.dtype("<u2")
        np.testing.assert_array_equal(array, np.random.default_rng(index).integers(0, N_VOCAB, shard.tokens))
        assert hashlib.sha256((three_shards / shard.file).read_bytes()).hexdigest() == shard.sha256
    check_all(three_shards, full=True)
    assert stray_files(three_shards, manifest) is None


def test_strays_are_listed(three_shards: Path) -> None:
    assert stray_files(three_shards, read_manifest(three_shards)) is None
    (three_shards / "notes.txt").touch()
    (three_shards / ".DS_Store").touch()
    (three_shards / "test_i_000003_t_9.npy").touch()
    said = stray_files(three_shards, read_manifest(three_shards))
    assert (
        said
        == f"ignoring 2 file(s) in {three_shards} that its manifest does not list: notes.txt, test_i_000003_t_9.npy"
    )


@pytest.mark.parametrize(
    ("size_change", "message"),
    [
        pytest.param(-1, "expected 228 bytes, found 227.*cut short", id="a byte short"),
        pytest.param(2, "expected 228 bytes, found 230.*don't belong", id="trailing bytes"),
        pytest.param(-228, "expected a .npy file of 50 uint16 tokens, found an empty file", id="empty"),
        pytest.param(-200, "expected a .npy file .* found 28 bytes that are not", id="half a header"),
    ],
)
def test_a_wrong_size_is_found_without_reading_the_shard(three_shards: Path, size_change: int, message: str) -> None:
    path = three_shards / "test_i_000002_t_50.npy"
    os.truncate(path, path.stat().st_size + size_change)
    with pytest.raises(UserError, match=f"{path}: {message}"):
        check_all(three_shards, full=False)


def test_changed_content_is_found_by_its_hash(three_shards: Path) -> None:
    path = three_shards / "test_i_000001_t_3000000.npy"
    array = np.load(path, mmap_mode="r+")
    array[2_900_000] = (array[2_900_000] + 1) % N_VOCAB
    array.flush()
    check_all(three_shards, full=False)
    with pytest.raises(UserError, match=f"{path}: expected sha256 [0-9a-f]+, found [0-9a-f]+"):
        check_all(three_shards, full=True)


def test_an_id_outside_the_vocabulary_is_found(three_shards: Path) -> None:
    array = np.load(three_shards / "test_i_000001_t_3000000.npy", mmap_mode="r+")
    array[2_900_000] = N_VOCAB
    array[2_950_000] = 65_535
    array.flush()
    with pytest.raises(UserError, match="expected ids below 50257, found 50257 as token 2900000"):
        check_all(three_shards, full=True)


def test_no_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"find a dataset at .*data_downloader"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(UserError, match="did not finish"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "this program reads format 2 only. Delete the folder"),
        ({"shards": []}, "needs a validation shard first"),
        ({"counts": TOTALS | {"tokens": 1}}, "hold 3000150 tokens, its total says 1"),
        ({"counts": TOTALS | {"documents": 7}}, "hold 6 documents, its total says 7"),
        ({"counts": TOTALS | {"text_bytes": 0}}, "hold 1200 text_bytes, its total says 0"),
        ({"counts": {"tokens": 3_000_150}}, "damaged.*documents"),
        ({"surprise": 1}, "damaged.*surprise"),
        ({"shards": [{"file": "x"}]}, "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(three_shards: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(three_shards, **changes)
    with pytest.raises(UserError, match=message):
        read_manifest(three_shards)


def test_a_manifest_cannot_lead_out_of_its_folder(three_shards: Path) -> None:
    entries = json.loads((three_shards / "manifest.json").read_text())["shards"]
    entries[0]["file"] = "../test_i_000000_t_100.npy"
    edit_manifest(three_shards, shards=entries)
    with pytest.raises(UserError, match="not the name of a shard"):
        read_manifest(three_shards)
    for content in ("{", "5", "[" * 100_000):
        (three_shards / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"Cannot read .*manifest.json: .* Restore the file"):
            read_manifest(three_shards)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_vocab": "50257"},
        {"seed": True},
        {"end_of_text": 10**30},
        {"counts": TOTALS | {"dropped_duplicates": None}},
        {"counts": []},
        {"sources": ["files"]},
        {"document_lengths": [0.5]},
        {"shards": 5},
        {"request": "files"},
    ],
)
def test_a_manifest_of_other_types_is_refused(three_shards: Path, changes: dict[str, Any]) -> None:
    edit_manifest(three_shards, **changes)
    with pytest.raises(UserError, match=r"manifest.json: it is damaged"):
        read_manifest(three_shards)


def test_pipes_and_folders_are_refused_by_name(three_shards: Path) -> None:
    """Opening a pipe would wait for ever."""
    for number, make in enumerate((os.mkfifo, os.mkdir)):
        path = three_shards / read_manifest(three_shards).train[number].file
        path.unlink()
        make(path)
        with pytest.raises(UserError, match=f"{path}: it is not a regular file"):
            check_shard(three_shards, read_manifest(three_shards).train[number], N_VOCAB)
    (three_shards / "manifest.json").unlink()
    os.mkfifo(three_shards / "manifest.json")
    with pytest.raises(UserError, match=r"manifest.json: it is not a regular file"):
        read_manifest(three_shards)


@pytest.fixture
def folder(dataset: Callable[..., Path]) -> Path:
    return dataset(train_tokens=[700, 900], val_tokens=500, n_vocab=300)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose content is read."""
    names: list[str] = []

    def spy(folder: Path, shard: ShardEntry, n_vocab: int, full: bool, stop: Callable[[], bool]):
        assert full
        names.append(shard.file)
        return shard_fault(folder, shard, n_vocab, full, stop)

    monkeypatch.setattr(shards, "shard_fault", spy)
    return names


def verified(folder: Path) -> list[str]:
    """What is said by a verification that finds nothing wrong."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        ensure_verified(folder, read_manifest(folder))
    return said.getvalue().splitlines()


def change_a_token(path: Path, token: int = 7) -> None:
    """Another id in the last place; size and modification time stay."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(np.uint16(token).tobytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_nothing_is_read_twice(folder: Path, reads: list[str]):
    files = [shard.file for shard in read_manifest(folder).shards]
    assert verified(folder) == []
    assert sorted(reads) == files
    assert verified(folder) == []
    assert len(reads) == 3
    assert sorted(os.listdir(folder)) == sorted([STAMP, "manifest.json", *files])


@pytest.mark.parametrize("how", ["touched", "copied over", "replaced", "expected to be another"])
def test_where_a_shard_may_have_changed_all_are_read_again(folder: Path, reads: list[str], how: str):
    verified(folder)
    shard = read_manifest(folder).shards[1]
    path, before = folder / shard.file, os.stat(folder / shard.file)
    if how == "touched":
        path.touch()
    elif how == "copied over":
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif how == "replaced":
        (folder / "copy").write_bytes(path.read_bytes())
        os.utime(folder / "copy", ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(folder / "copy", path)
    else:
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace(shard.sha256, "0" * 64))
    reads.clear()
    if how == "expected to be another":
        with pytest.raises(UserError, match=f"expected sha256 {'0' * 64}, found {shard.sha256}"):
            verified(folder)
    else:
        verified(folder)
    assert sorted(reads) == [shard.file for shard in read_manifest(folder).shards]


def test_every_fault_is_named_and_a_damaged_shard_is_never_stamped(folder: Path, reads: list[str]):
    manifest: Manifest = read_manifest(folder)
    verified(folder)
    paths = [folder / shard.file for shard in manifest.shards]
    change_a_token(paths[0])
    change_a_token(paths[1], token=300)
    paths[2].unlink()
    for _ in range(2):
        reads.clear()
        with pytest.raises(UserError, match="3 of 3 shards") as caught:
            verified(folder)
        lines = [line.strip() for line in str(caught.value).splitlines()]
        assert lines[1].startswith(f"{paths[0]}: expected sha256 {manifest.shards[0].sha256}, found ")
        assert lines[2] == f"{paths[1]}: expected ids below 300, found 300 as token 699"
        assert lines[3] == f"{paths[2]} is missing: expected a shard of 900 tokens"
        assert len(reads) == 3


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"format": 1}', '{"format": 1, "shards": 3}', '{"format": 0}', "\xff"]
)
def test_a_damaged_stamp_counts_as_absent(folder: Path, reads: list[str], content: str):
    verified(folder)
    (folder / STAMP).write_bytes(content.encode("latin-1"))
    reads.clear()
    for _ in range(2):
        verified(folder)
        assert len(reads) == 3


def test_a_folder_that_takes_no_stamp_is_worth_one_note(folder: Path, reads: list[str]):
    """A folder stands in the stamp's place: that stops the superuser too."""
    (folder / STAMP / "in the way").mkdir(parents=True)
    for _ in range(2):
        (note,) = verified(folder)
        assert note.startswith(f"the next start will read the dataset again: Cannot write {folder / STAMP}: ")
    assert len(reads) == 6
    assert [name for name in os.listdir(folder) if name.startswith(STAMP)] == [STAMP]


def test_asked_to_stop_it_stops_within_a_shard(dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    folder = dataset(train_tokens=[6_000_000, 900], val_tokens=500, n_vocab=300)  # 500 and 900 tokens are a piece each
    monkeypatch.setattr(shards, "MAX_THREADS", 1)
    asked = iter([False, False, True])

    with pytest.raises(StoppedError, match="stopped on request before anything was trained") as caught:
        ensure_verified(folder, read_manifest(folder), stop=lambda: next(asked, True))
    assert caught.value.exit_code == 143
    assert not (folder / STAMP).exists()


def test_ids_of_another_type_are_not_written(tmp_path: Path) -> None:
    """65,536 would become 0."""
    with pytest.raises(AssertionError, match="would wrap around"):
        write_shard(tmp_path, "test", 0, 1, [np.array([65_536])])


def test_another_dtype_or_shape_is_named(three_shards: Path) -> None:
    path = three_shards / "test_i_000002_t_50.npy"
    np.save(path, np.zeros(50, np.int32))
    with pytest.raises(UserError, match=r"expected dtype uint16 and shape .* found int32"):
        check_all(three_shards, full=False)
    np.save(path, np.zeros((5, 10), np.uint16))
    with pytest.raises(UserError, match=r"found uint16 and \(5, 10\)"):
        check_all(three_shards, full=False)
    path.write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(UserError, match="found 204 bytes that are not"):
        check_all(three_shards, full=False)
