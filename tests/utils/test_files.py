"""Files that survive, errors that say what to do, JSON made by hand, and the lock on a run's folder."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from src.utils import files
from src.utils.errors import BusyError, StoppedError, StorageError, UserError
from src.utils.files import (
    check_writable,
    claim_file,
    claimed,
    fingerprint,
    read_json,
    refuse_claimed,
    refuse_dangling,
    replacing,
    set_aside,
    storage_errors,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(StorageError, match=f"Cannot write {path}: No space"), replacing(path, 1):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_a_leftover_is_not_written_through(tmp_path: Path, kind: str):
    """Of the temporary file: a link would lead to a file of the user's, and a FIFO would block."""
    precious, path = tmp_path / "precious", tmp_path / "file"
    precious.write_text("precious")
    temporary = path.with_name("file.tmp")
    temporary.symlink_to(precious) if kind == "link" else os.mkfifo(temporary)
    with replacing(path) as file:
        file.write(b"new")
    assert (precious.read_text(), path.read_text()) == ("precious", "new")


def test_an_error_is_reported_once_with_a_remedy(tmp_path: Path):
    path = tmp_path / "file"
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path), storage_errors(path, "read"):
        path.read_bytes()
    assert str(caught.value).startswith(f"Cannot read {path}: No such file or directory. Fix that and rerun")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_needed_and_free_space_are_named_only_where_space_is_missing(tmp_path: Path, number: int):
    with pytest.raises(StorageError) as raised, storage_errors(tmp_path / "file", needed_bytes=123_456):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in str(raised.value)
    assert ("123,456 bytes more are needed" in str(raised.value)) == (number == errno.ENOSPC)


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(StorageError, match=r"Cannot write in /proc: "):
        check_writable(Path("/proc"))
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_first_free_name_is_used_to_set_aside(tmp_path: Path):
    """A dangling link takes a name as well."""
    (tmp_path / "run.set-aside-1").symlink_to(tmp_path / "nowhere")
    for number in (2, 3):
        (tmp_path / "run").mkdir()
        assert set_aside(tmp_path / "run") == tmp_path / f"run.set-aside-{number}"


def within_seconds(action: Callable[[], object], error: type[Exception], match: str) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=match):
        action()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_what_is_not_a_file_is_refused_by_name(tmp_path: Path, kind: str):
    path = tmp_path / "file.json"
    {"FIFO": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](path)
    match = f"Cannot open {path}: it is not a regular file"
    within_seconds(lambda: fingerprint(path), StorageError, match)
    within_seconds(lambda: read_json(path), StorageError, match)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[1]",
        b"{",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 400 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_json_made_by_hand_is_refused_by_name(tmp_path: Path, content: bytes):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"Cannot read {path}: "):
        read_json(path)


def test_sound_json_is_read(tmp_path: Path):
    path = tmp_path / "file.json"
    content = {"text": "naïve \U0001f600", "state": 2**128 - 1, "rate": -1.5e-300, "none": None, "list": [True]}
    path.write_text(json.dumps(content))
    assert read_json(path) == content
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "PATIENCE_S", 0.3)
    return tmp_path / "runs" / "held"


def test_a_holder_is_waited_for(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """It may be one whose launcher was killed, which saves before it ends."""
    monkeypatch.setattr(files, "PATIENCE_S", 10.0)
    for wait in (lambda: refuse_claimed(run_dir), lambda: claimed(run_dir).__enter__()):
        holder = claimed(run_dir)
        holder.__enter__()
        threading.Timer(0.5, holder.__exit__, (None, None, None)).start()
        started = time.monotonic()
        wait()
        assert 0.4 < time.monotonic() - started < 5


def test_a_stop_ends_the_wait(run_dir: Path):
    with claimed(run_dir), pytest.raises(StoppedError):
        claimed(run_dir, lambda: True).__enter__()


def test_a_second_run_is_told_who_holds_the_folder(run_dir: Path):
    with claimed(run_dir):
        assert json.loads(claim_file(run_dir).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
        within_seconds(lambda: refuse_claimed(run_dir), BusyError, rf'training in {run_dir}: .*"pid": {os.getpid()},')
        within_seconds(lambda: claimed(run_dir).__enter__(), BusyError, "another process is training in")
    refuse_claimed(run_dir)


def test_a_lock_without_a_name_still_locks(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """A full disk may not hold the name."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "pwrite", full)
    with claimed(run_dir):
        assert claim_file(run_dir).read_bytes() == b""
        within_seconds(lambda: refuse_claimed(run_dir), BusyError, "holder unknown")


def test_a_killed_process_releases_the_folder(run_dir: Path):
    program = (
        "import sys, time; from pathlib import Path; from src.utils.files import claimed\n"
        "with claimed(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(run_dir)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(BusyError, match=f'"pid": {holder.pid}'):
            refuse_claimed(run_dir)
        holder.kill()
    with claimed(run_dir):
        pass


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_a_lock_that_is_not_a_file_is_refused(run_dir: Path, tmp_path: Path, kind: str):
    run_dir.mkdir(parents=True)
    lock, precious = claim_file(run_dir), tmp_path / "precious"
    precious.write_text("precious")
    {"link": lambda path: path.symlink_to(precious), "FIFO": os.mkfifo, "folder": os.mkdir}[kind](lock)
    within_seconds(lambda: claimed(run_dir).__enter__(), StorageError, str(lock))
    within_seconds(lambda: refuse_claimed(run_dir), StorageError, str(lock))
    assert precious.read_text() == "precious"


def test_a_folder_on_a_disk_that_is_not_mounted(run_dir: Path, tmp_path: Path):
    run_dir.parent.mkdir()
    run_dir.symlink_to(tmp_path / "unmounted")
    with pytest.raises(StorageError, match=r"held: it is a link to .*unmounted, which does not exist\. Mount its disk"):
        claimed(run_dir).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file: it is a file, not a folder"):
        refuse_dangling(tmp_path / "file" / "runs" / "new")
