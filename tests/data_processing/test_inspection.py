"""The page on a dataset says what numpy finds in its shards, whatever its size and state."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.synthetic_dataset import make_sparse_dataset
from src.data_processing import inspection
from src.data_processing.inspection import inspect
from src.data_processing.shards import Manifest, unlisted_files, write_manifest
from src.data_processing.tokenizer import Tokenizer
from src.utils.errors import UserError
from tests.data_processing.documents import contents, some_texts
from tests.data_processing.text_datasets import END, write_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "datasets" / "texts"


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return write_texts(folder, some_texts(20), some_texts(90, seed=1), some_texts(50, words=7, seed=2))


def change(folder: Path, manifest: Manifest, **changes: object) -> None:
    write_manifest(folder, dataclasses.replace(manifest, **changes))  # type: ignore[arg-type]


def row(page: str, start: str) -> list[str]:
    """The cells of the first line that starts so, after its first word or words."""
    line = next(line.strip() for line in page.split("\n") if line.strip().startswith(start))
    return line.removeprefix(start).split()


def test_the_figures_are_those_of_the_shards(folder: Path, manifest: Manifest) -> None:
    shards = [np.load(folder / shard.file) for shard in manifest.shards]
    ids = np.concatenate(shards)
    starts = np.flatnonzero(ids == END)
    lengths = np.diff(np.append(starts, ids.size))
    text_bytes = len("".join([*some_texts(20), *some_texts(90, seed=1), *some_texts(50, words=7, seed=2)]).encode())

    found = inspect(folder)
    assert json.loads(json.dumps(found.figures)) == {
        "dataset": str(folder),
        "documents": 160,
        "tokens": ids.size,
        "text_bytes": text_bytes,
        "bytes_per_token": pytest.approx(text_bytes / ids.size, abs=1e-4),
        "validation_tokens": shards[0].size,
        "shards": 3,
        "document_lengths": np.histogram(lengths, bins=2 ** np.arange(lengths.max().item().bit_length() + 1))[
            0
        ].tolist(),
        "picture": str(folder.parent / "texts.lengths.png"),
    }
    assert row(found.page, "documents")[0] == "160"
    assert row(found.page, "tokens")[0] == f"{ids.size:,}"
    assert row(found.page, "tokens a document")[0] == f"{ids.size / 160:,.1f}"
    assert row(found.page, "training")[:3] == ["2", "140", f"{ids.size - shards[0].size:,}"]
    assert row(found.page, "64 to 127")[:2] == [str((lengths >= 64).sum()), f"{(lengths >= 64).mean():.1%}"]
    assert found.page.count("──── document ────") >= 3
    assert manifest.sha256 in found.page


def test_each_kind_of_source_has_its_line(folder: Path, manifest: Manifest) -> None:
    counts = {"documents": 40, "tokens": manifest.counts["tokens"] // 4, "text_bytes": 1, "share": 0.25}
    files = [{"path": f"/data/texts/{name}", "bytes": 5, "sha256": "0"} for name in ("a.txt", "b/c.md")]
    hub = {"repository": "owner/name", "config": "sample", "revision": "abc123"}
    sources = [
        {"name": "files", "files": files, **counts},
        {"name": "files", "files": files[:1], **counts},
        {"name": "hub", **hub, **counts},
        {"name": "pydocs", "packages": {"python": "3.11.7", "numpy": "2.2.6"}, **counts},
        {"name": "new\x1b[2J"},
    ]
    change(folder, manifest, sources=sources)
    page = inspect(folder).page
    assert "2 files in /data/texts\n" in page
    assert "  /data/texts/a.txt\n" in page
    assert "  owner/name, sample, revision abc123\n" in page
    assert "  python 3.11.7, numpy 2.2.6\n" in page
    assert row(page, "pydocs")[:3] == ["40", f"{counts['tokens']:,}", "25.0%"]
    assert r"new\x1b[2J" in page


def test_what_was_left_out_is_said(folder: Path, manifest: Manifest) -> None:
    left_out = {"skipped_empty": 3, "dropped_duplicates": 1_200, "replaced_invalid": 7}
    change(folder, manifest, counts=manifest.counts | left_out)
    assert "left out: 3 empty, 1,200 duplicates; invalid UTF-8 replaced in 7\n" in inspect(folder).page


def test_many_shards_are_summed_up(folder: Path) -> None:
    listed = write_texts(folder, ["val"], *(["word " * 10 * n] for n in range(1, 12)))
    assert all(shard.file in inspect(folder).page for shard in listed.shards)
    summed = write_texts(folder, ["val"], *(["word " * 10 * n] for n in range(1, 13)))
    page = inspect(folder).page
    assert sum(shard.file in page for shard in summed.shards) <= 3  # those of the samples
    sizes = [shard.tokens for shard in summed.train]
    assert row(page, "training")[0] == "12"
    assert row(page, "training")[-2:] == [str(min(sizes)), str(max(sizes))]


def test_a_hundred_shards_of_a_hundred_gigabytes_take_no_time(folder: Path) -> None:
    """Reading one of them would take most of a minute; they are holes, so they fit on any disk."""
    holes = make_sparse_dataset(folder, n_shards=100, tokens_per_shard=50_000_000_000)
    change(folder, holes, tokenizer_sha256=Tokenizer.sha256, document_lengths=[0] * 35 + [100])
    start = time.monotonic()
    found = inspect(folder)
    assert time.monotonic() - start < 10
    assert found.figures["tokens"] == 5_000_000_000_000
    assert found.page.count("\n│ !!!!!!!!") >= 3


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_shard_leaves_the_rest(folder: Path, manifest: Manifest, damage: str) -> None:
    path = folder / manifest.shards[0].file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    found = inspect(folder)
    faulty, *sound = found.page.split("\n\n")[-3:]
    assert f"cannot be shown: {path}" in faulty
    assert damage in faulty
    assert f"--verify --out '{folder}'" in faulty
    assert all("──── document ────" in sample for sample in sound)
    assert found.figures["documents"] == 160


def test_another_tokenizer_is_said_and_its_ids_are_not_decoded(folder: Path, manifest: Manifest) -> None:
    change(folder, manifest, tokenizer="their_own")
    page = inspect(folder).page
    assert "another tokenizer" in page
    *_, sample = page.split("\n\n")
    assert set("".join(sample.split("\n")[1:])) <= set("│0123456789 ─document")


def test_lengths_that_are_not_known(folder: Path, manifest: Manifest) -> None:
    change(folder, manifest, document_lengths=[])
    found = inspect(folder)
    assert found.figures["picture"] is None
    assert "does not say how long" in found.page
    assert not [*folder.parent.glob("*.png")]


def test_the_dataset_is_left_as_it_is(folder: Path, manifest: Manifest) -> None:
    before = contents(folder)
    first = inspect(folder)
    assert inspect(folder) == first
    assert contents(folder) == before
    assert unlisted_files(folder, manifest) == []
    assert sorted(path.name for path in folder.parent.iterdir()) == ["texts", "texts.lengths.png"]


def test_a_picture_that_cannot_be_written(folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the way is a folder of the picture's name: that stops the superuser too."""
    ours = folder.parents[1] / "ours" / "datasets"
    monkeypatch.setattr(inspection, "DATASETS", ours)
    (folder.parent / "texts.lengths.png").mkdir()
    found = inspect(folder)
    assert found.figures["picture"] == str(ours / "texts.lengths.png")
    assert (ours / "texts.lengths.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture: {ours / 'texts.lengths.png'}" in found.page

    (ours / "texts.lengths.png").unlink()
    (ours / "texts.lengths.png").mkdir()
    found = inspect(folder)
    assert found.figures["picture"] is None
    assert f"no picture: cannot write {folder.parent / 'texts.lengths.png'}: Is a directory" in found.page
    assert found.figures["documents"] == 160


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset at"):
        inspect(tmp_path / "absent")
