import json
import os
from pathlib import Path

import pytest

from src.utils import files
from src.utils.logger import RunLogger


def test_records_are_lines_of_json_without_nan(tmp_path: Path):
    log = RunLogger(tmp_path, is_main=True)
    log.metric("train", 3, loss=float("nan"), lr=0.5, mfu=None)
    log.metric("sample", 3, text="ünï\ncode")
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert (first["kind"], first["step"], first["loss"], first["lr"], first["mfu"]) == ("train", 3, None, 0.5, None)
    assert second["text"] == "ünï\ncode"
    assert second["time"] >= first["time"] > 1e9


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = RunLogger(tmp_path, is_main=False)
    log.info("words")
    log.metric("train", 1, loss=1.0)
    log.write_json("status.json", {})
    log.forget_after(0)
    log.before_save()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_going_back_forgets_later_records_and_half_a_line(tmp_path: Path):
    log = RunLogger(tmp_path, is_main=True)
    for step in (1, 2, 3):
        log.metric("train", step, loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    log.forget_after(2)
    assert log.recorded() == {("train", 1), ("train", 2)}
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


def test_what_is_kept_is_on_the_disk_before_it_takes_the_place_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A power cut after a rename may otherwise leave an empty file."""
    log = RunLogger(tmp_path, is_main=True)
    log.metric("train", 1, loss=1.0)
    replace, done = os.replace, []

    def replacing(old: Path, new: Path) -> None:
        done.append(f"replace {new.name}")
        replace(old, new)

    monkeypatch.setattr(files, "sync", lambda path: done.append(f"sync {path.name}"))
    monkeypatch.setattr(os, "fsync", lambda _: done.append("sync the file"))
    monkeypatch.setattr(os, "replace", replacing)
    log.forget_after(1)
    assert done == ["sync the file", "replace metrics.jsonl", f"sync {tmp_path.name}"]
    assert log.recorded() == {("train", 1)}


def test_a_log_without_a_line_yet_is_nothing_to_warn_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    RunLogger(tmp_path, is_main=True).before_save()
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("metrics.jsonl", "log.txt", "status.json"):
        (tmp_path / name).mkdir()  # stops the superuser too
    log = RunLogger(tmp_path, is_main=True)
    log.metric("train", 1, loss=1.0)
    log.info("words")
    log.write_json("status.json", {"state": "running"})
    assert capsys.readouterr().err.count("Training continues") == 1


def test_the_training_line_of_a_stop_goes_at_the_resume(tmp_path: Path):
    log = RunLogger(tmp_path, is_main=True)
    log.metric("train", 2, loss=1.0)
    log.metric("train", 3, loss=2.0, stopped=True)
    log.forget_after(3)
    assert [record["step"] for record in log.records()] == [2]
