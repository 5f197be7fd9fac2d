"""Drill 24: hard documents cost seconds and megabytes, and become the same bytes with any number of workers."""

import json
import sys
import time
from pathlib import Path

from src.data_processing.shards import read_manifest
from src.data_processing.tokenizer import load_tokenizer
from tests.conftest import Commands
from tests.data_processing.documents import MODULE, all_decoded, contents, some_texts

HARD = {
    "empty": "",
    "white space only": " \n\t\u3000",
    "one letter": "x" * 1_000_000,
    "one space": " " * 1_000_000 + "end",
    "lines": "a\n" * 600_000,
    "the name of the control token": "before <|endoftext|> after",
    "astral": "\U0001f600" * 100_000,
    "no spaces": "\u6f22\u5b57\u4eee\u540d" * 100_000,
}


PEAK_OF = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def write_hard_corpus(folder: Path) -> None:
    folder.mkdir()
    rows = [json.dumps({"text": text}) for text in [*some_texts(2_000), *HARD.values()]]
    rows += ['{"text": "half a pair \\ud800 here"}', json.dumps({"text": None})]
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "b.txt").write_bytes(b"caf\xe9 \xff\xfe")
    (folder / "c.txt").write_bytes(bytes(range(256)) * 100)
    (folder / "d.txt").write_bytes(b"\xed\xa0\x80 a surrogate as bytes")


def test_the_same_bytes_with_any_number_of_workers(tmp_path: Path, commands: Commands) -> None:
    write_hard_corpus(tmp_path / "texts")
    common = ["--source", "files", "--path", str(tmp_path / "texts"), "--tokens-per-shard", "100_000"]
    for workers in ("1", "3"):
        start = time.monotonic()
        done = commands.module(MODULE, *common, "--out", workers, "--workers", workers)
        assert time.monotonic() - start < 60
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "datasets" / "1") == contents(tmp_path / "datasets" / "3")
    manifest = read_manifest(tmp_path / "datasets" / "1")
    assert manifest.counts["skipped_empty"] == 3
    assert manifest.counts["replaced_invalid"] == 4
    assert "invalid UTF-8 in 4 document(s) was replaced" in done.stderr
    assert f"3 in {tmp_path / 'texts' / 'b.txt'}" in done.stderr
    documents = set(all_decoded(tmp_path / "datasets" / "1"))
    assert {text for text in HARD.values() if text.strip()} < documents
    assert {"caf\ufffd \ufffd\ufffd", "half a pair \ufffd here"} < documents
    assert manifest.counts["documents"] == len(documents) == 2_000 + 6 + 4


def test_text_never_becomes_the_control_token() -> None:
    text = HARD["the name of the control token"]
    ids = load_tokenizer().encode(text)
    assert load_tokenizer().end_of_text not in ids
    assert load_tokenizer().decode(ids) == text


def test_fifty_megabytes_on_one_line(tmp_path: Path, commands: Commands) -> None:
    text = "lorem ipsum dolor " * (50_000_000 // 18)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "a short one"}) + "\n")
    command = [sys.executable, "-m", MODULE, "--source", "files", "--path", str(folder), "--out", "big"]
    start = time.monotonic()
    done = commands.run([sys.executable, "-c", PEAK_OF, *command])
    assert time.monotonic() - start < 60
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1.5e6, "kB"
    assert read_manifest(tmp_path / "datasets" / "big").counts["text_bytes"] == len(text) + len("a short one")
