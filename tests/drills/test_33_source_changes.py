"""Drill 33: a source that changes while it is prepared is named, and does not mislead the next start or a repair."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from src.data_processing.shards import read_manifest
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing.documents import contents, has_progress, some_texts, write_json_lines

# An entry of the journal every 20,000 tokens, so that there is something to resume from.
COMMAND = (
    "from src.data_processing import data_downloader, document_shuffle; from src.utils.errors import exit_with; "
    "document_shuffle.FLUSH_TOKENS = 20_000; exit_with(data_downloader.main)"
)


def grow(path: Path) -> None:
    with open(path, "a") as file:
        file.write('{"text": "one more"}\n')


def replace(path: Path) -> None:
    os.replace(write_json_lines(path.with_name("new"), some_texts(50)), path)


def rewrite(path: Path) -> None:
    """With as many bytes and the old times."""
    before = path.stat()
    path.write_text(path.read_text().replace("Document 7", "Document 8"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [grow, replace, rewrite, Path.unlink])
def test_the_file_is_named_and_the_next_start_is_right(
    tmp_path: Path, commands: Commands, change: Callable[[Path], None]
) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(300, words=4_000))
    write_json_lines(tmp_path / "b.jsonl", some_texts(20, seed=1))
    folder = tmp_path / "datasets" / "x"
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "--source",
        "files",
        "--path",
        str(tmp_path / "*.jsonl"),
        "--workers",
        "1",
    ]
    with subprocess.Popen(
        [*command, "--out", "x"], cwd=ROOT, env=commands.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        while not has_progress(folder):
            assert process.poll() is None, "finished before the change"
            time.sleep(0.001)
        change(path)
        message = process.communicate(timeout=60)[1]
    assert process.returncode == 2, message
    assert f"Cannot use {path}: it changed while" in message or f"Cannot read {path}" in message
    assert not (folder / "manifest.json").exists()

    for out in ("x", "fresh"):
        done = commands.run([*command, "--out", out])
        assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(tmp_path / "datasets" / "fresh")


def test_a_repair_of_a_source_that_changes_meanwhile(tmp_path: Path, commands: Commands) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(300, words=4_000))
    command = [sys.executable, "-c", COMMAND, "--out", "x", "--workers", "1"]
    assert commands.run([*command, "--source", "files", "--path", str(path)]).returncode == 0
    folder, original = tmp_path / "datasets" / "x", tmp_path / "original"
    shutil.copy(path, original)
    shard = folder / read_manifest(folder).train[0].file
    os.truncate(shard, shard.stat().st_size - 2)
    with subprocess.Popen(
        [*command, "--repair"], cwd=ROOT, env=commands.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        while not has_progress(folder / ".repairing"):
            assert process.poll() is None, "finished before the change"
            time.sleep(0.001)
        grow(path)
        message = process.communicate(timeout=60)[1]
    assert process.returncode == 2, message
    assert f"{path}: it changed while" in message
    refused = commands.run([*command, "--repair"])
    assert refused.returncode == 2
    assert f"{path} was sha256" in refused.stderr
    os.replace(original, path)
    repaired = commands.run([*command, "--repair"])
    assert repaired.returncode == 0, repaired.stderr
    assert json.loads(repaired.stdout)["shards"] == 2
