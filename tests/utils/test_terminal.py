"""Lines for people."""

import pytest

from src.utils import errors as terminal


def test_lines_of_progress_come_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    progress = terminal.now_and_then(every_seconds=10)
    for now in (101, 109, 110, 111, 119, 125, 134, 135):
        progress(f"at {now}")
    assert capsys.readouterr().err.split("\n") == ["at 110", "at 125", "at 135", ""]
