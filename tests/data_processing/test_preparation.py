"""What a request lets into a dataset, what its manifest then says, and how an interrupted preparation goes on."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from src.data_processing import preparation, source_runs
from src.data_processing.preparation import prepare
from src.data_processing.shards import read_manifest
from src.data_processing.text_sources import Source
from src.data_processing.tokenizer import load_tokenizer
from src.utils.errors import BusyError, StorageError, UserError
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing.documents import MODULE, all_decoded, contents, request, some_texts, write_json_lines


def test_several_sources_and_their_shares(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    texts = {"a": some_texts(30, seed=1), "b": some_texts(60, seed=2), "notes": ["One note.", "Another one."]}
    for name in "ab":
        write_json_lines(tmp_path / f"{name}.jsonl", texts[name])
    for number, text in enumerate(texts["notes"]):
        (folder / f"{number}.md").write_text(text)
    paths = [str(tmp_path / "a.jsonl"), str(folder), str(tmp_path / "*.jsonl")]
    manifest = prepare(request(folder, paths=paths), tmp_path / "out", 1)
    assert [source["path"] for source in manifest.sources] == paths
    expected = [texts["a"], texts["notes"], texts["b"]]
    tokens = [sum(1 + len(load_tokenizer().encode(text)) for text in part) for part in expected]
    for source, part, count in zip(manifest.sources, expected, tokens, strict=True):
        assert source["documents"] == len(part)
        assert source["tokens"] == count
        assert source["text_bytes"] == sum(map(len, part))
        assert source["share"] == pytest.approx(count / sum(tokens), abs=1e-6)


def test_document_lengths_by_powers_of_two(tmp_path: Path) -> None:
    tokens = [2, 2, 3, 4, 7, 8, 63, 64, 1_000]
    texts = [f"{index} " + " a" * (count - 3) for index, count in enumerate(tokens)]
    counts = [1 + len(load_tokenizer().encode(text.rstrip())) for text in texts]
    path = write_json_lines(tmp_path / "a.jsonl", [text.rstrip() for text in texts])
    manifest = prepare(request(path), tmp_path / "out", 1)
    expected = [sum(2**k <= count < 2 ** (k + 1) for count in counts) for k in range(max(counts).bit_length())]
    assert manifest.document_lengths == expected


@pytest.mark.parametrize("files", [1, 4])
def test_limits_keep_the_first_documents(tmp_path: Path, files: int) -> None:
    texts = some_texts(200)
    for number in range(files):
        part = texts[number * 200 // files : (number + 1) * 200 // files]
        write_json_lines(tmp_path / f"{number}.jsonl", [" ", *part])
    path = tmp_path / "*.jsonl"
    some = prepare(request(path, max_documents=70), tmp_path / "documents", 1)
    assert sorted(all_decoded(tmp_path / "documents")) == sorted(texts[:70])
    assert some.counts["documents"] == 70
    prepare(request(path, max_tokens=5_000), tmp_path / "tokens", 1)
    kept = all_decoded(tmp_path / "tokens")
    assert sorted(kept) == sorted(texts[: len(kept)])
    tokens = [1 + len(load_tokenizer().encode(text)) for text in texts]
    assert sum(tokens[: len(kept)]) <= 5_000 < sum(tokens[: len(kept) + 1])
    both = prepare(request(path, max_tokens=10**9, max_documents=10**9), tmp_path / "all", 1)
    assert both.counts["documents"] == 200


def test_what_lies_behind_a_limit_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": " "}\n{"text": "t\xffo"}\n{"text": ""}\n{"text": "thr\xffe"}\n')
    counts = prepare(request(path, max_documents=2), tmp_path / "out", 1).counts
    assert (counts["documents_read"], counts["skipped_empty"], counts["replaced_invalid"]) == (3, 1, 1)


def test_a_limit_that_leaves_too_little_is_named(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    with pytest.raises(UserError, match=r"at least two are needed.*; or raise the limit"):
        prepare(request(path, max_documents=1), tmp_path / "out", 1)


def test_a_trial_has_a_folder_of_its_own(tmp_path: Path, commands: Commands) -> None:
    done = commands.module(MODULE, "--source", "pydocs", "--max-tokens", "50_000")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "datasets" / "pydocs-max-50000-tokens")
    assert 40_000 < manifest.counts["tokens"] <= 50_000
    assert json.loads(done.stdout)["tokens"] == manifest.counts["tokens"]


def test_too_small_a_disk_is_said_beforehand(tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(100))
    monkeypatch.setattr(preparation, "free_bytes", lambda _: 1_000)
    prepare(request(path), tmp_path / "out", 1)  # the estimate for files is a guess
    # less what is there already: a plan, which names the path
    assert re.search(r"warning: some 18\.\d kB of disk needed, 1\.0 kB free at", capfd.readouterr().err)
    monkeypatch.setattr(Source, "estimate_is_sure", True)
    with pytest.raises(StorageError, match=r"kB free at .*; make room, .* or use --max-tokens"):
        prepare(request(path), tmp_path / "other", 1)
    assert not (tmp_path / "other").exists()


SMALL_RUNS = (
    "import sys; from src.data_processing import source_runs; source_runs.RUN_TOKENS = 100_000; "
    "from src.data_processing.data_downloader import main; main()"
)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_preparation_goes_on_where_it_was(tmp_path: Path, commands: Commands, workers: int) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(120, words=40_000))
    arguments = ["--source", "files", "--path", str(path), "--workers", str(workers), "--out"]
    folder = tmp_path / "datasets" / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_RUNS, *arguments, "killed"],
        cwd=ROOT,
        env=commands.environment,
        stderr=subprocess.PIPE,
    )
    while not (folder / ".preparing" / "run_000002.json").exists():
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.005)
    with pytest.raises(BusyError, match="another process is preparing"):
        prepare(request(path), folder, 1)
    process.send_signal(signal.SIGKILL)
    # The workers hold stderr open: its end is theirs.
    _, _ = process.communicate(timeout=10)
    with pytest.raises(UserError, match="did not finish"):
        read_manifest(folder)

    again = commands.module(MODULE, *arguments, "killed")
    fresh = commands.module(MODULE, *arguments, "fresh")
    assert (again.returncode, fresh.returncode) == (0, 0), again.stderr
    assert re.search(r"going on after \d{3},\d{3} tokens that are there", again.stderr)
    assert contents(folder) == contents(tmp_path / "datasets" / "fresh")


@pytest.mark.parametrize(("kind", "points"), [("same", 60), ("other", 60), ("repair", 20)])
def test_a_kill_at_any_disk_operation_changes_nothing(
    tmp_path: Path, commands: Commands, kind: str, points: int
) -> None:
    texts = some_texts(180) + some_texts(20)
    path = write_json_lines(tmp_path / "a.jsonl", texts[:100])
    (tmp_path / "b.txt").write_text(texts[120])
    write_json_lines(tmp_path / "c.jsonl", texts[100:])
    done = commands.module("tests.data_processing.crash_sweep", str(path.parent / "*.*"), str(tmp_path / "out"), kind)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > points


def test_other_sources_begin_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    """What a stopped preparation left is not mixed with text that has changed since."""
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(40))
    monkeypatch.setattr(preparation, "plan_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(request(path), tmp_path / "out", 1)
    assert (tmp_path / "out" / ".preparing" / "run_000000.json").exists()
    monkeypatch.undo()
    changed = write_json_lines(tmp_path / "a.jsonl", some_texts(41))
    states = (tmp_path / "out" / ".preparing" / "run_000000.json").read_text()
    (tmp_path / "out" / ".preparing" / "run_000000.json").write_text(
        states.replace('"complete": true', '"complete": false')
    )
    manifest = prepare(request(changed), tmp_path / "out", 1)
    assert manifest.counts["documents"] == 41
    assert "not what was begun here: starting over" in capfd.readouterr().err


def test_ctrl_c_ends_at_once_and_leaves_nothing_behind(tmp_path: Path, commands: Commands) -> None:
    """Even while the workers are at batches that take seconds."""
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(2) + [random_letters(20_000_000)] * 12)
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, "--source", "files", "--path", str(path), "--workers", "2", "--out", "stopped"],
        cwd=ROOT,
        env=commands.environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(_children(process.pid)) < 3:  # two workers and the interpreter's resource tracker
        assert process.poll() is None, "finished before it could be stopped"
        time.sleep(0.05)
    time.sleep(1)  # they start and take a batch each
    os.killpg(process.pid, signal.SIGINT)
    start = time.monotonic()
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - start < 8  # of some 15 that the workers would take
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "datasets" / "stopped").exists()


def random_letters(count: int) -> str:
    """A word that takes seconds to encode."""
    return np.random.default_rng(0).integers(97, 123, count).astype(np.uint8).tobytes().decode()


def _children(pid: int) -> list[str]:
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    if not listing.exists():
        pytest.skip("needs /proc to see the workers")
    return listing.read_text().split()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    path.write_text(path.read_text() + "{")
    with pytest.raises(UserError, match="line 11: not JSON"):
        prepare(request(path), tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_storage_error_and_the_work_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(5):
        write_json_lines(tmp_path / f"{part}.jsonl", some_texts(60, seed=part))
    path = tmp_path / "*.jsonl"
    monkeypatch.setattr(source_runs, "RUN_TOKENS", 4_000)
    real, left = os.fsync, 40

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*run_00000\d.*: No space left on device"):
        prepare(request(path), tmp_path / "out", 1)
    monkeypatch.undo()
    prepare(request(path), tmp_path / "out", 1)
    prepare(request(path), tmp_path / "fresh", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("damaged", ["run_000000.tokens_3", "run_000001.documents.npy", "run_000001.json", "plan.json"])
def test_damaged_unfinished_work_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], damaged: str
) -> None:
    for part in range(5):
        write_json_lines(tmp_path / f"{part}.jsonl", some_texts(60, seed=part))
    path = tmp_path / "*.jsonl"
    monkeypatch.setattr(source_runs, "RUN_TOKENS", 4_000)
    monkeypatch.setattr(preparation, "plan_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(request(path), tmp_path / "out", 1)
    monkeypatch.undo()
    victim = tmp_path / "out" / ".preparing" / damaged
    content = bytearray(victim.read_bytes())
    content[40] ^= 1
    victim.write_bytes(content)
    prepare(request(path), tmp_path / "out", 1)
    assert "starting over" in capfd.readouterr().err
    prepare(request(path), tmp_path / "fresh", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
