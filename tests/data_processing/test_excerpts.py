"""A piece of a dataset reads as its text does, shows boundaries where the ids have them, and harms no terminal."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from src.data_processing.excerpts import excerpt, samples
from src.data_processing.tokenizer import load_tokenizer
from src.utils.errors import UserError
from tests.data_processing.documents import some_texts
from tests.data_processing.text_datasets import END, write_texts


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")


def text_of(lines: str) -> str:
    """What stands behind the margin, with broken lines made whole."""
    return "".join(line.removeprefix("│ ") for line in lines.split("\n"))


def whole(folder: Path, *texts: str) -> str:
    manifest = write_texts(folder, texts, ["other text"])
    return excerpt(folder, manifest, 0, 0, manifest.shards[0].tokens)


def test_boundaries_come_from_ids_and_not_from_text(tmp_path: Path) -> None:
    shown = whole(tmp_path, "One.\n\nTwo.", "It says <|endoftext|> here.", "──── document ────\n│ ──── document ────")
    assert shown.split("\n") == [
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
        shown = excerpt(tmp_path, manifest, 2, first, 33)
        expected = decoded.replace("<|endoftext|>", "──── document ────")
        assert text_of(shown).replace(" ", "") == expected.replace(" ", "")


def test_a_terminal_is_shown_control_characters_and_does_not_get_them(tmp_path: Path) -> None:
    acting = [chr(code) for code in (*range(10), *range(11, 32), *range(127, 160), 0x202E, 0x2066, 0x2028, 0xFEFF)]
    shown = whole(tmp_path, "red \x1b[31m, home \r, tab\t.", "".join(acting), "soft\u00a0space, naïve, 文, 🙂")
    assert r"red \x1b[31m, home \r, tab   ." in shown
    assert "soft\u00a0space, naïve, 文, 🙂" in shown
    assert not set(acting) & set(shown)
    assert r"\u202e\u2066\u2028\ufeff" in text_of(shown)


@pytest.mark.parametrize(
    ("text", "columns"),
    [("several words and more " * 40, 1), ("x" * 500, 1), ("汉字" * 150, 2), ("   indented " + "y" * 100, 1)],
)
def test_long_lines_are_broken_and_nothing_is_lost(tmp_path: Path, text: str, columns: int) -> None:
    boundary, *lines = whole(tmp_path, text).split("\n")
    assert boundary == "──── document ────"
    assert len(lines) > 1
    assert all(2 + columns * len(line[2:]) <= 60 for line in lines)
    assert "".join(line[2:] for line in lines).replace(" ", "") == text.replace(" ", "")


def test_lines_are_broken_between_words(tmp_path: Path) -> None:
    _, *lines = whole(tmp_path, "several words " * 40).split("\n")
    assert {word for line in lines for word in line[2:].split()} == {"several", "words"}


@pytest.mark.parametrize(
    ("shard", "first", "count", "message"),
    [
        (2, 0, 5, r"no shard 2 in .*: it has shards 0 to 1"),
        (-1, 0, 5, "no shard -1"),
        (0, 3, 5, r"from token 3 of .*texts_i_000000_t_3.npy: name at least one of its tokens 0 to 2"),
        (0, -1, 5, "from token -1"),
        (0, 0, 0, r"cannot show 0 token\(s\)"),
    ],
)
def test_a_place_that_is_not_there(tmp_path: Path, shard: int, first: int, count: int, message: str) -> None:
    manifest = write_texts(tmp_path, ["two words"], ["more"])
    with pytest.raises(UserError, match=message):
        excerpt(tmp_path, manifest, shard, first, count)


def test_ids_of_another_tokenizer_are_shown_as_numbers(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path, ["two words", "two"], ["more"])
    for theirs in ({"tokenizer": "cl100k_base"}, {"n_vocab": 60_000}, {"tokenizer_sha256": "0" * 64}):
        shown = excerpt(tmp_path, dataclasses.replace(manifest, **theirs), 0, 0, 9)
        two, words = load_tokenizer().encode("two words")
        assert shown.split("\n") == ["──── document ────", f"│ {two} {words}", "──── document ────", f"│ {two}"]


def test_an_impossible_id_is_named(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path, ["two words"], ["more"])
    path = tmp_path / manifest.shards[0].file
    np.save(path, np.array([END, 60_000, 5], "<u2"))
    with pytest.raises(UserError, match=f"{path}: token 1 is 60000; expected ids below 50257"):
        excerpt(tmp_path, manifest, 0, 0, 3)


def test_samples_show_boundaries_of_validation_and_training(tmp_path: Path) -> None:
    texts = some_texts(300)
    manifest = write_texts(tmp_path, texts[:100], texts[100:200], texts[200:])
    shown = [*samples(tmp_path, manifest)]
    assert [sample.split(",")[0] for sample in shown] == ["validation", "training", "training"]
    assert [*samples(tmp_path, manifest)] == shown
    for sample, shard, part in zip(shown, manifest.shards, (1 / 2, 2 / 3, 1 / 3), strict=True):
        heading, *lines = sample.split("\n")
        place = re.fullmatch(rf"\w+, around token ([\d,]+) of {shard.file}", heading)
        assert place
        token = int(place[1].replace(",", ""))
        assert token == pytest.approx(part * shard.tokens, abs=100)
        assert np.load(tmp_path / shard.file)[token] == END
        assert 1 <= lines.index("──── document ────") <= 4
        assert len(lines) == 12
        assert re.match(r"│ Document \d+\. ", lines[lines.index("──── document ────") + 1])


def test_a_sample_far_from_a_boundary_is_text_alone(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path, ["word " * 100_000], ["more"])
    heading, *lines = next(samples(tmp_path, manifest)).split("\n")
    assert "around token 50,0" in heading
    assert set(" ".join(lines).split()) == {"│", "word"}


def test_samples_of_tiny_shards(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path, ["a"], ["b"], ["c"])
    shown = [sample.split("\n") for sample in samples(tmp_path, manifest)]
    assert [lines[1:] for lines in shown] == [["──── document ────", f"│ {letter}"] for letter in "abc"]
