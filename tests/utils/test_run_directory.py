"""Whose a run's folder is, and how long one waits for it."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.utils import files as run_directory
from src.utils.errors import BusyError, StoppedError, StorageError
from src.utils.files import claim_file, claimed, refuse_claimed, try_lock


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "held"


@pytest.fixture
def release(run_dir: Path) -> Iterator[threading.Event]:
    """Until it is set, this process holds the folder, and says that its launcher was another than its parent is now."""
    if sys.platform != "linux":
        pytest.skip("only Linux lets go of processes whose launcher is gone")
    run_dir.mkdir(parents=True)
    file = open(claim_file(run_dir), "a+", encoding="utf-8")  # noqa: SIM115
    assert try_lock(file)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "launcher": os.getppid() + 1}))
    file.flush()
    event = threading.Event()

    def let_go() -> None:
        event.wait(30)
        file.close()

    thread = threading.Thread(target=let_go)
    thread.start()
    yield event
    event.set()
    thread.join()


def test_a_holder_that_is_about_to_end_is_waited_for(
    run_dir: Path, release: threading.Event, capsys: pytest.CaptureFixture[str]
):
    """By the preflight and by training."""
    threading.Timer(2, release.set).start()
    started = time.monotonic()
    refuse_claimed(run_dir)
    with claimed(run_dir):
        assert time.monotonic() - started > 1.5
    words = capsys.readouterr().err
    assert f"process {os.getpid()} has lost its launcher and still holds {run_dir}: it finishes its step" in words
    assert words.count("has lost its launcher") == 1


def test_it_is_waited_for_only_so_long_and_until_a_stop(
    run_dir: Path, release: threading.Event, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(StoppedError), claimed(run_dir, lambda: True):
        pass
    monkeypatch.setattr(run_directory, "ENDING_PATIENCE_S", 0.3)
    with pytest.raises(BusyError, match=rf'"pid": {os.getpid()}, .*"launcher": '), claimed(run_dir):
        pass


def test_one_with_a_launcher_says_so_and_is_not_waited_for(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "drill")
    with claimed(run_dir):
        holder = json.loads(claim_file(run_dir).read_text())
        assert holder.get("launcher") == (os.getppid() if sys.platform == "linux" else None)
        started = time.monotonic()
        with pytest.raises(BusyError, match="another process is training"):
            refuse_claimed(run_dir)
        with pytest.raises(BusyError), claimed(run_dir):
            pass
        assert time.monotonic() - started < 10


def test_a_folder_on_a_disk_that_is_not_mounted(run_dir: Path, tmp_path: Path):
    run_dir.parent.mkdir()
    run_dir.symlink_to(tmp_path / "unmounted")
    with pytest.raises(StorageError, match=r"held is a link to .*unmounted, which is not there; mount its disk"):
        claimed(run_dir).__enter__()
