"""How documents are divided into shards, and what an interrupted preparation leaves."""

import errno
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
from src.data_processing.tokenizer import load_tokenizer
from src.utils.errors import BusyError, StorageError, UserError
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing.documents import (
    MODULE,
    all_decoded,
    contents,
    decoded,
    request,
    some_texts,
    write_json_lines,
)


def test_every_document_is_in_one_shard_whole(tmp_path: Path) -> None:
    texts = some_texts(500)
    manifest = prepare(
        request(write_json_lines(tmp_path / "a.jsonl", texts), tokens_per_shard=7_000), tmp_path / "out", 1
    )
    found = [decoded(tmp_path / "out", shard.file) for shard in manifest.shards]
    assert sorted(all_decoded(tmp_path / "out")) == sorted(texts)
    assert all_decoded(tmp_path / "out") != texts, "not shuffled"
    for shard, documents in zip(manifest.shards, found, strict=True):
        assert shard.tokens == len(np.load(tmp_path / "out" / shard.file)) <= 7_000
        assert (shard.documents, shard.text_bytes) == (len(documents), len("".join(documents).encode()))
    assert manifest.counts["documents"] == 500
    assert manifest.counts["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest.counts["tokens"] == sum(len(load_tokenizer().encode(text)) + 1 for text in texts)


def test_validation_is_a_modest_share(tmp_path: Path) -> None:
    """A twentieth; of a small corpus up to a quarter; never more than a shard."""
    for count, low, high in ((100, 0.20, 0.25), (10_000, 0.045, 0.05)):
        path = write_json_lines(tmp_path / f"{count}.jsonl", some_texts(count))
        manifest = prepare(request(path), tmp_path / str(count), 1)
        assert low < manifest.shards[0].tokens / manifest.counts["tokens"] <= high
        assert [shard.split for shard in manifest.shards] == ["validation", "train"]
    manifest = prepare(request(path, tokens_per_shard=5_000), tmp_path / "capped", 1)
    assert 4_900 < manifest.shards[0].tokens <= 5_000


def test_seeds_decide_the_order(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    orders = [
        decoded(tmp_path / out, prepare(request(path, seed=seed), tmp_path / out, 1).shards[1].file)
        for out, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert orders[0] == orders[1] != orders[2]


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


def test_a_shard_that_begins_with_a_long_document_takes_no_more(tmp_path: Path) -> None:
    """For any number of tokens a shard may hold; and validation never takes all."""
    texts = some_texts(30, words=500) + some_texts(3, words=9_000, seed=1)
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    for limit in (1, 400, 700, 3_000, 20_000):
        manifest = prepare(request(path, tokens_per_shard=limit), tmp_path / str(limit), 1)
        for shard in manifest.shards:
            assert shard.tokens <= limit or shard.documents == 1
    for seed in range(30):
        few = request(write_json_lines(tmp_path / "few.jsonl", texts[-2:]), seed=seed)
        manifest = prepare(few, tmp_path / f"few {seed}", 1)
        assert [shard.documents for shard in manifest.shards] == [1, 1]


def test_equal_documents_are_never_on_both_sides(tmp_path: Path) -> None:
    """Whether they are dropped or not."""
    texts = some_texts(200) * 3 + ["once"]
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    kept = prepare(request(path, tokens_per_shard=3_000), tmp_path / "kept", 1)
    assert sorted(all_decoded(tmp_path / "kept")) == sorted(texts)
    sides = [set(decoded(tmp_path / "kept", shard.file)) for shard in kept.shards]
    assert len(sides) > 5
    assert sum(map(len, sides)) == len(set.union(*sides)) == 201
    dropped = prepare(request(path, drop_duplicates=True), tmp_path / "dropped", 1)
    assert sorted(all_decoded(tmp_path / "dropped")) == sorted(set(texts))
    assert (dropped.counts["dropped_duplicates"], dropped.counts["documents_read"]) == (400, 601)


def test_the_order_of_the_files_does_not_matter(tmp_path: Path) -> None:
    texts = some_texts(100)
    for name, part in (("a", texts), ("b", texts[::-1])):
        write_json_lines(tmp_path / f"{name}.jsonl", part)
        prepare(request(tmp_path / f"{name}.jsonl"), tmp_path / name, 1)
    assert all_decoded(tmp_path / "a") == all_decoded(tmp_path / "b")


@pytest.mark.parametrize("texts", [[], ["one"], ["the same", "the same"]])
def test_one_document_is_not_enough(tmp_path: Path, texts: list[str]) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match="at least two are needed"):
        prepare(request(path), tmp_path / "out", 1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_long_document_is_not_validation_where_a_short_one_will_do(tmp_path: Path) -> None:
    """Whatever the order in which the seed shuffles them."""
    for seed in range(4):
        folder = tmp_path / f"texts {seed}"
        folder.mkdir()
        (folder / "long.txt").write_text("word " * 20_000)
        (folder / "short.txt").write_text("other " * 500)
        manifest = prepare(request(folder, seed=seed), tmp_path / f"out {seed}", 1)
        assert manifest.validation[0].tokens < 1_000
        assert manifest.train[0].tokens > 19_000
