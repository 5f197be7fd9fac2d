"""Drill 38, of data: JSON made by hand is refused by the name of its file, or unfinished work starts over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from src.data_processing.document_shuffle import Journal
from tests.conftest import Commands
from tests.data_processing.documents import MODULE, contents, request, some_texts, write_json_lines


def downloader(commands: Commands, *arguments: object):
    done = commands.module(MODULE, *map(str, arguments), "--workers", "1")
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"text": ' + "[" * 900 + "]" * 900 + "}", "found list"),
        ('{"text": 1e999}', "found Infinity"),
        ('{"text": "a", "n": ' + "9" * 10_000 + "}", "not JSON"),
        ("NaN", "expected a JSON object"),
    ],
)
def test_lines(tmp_path: Path, commands: Commands, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two \\ud800"}\n' + line + "\n")
    done = downloader(commands, "--source", "files", "--path", path, "--out", "x")
    assert done.returncode == 2
    assert f"Cannot read {path}, line 3: " in done.stderr
    assert message in done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    commands = Commands(folder)
    path = write_json_lines(folder / "a.jsonl", some_texts(100))
    assert downloader(commands, "--source", "files", "--path", path, "--out", "x").returncode == 0
    return folder


def huge(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest whose last shard claims 10^15 tokens."""
    first, last = manifest["shards"]
    last = last | {"tokens": 10**15, "file": last["file"].rpartition("_")[0] + f"_{10**15}.npy"}
    return {"shards": [first, last], "counts": manifest["counts"] | {"tokens": 10**15 + first["tokens"]}}


@pytest.mark.parametrize("mode", ["--verify", "--inspect", "--repair", "--source"])
@pytest.mark.parametrize(
    "change",
    [
        {"surprise": "\ud800"},
        {"seed": float("inf")},
        {"sources": [{"name": "files", "documents": "many"}]},
        {"sources": [{"name": "files", "files": [{"path": 1}]}]},
        {"n_vocab": 10**18},
        {"document_lengths": [1] * 100_000},
        huge,
    ],
    ids=["surrogate", "infinity", "documents", "files", "n_vocab", "lengths", "huge"],
)
def test_manifests(tmp_path: Path, commands: Commands, prepared: Path, change: Any, mode: str) -> None:
    folder = tmp_path / "datasets" / "x"
    shutil.copytree(prepared / "datasets" / "x", folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | (change(manifest) if callable(change) else change)))
    arguments = ["--source", "files", "--path", prepared / "a.jsonl"] if mode == "--source" else [mode]
    done = downloader(commands, *arguments, "--out", "x")
    if change is huge:  # the page shows the rest
        assert done.returncode == (0 if mode == "--inspect" else 2)
        assert "is missing: expected a shard of 1000000000000000 tokens" in done.stderr + done.stdout
    else:
        assert done.returncode == 2
        assert f"Cannot read {path}: " in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {}},
        {"counts": {"documents": "5"}},
        {"counts": {"documents": 1, "tokens": 10**18, "skipped_empty": 0, "replaced_invalid": 0}},
        {"position": [0, "x", 0]},
        {"is_complete": "yes"},
        {"sources": [{"name": "files", "files": [{"path": 1}]}]},
        {"surprise": 1},
        "[" * 100_000,
    ],
)
def test_journals_start_over(tmp_path: Path, commands: Commands, prepared: Path, change: Any) -> None:
    folder = tmp_path / "datasets" / "x"
    work = folder / ".preparing"
    work.mkdir(parents=True)
    source = json.loads((prepared / "datasets" / "x" / "manifest.json").read_text())["sources"][0]
    details = {name: source[name] for name in ("name", "path", "files")}
    asked = request(prepared / "a.jsonl", tokens_per_shard=100_000_000, seed=42).stored()
    Journal(asked, [details]).write(work)
    content = json.loads((work / "journal.json").read_text())
    (work / "journal.json").write_text(change if isinstance(change, str) else json.dumps(content | change))
    done = downloader(commands, "--source", "files", "--path", prepared / "a.jsonl", "--out", "x")
    assert done.returncode == 0, done.stderr
    assert "starting over: the unfinished work is damaged" in done.stderr
    assert contents(folder) == contents(prepared / "datasets" / "x")
