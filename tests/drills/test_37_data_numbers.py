"""Drill 37, of data: absurd numbers of the downloader end with 2 and what would work, before anything is made."""

from pathlib import Path

import pytest

from src.utils.errors import UserError
from tests.conftest import Commands
from tests.data_processing.documents import MODULE, some_texts, write_json_lines

NUMBERS = ["0", "-1", "nan", "1e308", "1.5", "", str(2**53), str(2**63), "9" * 5_000]


@pytest.mark.parametrize("option", ["--max-tokens", "--max-documents", "--tokens-per-shard", "--workers", "--seed"])
def test_the_number_is_refused(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    from src.data_processing import data_downloader  # in this process: 50 others would take a minute

    for number in NUMBERS:
        if option == "--seed" and number in ("0", str(2**53)):
            continue
        monkeypatch.setattr("sys.argv", ["data_downloader", "--source", "pydocs", "--out", "x", f"{option}={number}"])
        with pytest.raises(UserError, match=f"Cannot use {option}: {number[:40]!r} is not a whole number from "):
            data_downloader.main()


@pytest.mark.parametrize("option", ["--max-tokens", "--max-documents"])
def test_a_limit_that_leaves_too_little(tmp_path: Path, commands: Commands, option: str) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(20))
    done = commands.module(MODULE, "--source", "files", "--path", str(path), "--out", "x", option, "1")
    assert done.returncode == 2
    assert "at least two are needed" in done.stderr
    assert not (tmp_path / "datasets" / "x").exists()


def test_extremes_that_work(tmp_path: Path, commands: Commands) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(20))
    extremes = ["--tokens-per-shard", "1", "--max-tokens", str(10**15), "--seed", str(2**63 - 1)]
    done = commands.module(MODULE, "--source", "files", "--path", str(path), "--out", "x", *extremes)
    assert done.returncode == 0, done.stderr
