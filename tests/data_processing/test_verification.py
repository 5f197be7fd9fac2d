"""Every byte is read before it is trusted, and a file that was not touched since is not read again."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from src.data_processing import verification
from src.data_processing.shards import Manifest, Shard, read_manifest, shard_fault, unlisted_files
from src.data_processing.verification import STAMP, ensure_verified
from src.utils.errors import StoppedError, UserError


@pytest.fixture
def folder(dataset: Callable[..., Path]) -> Path:
    return dataset(train_tokens=[700, 900], val_tokens=500, n_vocab=300)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose content is read."""
    names: list[str] = []

    def spy(folder: Path, shard: Shard, n_vocab: int, full: bool, stop: Callable[[], bool], end_of_text: int):
        assert full
        names.append(shard.file)
        return shard_fault(folder, shard, n_vocab, full, stop, end_of_text)

    monkeypatch.setattr(verification, "shard_fault", spy)
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
    assert unlisted_files(folder, read_manifest(folder)) == []
    assert sorted(os.listdir(folder)) == sorted([STAMP, "manifest.json", *files])


@pytest.mark.parametrize("how", ["touched", "copied over", "replaced", "expected to be another"])
def test_a_shard_that_may_have_changed_is_read_again_and_no_other(folder: Path, reads: list[str], how: str):
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
    assert reads == [shard.file]


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
        assert lines[2] == f"{paths[1]}: token 699 is 300; expected ids below 300"
        assert lines[3] == f"{paths[2]} is missing: expected a shard of 900 tokens"
        assert len(reads) == 3


def test_documents_that_are_not_there_are_found_although_every_byte_is_as_prepared(folder: Path):
    """The manifest lists 10, 14 and 18 documents; one of them moves from the last shard to the one before."""
    verified(folder)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    assert [shard["documents"] for shard in content["shards"]] == [10, 14, 18]
    content["shards"][1]["documents"] += 1
    content["shards"][2]["documents"] -= 1
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="2 of 3 shards") as caught:
        verified(folder)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1].startswith(f"{folder / content['shards'][1]['file']}: expected 15 documents, found 14: the id 299 ")
    assert "expected 17 documents, found 18" in lines[2]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"format": 1}', '{"format": 1, "shards": 3}', '{"format": 0}', "\xff"]
)
def test_a_damaged_stamp_counts_as_absent(folder: Path, reads: list[str], content: str):
    verified(folder)
    (folder / STAMP).write_bytes(content.encode("latin-1"))
    reads.clear()
    verified(folder)
    assert len(reads) == 3
    assert len(json.loads((folder / STAMP).read_text())["shards"]) == 3


def test_a_folder_that_takes_no_stamp_is_worth_one_note(folder: Path, reads: list[str]):
    """A folder stands in the stamp's place: that stops the superuser too."""
    (folder / STAMP / "in the way").mkdir(parents=True)
    for _ in range(2):
        (note,) = verified(folder)
        assert note.startswith(f"the next start will read the dataset again: cannot write {folder / STAMP}: ")
    assert len(reads) == 6
    assert [name for name in os.listdir(folder) if name.startswith(STAMP)] == [STAMP]


def test_what_was_read_before_an_interruption_stays_read(
    folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verification, "REPORT_EVERY_S", 0.0)

    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if "2 of 3" in text:
                raise KeyboardInterrupt
            return len(text)

    with contextlib.redirect_stderr(Interrupting()), pytest.raises(KeyboardInterrupt):
        ensure_verified(folder, read_manifest(folder))
    reads.clear()
    assert verified(folder) == [f"verifying {folder}: 1 of 1 shards read"]
    assert len(reads) == 1


def test_asked_to_stop_it_stops_within_a_shard_and_sound_ones_stay_read(
    dataset: Callable[..., Path], reads: list[str], monkeypatch: pytest.MonkeyPatch
):
    folder = dataset(train_tokens=[6_000_000, 900], val_tokens=500, n_vocab=300)  # 500 and 900 tokens are a piece each
    monkeypatch.setattr(verification, "MAX_THREADS", 1)
    asked = iter([False, False, True])

    with pytest.raises(StoppedError, match="stopped on request before anything was trained") as caught:
        ensure_verified(folder, read_manifest(folder), stop=lambda: next(asked, True))
    assert caught.value.exit_code == 143
    stamped = json.loads((folder / STAMP).read_text())["shards"]
    assert list(stamped) == [read_manifest(folder).shards[0].file], "the second was begun, the third not"
    reads.clear()
    assert verified(folder) == []
    assert len(reads) == 2
