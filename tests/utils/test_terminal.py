"""Lines for people."""

import pty
import sys

import pytest

from src.utils import errors as terminal


def test_lines_of_progress_come_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    progress = terminal.now_and_then(every_seconds=10)
    for now in (101, 109, 110, 111, 119, 125, 134, 135):
        progress(f"at {now}")
    assert capsys.readouterr().err.split("\n") == ["at 110", "at 125", "at 135", ""]


def test_a_result_is_words_on_a_terminal_and_json_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    terminal.print_result({"dataset": "x", "tokens": 3}, "x: 3 tokens")
    assert capsys.readouterr().out == '{"dataset": "x", "tokens": 3}\n'
    main, other = pty.openpty()
    with open(main, "rb", buffering=0) as screen, open(other, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        terminal.print_result({"tokens": 3}, "3 tokens of \x1b[31mx")
        terminal.print_result({"tokens": 3})
        stdout.flush()
        assert screen.read(1_000) == b"3 tokens of \\x1b[31mx\r\n"
