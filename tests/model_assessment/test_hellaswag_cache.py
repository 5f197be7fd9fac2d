"""Kept ids are the tokenizer's, or made anew; nothing that happens to the files is an error."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.model_assessment import hellaswag_cache
from src.model_assessment.hellaswag_cache import cached_encode

TEXTS = ["A man sits.", "", "naïve ☕", *(f"number {i}" for i in range(50))]


class Counting:
    """A tokenizer that counts what it encodes."""

    def __init__(self) -> None:
        self.tokenizer, self.texts = load_tokenizer(), 0
        self.sha256 = self.tokenizer.sha256

    def encode(self, text: str) -> list[int]:
        self.texts += 1
        return self.tokenizer.encode(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hellaswag_cache, "EVAL_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hellaswag_cache, "AT_LEAST", 2)
    return tmp_path / "cache"


def encoded(texts: list[str] = TEXTS, tokenizer: Tokenizer | None = None, name: str = "test") -> int:
    """How many texts were encoded to have the right ids of all."""
    counting = Counting()
    if tokenizer:
        counting.sha256 = tokenizer.sha256
    encode = cached_encode(texts, counting, name)  # type: ignore[arg-type]
    count = counting.texts
    assert [encode(text) for text in texts] == [load_tokenizer().encode(text) for text in texts]
    assert counting.texts == count or len(texts) < hellaswag_cache.AT_LEAST
    return count


def test_the_second_time_nothing_is_encoded(folder: Path) -> None:
    assert encoded() == len(TEXTS)
    (file,) = folder.iterdir()
    assert file.name.startswith("test_")
    assert encoded() == 0
    assert encoded(TEXTS * 2) == 0  # the same texts, some twice
    assert list(folder.iterdir()) == [file]


def test_another_text_order_name_or_tokenizer_is_another_file(folder: Path) -> None:
    class Other(Tokenizer):
        sha256 = "0" * 64

    other = Other.__new__(Other)
    encoded()
    assert encoded([*TEXTS[:-1], "another"]) == len(TEXTS)
    assert encoded(TEXTS[::-1]) == len(TEXTS)
    assert encoded(name="other") == len(TEXTS)
    assert encoded(tokenizer=other) == len(TEXTS)
    assert encoded() == 0
    assert len(list(folder.iterdir())) == 5


def test_a_text_that_is_not_kept_is_encoded(folder: Path) -> None:
    assert cached_encode(TEXTS, load_tokenizer(), "test")("something new") == load_tokenizer().encode("something new")


def test_few_texts_are_not_worth_a_file(folder: Path) -> None:
    assert encoded(TEXTS[:1]) == 0
    assert not folder.exists()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ],
    ids=["a bit", "cut short", "empty", "longer"],
)
def test_a_damaged_file_is_made_anew(folder: Path, damage: Callable[[Path], object]) -> None:
    encoded()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    damage(file)
    assert encoded() == len(TEXTS)
    assert file.read_bytes() == whole
    assert encoded() == 0


@pytest.mark.parametrize("in_the_way", ["a file for the folder", "a folder for the file", "a link to nothing"])
def test_where_nothing_can_be_written_nothing_is_kept(folder: Path, in_the_way: str) -> None:
    if in_the_way == "a file for the folder":
        folder.write_text("")
    elif in_the_way == "a link to nothing":
        folder.symlink_to(folder.with_name("not mounted"))
    else:
        encoded()
        (file,) = folder.iterdir()
        file.unlink()
        file.mkdir()
    for _ in range(2):
        assert encoded() == len(TEXTS)
    if folder.is_dir():
        assert [path.suffix for path in folder.iterdir()] == [".ids"]  # nothing half-written


def _encode_often(folder: Path) -> int:
    hellaswag_cache.EVAL_CACHE, hellaswag_cache.AT_LEAST = folder, 2
    for _ in range(20):
        for file in folder.glob("*.ids"):
            file.unlink(missing_ok=True)
        encoded()
    return len(list(folder.glob("*.ids")))


def test_several_processes_may_write_at_once(folder: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(_encode_often, [folder] * 2))
    encoded()
    assert encoded() == 0
    assert len(list(folder.iterdir())) == 1
