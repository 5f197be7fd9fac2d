"""How documents are divided into shards, and what an interrupted preparation leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from src.data_processing import dataset_writer
from src.data_processing.data_downloader import prepare
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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_preparation_is_done_again_by_the_same_command(
    tmp_path: Path, commands: Commands, workers: int
) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(60, words=40_000))
    arguments = ["--source", "files", "--path", str(path), "--workers", str(workers), "--out"]
    folder = tmp_path / "datasets" / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, *arguments, "killed"], cwd=ROOT, env=commands.environment, stderr=subprocess.PIPE
    )
    spill = folder / "tokens.tmp"
    while not (spill.exists() and spill.stat().st_size):
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
    assert "cleaning up an interrupted preparation" in again.stderr
    assert contents(folder) == contents(tmp_path / "datasets" / "fresh")


def test_ctrl_c_ends_at_once_and_leaves_nothing_behind(tmp_path: Path, commands: Commands) -> None:
    """Even while the workers are at batches that take seconds."""
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(2) + ["x" * 20_000_000] * 4)
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
    assert time.monotonic() - start < 3
    assert process.returncode == 130
    assert said.splitlines()[1:] == ["interrupted"]
    assert not (tmp_path / "datasets" / "stopped").exists()


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


def test_shards_of_unknown_origin_are_not_touched(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    stray = tmp_path / "out" / "edu_i_000000_t_5.npy"
    stray.parent.mkdir()
    np.save(stray, np.arange(5, dtype=np.uint16))
    with pytest.raises(UserError, match=r"holds 1 shards without a manifest, such as edu_i_000000_t_5.npy"):
        prepare(request(path), tmp_path / "out", 1)
    assert os.listdir(tmp_path / "out") == [stray.name]


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which this system does not have")
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    monkeypatch.setattr(dataset_writer, "_SPILL", "/dev/full")
    with pytest.raises(StorageError, match="cannot write /dev/full: No space left on device"):
        prepare(request(path), tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


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
