"""The page on a dataset says what numpy finds in its shards, reads as its text does, and harms no terminal."""

import dataclasses
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import make_sparse_dataset
from src.data_processing.inspect_dataset import excerpt, excerpts, inspect
from src.data_processing.shards import Manifest, stray_files, write_manifest
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.utils.errors import UserError
from tests.conftest import Commands
from tests.data_processing.documents import MODULE, contents, some_texts
from tests.data_processing.text_datasets import END, write_texts

BOUNDARY = "──── document ────"


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


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

    page, figures = inspect(folder)
    assert json.loads(json.dumps(figures)) == {
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
    }
    ratios = ["100.0%", f"{text_bytes / ids.size:.3f}", f"{ids.size / 160:,.1f}"]
    assert row(page, "all") == ["3", "160", f"{ids.size:,}", *ratios]
    assert row(page, "training")[:3] == ["2", "140", f"{ids.size - shards[0].size:,}"]
    assert row(page, "64 to 127")[:2] == [str((lengths >= 64).sum()), f"{(lengths >= 64).mean():.1%}"]
    assert page.count("──── document ────") >= 3
    assert manifest.sha256 in page


def test_each_kind_of_source_has_its_line(folder: Path, manifest: Manifest) -> None:
    counts = {"documents": 40, "tokens": manifest.counts["tokens"] // 4, "text_bytes": 1, "share": 0.25}
    files = [{"path": f"/data/texts/{name}", "bytes": 5, "sha256": "0"} for name in ("a.txt", "b/c.md")]
    hub = {"repository": "owner/name", "config": "sample", "revision": "abc123"}
    sources = [
        {"name": "files", "path": "/data/texts", "files": files, **counts},
        {"name": "hub", **hub, **counts},
        {"name": "pydocs", "packages": {"python": "3.11.7", "numpy": "2.2.6"}, **counts},
        {"name": "new\x1b[2J"},
    ]
    change(folder, manifest, sources=sources)
    page = inspect(folder)[0]
    assert "  /data/texts\n" in page
    assert "  owner/name, sample, abc123\n" in page
    assert "  python 3.11.7, numpy 2.2.6\n" in page
    assert row(page, "pydocs")[:3] == ["40", f"{counts['tokens']:,}", "25.0%"]
    assert r"new\x1b[2J" in page


def test_what_was_left_out_is_said(folder: Path, manifest: Manifest) -> None:
    left_out = {"skipped_empty": 3, "dropped_duplicates": 1_200, "replaced_invalid": 7}
    change(folder, manifest, counts=manifest.counts | left_out)
    assert "left out: 3 empty, 1,200 duplicates; invalid UTF-8 replaced in 7\n" in inspect(folder)[0]


def test_a_hundred_shards_of_a_hundred_gigabytes_take_no_time(folder: Path) -> None:
    """Reading one of them would take most of a minute; they are holes, so they fit on any disk."""
    holes = make_sparse_dataset(folder, n_shards=100, tokens_per_shard=50_000_000_000)
    change(folder, holes, tokenizer_sha256=Tokenizer.sha256, document_lengths=[0] * 35 + [100])
    start = time.monotonic()
    page, figures = inspect(folder)
    assert time.monotonic() - start < 10
    assert figures["tokens"] == 5_000_000_000_000
    assert page.count("\n│ !!!!!!!!") >= 3


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_shard_leaves_the_rest(folder: Path, manifest: Manifest, damage: str) -> None:
    path = folder / manifest.shards[0].file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    page, figures = inspect(folder)
    faulty, *sound = page.split("\n\n")[-3:]
    assert f": Cannot use the dataset: {path}" in faulty
    assert damage in faulty
    assert f"--repair --out '{folder}'" in faulty
    assert all("──── document ────" in sample for sample in sound)
    assert figures["documents"] == 160


def test_the_dataset_is_left_unchanged(folder: Path, manifest: Manifest) -> None:
    before = contents(folder)
    first = inspect(folder)
    assert inspect(folder) == first
    assert contents(folder) == before
    assert stray_files(folder, manifest) is None
    assert sorted(path.name for path in folder.parent.iterdir()) == ["texts"]


# Pieces of text


def text_of(lines: list[str]) -> str:
    """The text behind the margin, with broken lines joined."""
    return "".join(line.removeprefix("│ ") for line in lines)


def samples(folder: Path) -> list[str]:
    return inspect(folder)[0].split("\n\n")[-3:]


def piece(folder: Path, manifest: Manifest, shard: int, first: int, n_tokens: int) -> list[str]:
    """The lines of an excerpt below its heading."""
    return excerpt(folder, manifest, manifest.shards[shard], first, n_tokens, 99).split("\n")[1:]


def whole(folder: Path, *texts: str) -> list[str]:
    manifest = write_texts(folder, texts, ["other text"])
    return piece(folder, manifest, 0, 0, manifest.shards[0].tokens)


def test_boundaries_come_from_ids_and_not_from_text(tmp_path: Path) -> None:
    shown = whole(tmp_path, "One.\n\nTwo.", "It says <|endoftext|> here.", "──── document ────\n│ ──── document ────")
    assert shown == [
        "──── document ────",
        "│ One.",
        "│",
        "│ Two.",
        "──── document ────",
        "│ It says <|endoftext|> here.",
        "──── document ────",
        "│ ──── document ────",
        "│ │ ──── document ────",
    ]


def test_a_window_shows_its_tokens_and_no_others(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path, ["unseen"], some_texts(5, words=6), some_texts(40, words=6, seed=1))
    ids = np.load(tmp_path / manifest.shards[2].file)
    for first in (0, 7, 100, len(ids) - 5):
        decoded = load_tokenizer().decode(ids[first : first + 33].tolist())
        shown = piece(tmp_path, manifest, 2, first, 33)
        expected = decoded.replace("<|endoftext|>", "──── document ────")
        assert text_of(shown).replace(" ", "") == expected.replace(" ", "")


def test_a_terminal_is_shown_control_characters_and_does_not_get_them(tmp_path: Path) -> None:
    acting = [chr(code) for code in (*range(10), *range(11, 32), *range(127, 160), 0x202E, 0x2066, 0x2028, 0xFEFF)]
    shown = whole(tmp_path, "red \x1b[31m, home \r, tab\t.", "".join(acting), "soft\u00a0space, naïve, 文, 🙂")
    assert r"red \x1b[31m, home \r, tab   ." in text_of(shown)
    assert "soft\u00a0space, naïve, 文, 🙂" in text_of(shown)
    assert not set(acting) & set("\n".join(shown)) - {"\n"}
    assert r"\u202e\u2066\u2028\ufeff" in text_of(shown)


@pytest.mark.parametrize("text", ["several words and more " * 40, "x" * 500, "   indented " + "y" * 100])
def test_long_lines_are_broken_and_nothing_is_lost(tmp_path: Path, text: str) -> None:
    boundary, *lines = whole(tmp_path, text)
    assert boundary == "──── document ────"
    assert len(lines) > 1
    assert all(len(line) <= 80 for line in lines)
    assert "".join(line[2:] for line in lines).replace(" ", "") == text.replace(" ", "")


def test_ids_of_another_tokenizer_are_shown_as_numbers(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path, ["two words", "two"], ["more"])
    shown = piece(tmp_path, dataclasses.replace(manifest, tokenizer_sha256="0" * 64), 0, 0, 9)
    two, words = load_tokenizer().encode("two words")
    assert shown == ["──── document ────", f"│ {two} {words}", "──── document ────", f"│ {two}"]


def test_an_impossible_id_is_named(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path, ["two words"], ["more"])
    path = tmp_path / manifest.shards[0].file
    np.save(path, np.array([END, 60_000, 5], "<u2"))
    shown = excerpt(tmp_path, manifest, manifest.shards[0], 0, 3, 99)
    assert shown == f"{path.name}: Cannot show id 60000: expected ids below 50257. Verify the dataset."


def test_samples_show_boundaries_of_validation_and_training(tmp_path: Path) -> None:
    texts = some_texts(300)
    manifest = write_texts(tmp_path, texts[:100], texts[100:200], texts[200:])
    shown = samples(tmp_path)
    assert [sample.split(":")[0] for sample in shown] == ["validation", "train", "train"]
    for sample, shard, part in zip(shown, manifest.shards, (1 / 2, 2 / 3, 1 / 3), strict=True):
        heading, *lines = sample.split("\n")
        place = re.fullmatch(rf"\w+: {shard.file}, from token ([\d,]+)", heading)
        assert place
        token = int(place[1].replace(",", "")) + 40
        assert token == pytest.approx(part * shard.tokens, abs=100)
        assert np.load(tmp_path / shard.file)[token] == END
        assert 1 <= lines.index("──── document ────") <= 4
        assert re.match(r"│ Document \d+\. ", lines[lines.index("──── document ────") + 1])


def test_a_sample_far_from_a_boundary_is_text_alone(tmp_path: Path) -> None:
    write_texts(tmp_path, ["word " * 100_000], ["more"])
    heading, *lines = samples(tmp_path)[0].split("\n")
    assert "from token 50,0" in heading
    assert set(" ".join(lines[:-1]).split()) == {"│", "word"}


def test_samples_of_tiny_shards(tmp_path: Path) -> None:
    write_texts(tmp_path, ["a"], ["b"], ["c"])
    shown = [sample.split("\n") for sample in samples(tmp_path)]
    assert [lines[1:] for lines in shown] == [["──── document ────", f"│ {letter}"] for letter in "abc"]


# Places


def test_the_text_at_places(folder: Path) -> None:
    """As the event of a skipped step names them."""
    shards = write_texts(
        folder, some_texts(14), some_texts(20, seed=1), [f"Second {t}" for t in some_texts(20, seed=2)]
    )
    before = contents(folder)
    page, figures = excerpts(folder, ["2:0-65", "1:192-257"])
    first, second = page.split("\n\n")
    assert first.split("\n")[:2] == [f"{shards.shards[2].file}, from token 0", BOUNDARY]
    assert first.split("\n")[2].startswith("│ Second Document 0. ")
    # documents of 60 words take 64 tokens and a few for their heading, so token 192 lies in number 2
    assert second.startswith(f"{shards.shards[1].file}, from token 192\n│ ")
    assert f"\n{BOUNDARY}\n│ Document 3. " in second
    assert figures == {"dataset": str(folder), "places": 2}
    assert contents(folder) == before


@pytest.mark.parametrize(
    "place",
    [
        "",
        "1",
        "1:5",
        "1:5-5",
        "1:9-5",
        "3:0-5",
        "-1:0-5",
        "1:0-999999",
        "1:0-5\n",
        "1:٣-٤",
        "9" * 400 + ":0-5",
        "\x1b:0-5",
    ],
)
def test_a_place_that_is_not_there(folder: Path, manifest: Manifest, place: str) -> None:
    with pytest.raises(UserError, match=r"expected SHARD:FIRST-END, a shard from 0 to 2 and at most"):
        excerpts(folder, [place])


def test_the_command(commands: Commands) -> None:
    write_texts(commands.temp_data / "datasets" / "texts", some_texts(3), some_texts(9))
    shown = commands.module(MODULE, "--inspect", "--out", "texts", "--at", "1:0-64", "1:64-128")
    assert shown.returncode == 0
    assert "from token 64" in shown.stdout
    assert json.loads(shown.stdout.splitlines()[-1])["places"] == 2
