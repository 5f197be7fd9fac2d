"""Documents become the same shards however they are prepared, and what goes wrong is said."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from src.data_processing import data_downloader
from src.data_processing.preparation import prepare
from src.data_processing.repair import verify
from src.data_processing.shards import check_shard, read_manifest
from src.utils.errors import UserError
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing.documents import (
    MODULE,
    all_decoded,
    contents,
    request,
    some_texts,
    write_json_lines,
)


def test_the_result_is_one_json_object_and_a_second_start_writes_nothing(tmp_path: Path, commands: Commands) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(100))
    arguments = ["--source", "files", "--path", str(path), "--out", "mine"]
    first = commands.module(MODULE, *arguments)
    folder = tmp_path / "datasets" / "mine"
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    second = commands.module(MODULE, *arguments)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
    manifest = read_manifest(tmp_path / "datasets" / "mine")
    for done in (first, second):
        assert done.returncode == 0
        result = json.loads(done.stdout.splitlines()[-1])
        seconds = result.pop("seconds")
        assert 0 <= seconds < 60
        assert result == {
            "dataset": str(tmp_path / "datasets" / "mine"),
            "documents": 100,
            "tokens": manifest.counts["tokens"],
            "text_bytes": manifest.counts["text_bytes"],
            "validation_tokens": manifest.validation[0].tokens,
            "shards": 2,
        }
    assert second.stderr == f"already prepared: {tmp_path / 'datasets' / 'mine'}\n"


def test_the_launcher_gives_datasets_the_names_that_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (ROOT / "run_pre_training_e2e.sh").read_text()
    [naming] = re.findall(r'^case "\$DATA_SOURCE" in.*?^DATA_DIR=.*?$', script, re.MULTILINE | re.DOTALL)
    for source in ("pydocs", "fineweb-edu"):
        for limit in ("", "10_000_000"):
            variables = {"DATA_SOURCE": source, "DATA_MAX_TOKENS": limit, "DATA_DIR": ""}
            done = subprocess.run(
                ["bash", "-c", f'{naming}\necho "$DATA_DIR"'], env=variables, capture_output=True, text=True, check=True
            )
            limits = ["--max-tokens", limit] if limit else []
            monkeypatch.setattr(sys, "argv", ["data_downloader", "--source", source, *limits])
            assert done.stdout.strip() == data_downloader._parse_arguments().out


def test_pydocs_command(tmp_path: Path, commands: Commands) -> None:
    done = commands.module(MODULE, "--source", "pydocs", "--max-documents", "60")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "datasets" / "pydocs-max-60-documents")
    assert manifest.sources[0]["name"] == "pydocs"
    assert manifest.counts["documents"] == 60
    assert manifest.shards[0].file == f"pydocs_i_000000_t_{manifest.shards[0].tokens}.npy"


def test_another_request_is_refused_naming_the_difference(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    prepare(request(path), tmp_path / "out", 1)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="seed is 42 there, 43 asked; choose another --out"):
        prepare(request(path, seed=43), tmp_path / "out", 1)
    write_json_lines(path, some_texts(11))
    with pytest.raises(UserError, match=rf"{path} has \d+ bytes there, \d+ now; choose"):
        prepare(request(path), tmp_path / "out", 1)
    path.unlink()
    assert prepare(request(path), tmp_path / "out", 1).counts["documents"] == 10
    assert contents(tmp_path / "out") == before


def test_a_file_more_or_less_is_another_request(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        write_json_lines(folder / f"{name}.jsonl", some_texts(10))
    prepare(request(folder), tmp_path / "out", 1)
    (folder / "a.jsonl").rename(folder / "c.jsonl")
    with pytest.raises(UserError, match=rf"{folder}/a.jsonl is gone; {folder}/c.jsonl is new"):
        prepare(request(folder), tmp_path / "out", 1)


def test_a_link_that_leads_elsewhere_since_is_another_request(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name} blob").write_text(json.dumps({"text": f"{name} text"}) + '\n{"text": "one more"}\n')
        os.utime(tmp_path / f"{name} blob", (0, 0))
    link = tmp_path / "x.jsonl"
    link.symlink_to("a blob")
    prepare(request(link), tmp_path / "out", 1)
    assert prepare(request(link), tmp_path / "out", 1).sources[0]["files"][0]["path"] == str(link)
    link.unlink()
    link.symlink_to("b blob")
    os.utime(link, (2**32, 2**32), follow_symlinks=False)
    with pytest.raises(UserError, match=f"{link} has other content"):
        prepare(request(link), tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(["--source", "files", "--path", "nowhere.txt", "--out", "x"], 2, "does not exist", id="no file"),
        pytest.param(["--source", "files", "--path", "*.nothing", "--out", "x"], 2, "matches nothing", id="no match"),
        pytest.param(["--source", "files", "--path", "{}/empty.txt", "--out", "x"], 2, "no document", id="empty"),
        pytest.param(["--source", "files", "--path", "{}/one.txt", "--out", "x"], 2, "at least two", id="one document"),
        pytest.param(["--source", "files", "--path", "{}/a.jsonl", "--out", "x"], 2, "found: body", id="no field"),
        pytest.param(["--source", "files", "--path", "{}/b.jsonl", "--out", "x"], 2, "line 1: not JSON", id="bad JSON"),
        pytest.param(
            ["--source", "files", "--path", "{}", "--out", "{}/one.txt/x"], 4, "cannot write", id="unwritable"
        ),
        pytest.param(["--source", "files", "--out", "x"], 2, "needs --path", id="no path"),
        pytest.param(["--source", "files", "--path", "{}/one.txt"], 2, "--out DIR is needed", id="no out"),
        pytest.param(["--source", "pydocs", "--path", "x"], 2, "--path is for --source files", id="needless path"),
        pytest.param(["--source", "pydocs", "--workers", "0"], 2, "0 is below 1", id="no workers"),
        pytest.param(
            ["--source", "pydocs", "--text-field", "text"], 2, "--text-field is for --source files", id="needless field"
        ),
        pytest.param(
            ["--verify", "--out", "x", "--seed", "42", "--source", "pydocs"],
            2,
            "--source, --seed would change nothing: --verify takes --out only",
            id="needless for verify",
        ),
        pytest.param(["--verify", "--out", "x", "--workers", "2"], 2, "--workers would", id="no workers verify"),
        pytest.param(
            ["--inspect", "--out", "x", "--max-tokens", "5"],
            2,
            "--max-tokens would change nothing: --inspect takes --out, --skipped, --windows only",
            id="needless for inspect",
        ),
        pytest.param(
            ["--repair", "--out", "x", "--tokens-per-shard", "5"],
            2,
            "--tokens-per-shard would change nothing: --repair takes --out, --workers only",
            id="needless for repair",
        ),
        pytest.param(["--verify", "--out", "absent"], 2, "no dataset at", id="nothing to verify"),
    ],
)
def test_errors_through_the_command(
    tmp_path: Path, commands: Commands, arguments: list[str], code: int, message: str
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "empty.txt").write_text(" \n")
    (texts / "one.txt").write_text("Only one document.")
    (texts / "a.jsonl").write_text('{"body": "a"}\n')
    (texts / "b.jsonl").write_text("not json\n")
    done = commands.module(MODULE, *[argument.replace("{}", str(texts)) for argument in arguments])
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "datasets" / "x").exists()


def test_help_explains_the_sources(commands: Commands) -> None:
    done = commands.module(MODULE, "--help")
    assert done.returncode == 0
    for word in ("fineweb-edu", "pydocs", ".parquet", "--verify", "--repair", "Exit codes"):
        assert word in done.stdout


def test_verify_names_every_fault(tmp_path: Path, commands: Commands) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(100))
    folder = tmp_path / "datasets" / "mine"
    manifest = prepare(request(path, tokens_per_shard=2_000), folder, 1)
    (folder / "notes.txt").touch()
    sound = commands.module(MODULE, "--verify", "--out", "mine")
    assert sound.returncode == 0
    assert json.loads(sound.stdout)["shards"] == len(manifest.shards)
    assert f"ignoring 1 file(s) in {folder} that its manifest does not list: notes.txt" in sound.stderr

    changed, cut = folder / manifest.shards[1].file, folder / manifest.shards[2].file
    array = np.load(changed, mmap_mode="r+")
    array[10], array[11] = array[11], array[10]
    array.flush()
    os.truncate(cut, cut.stat().st_size - 1)
    damaged = commands.module(MODULE, "--verify", "--out", "mine")
    assert damaged.returncode == 2
    assert f"{changed}: expected sha256 {manifest.shards[1].sha256}" in damaged.stderr
    assert f"{cut}: expected {cut.stat().st_size + 1} bytes, found {cut.stat().st_size}" in damaged.stderr
    assert damaged.stdout == ""
    check_shard(folder, manifest.shards[0], manifest.n_vocab, full=True)
    with pytest.raises(UserError, match="2 of"):
        verify(folder)


def test_shared_prose_round_trips(shared: Path, tmp_path: Path) -> None:
    path = shared / "text" / "rust_book.jsonl.gz"
    prepare(request(path), tmp_path / "out", 1)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    assert sorted(all_decoded(tmp_path / "out")) == sorted(texts)


def test_a_damaged_dataset_is_not_called_prepared(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    manifest = prepare(request(path), tmp_path / "out", 1)
    shard = tmp_path / "out" / manifest.train[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"cut short; repair it with: .* --repair --out '{tmp_path / 'out'}'"):
        prepare(request(path), tmp_path / "out", 1)
    shard.unlink()
    with pytest.raises(UserError, match=r"is missing: .*; repair it with"):
        prepare(request(path), tmp_path / "out", 1)
