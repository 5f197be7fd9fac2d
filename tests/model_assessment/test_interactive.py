"""The interactive mode: what a line does, with continuations made up here."""

import io
from collections.abc import Iterator

import pytest

from src.model_assessment.generation import SamplingConfig
from src.model_assessment.interactive import converse


def talk(lines: str, monkeypatch: pytest.MonkeyPatch, config: SamplingConfig | None = None) -> list[tuple[str, int]]:
    """Prompt and seed of each continuation that the lines ask for; each is " and on"."""
    asked: list[tuple[str, int]] = []

    def pieces(prompt: str, config: SamplingConfig) -> Iterator[str]:
        asked.append((prompt, config.seed))
        yield " and"
        if "break" in prompt:
            raise KeyboardInterrupt
        yield " on"

    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    converse(pieces, config or SamplingConfig())
    return asked


def test_a_line_is_continued_and_nothing_goes_on_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert talk("It was\n\nNew\n", monkeypatch) == [("It was", 0), ("It was and on", 1), ("New", 2)]
    assert capsys.readouterr().out == "It was and on\nIt was and on and on\nNew and on\n"


def test_settings_are_changed_and_mistakes_leave_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = "/seed 7\n/seed many\n/top-p 3\n/nosuch 1\n/stop a\\nb\n/settings\nHi\n/quit\nnever\n"
    assert talk(lines, monkeypatch) == [("Hi", 7)]
    said = capsys.readouterr().err
    for words in (
        "seed 7",
        "/seed takes a number, not 'many'",
        "top_p = 3.0 must be above 0 and at most 1",
        "there is no /nosuch",
        "stop ('a\\nb',)",
        "top_p 1.0",
    ):
        assert words in said


def test_ctrl_c_ends_a_continuation_and_the_next_line_goes_on(monkeypatch: pytest.MonkeyPatch):
    assert talk("break\nthen\n", monkeypatch) == [("break", 0), ("then", 1)]


def test_ctrl_c_where_nothing_is_being_made_ends_all(monkeypatch: pytest.MonkeyPatch):
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converse(lambda prompt, config: iter(()), SamplingConfig())


def test_the_last_seed_is_followed_by_the_first(monkeypatch: pytest.MonkeyPatch):
    last = 2**63 - 1
    assert talk("a\nb\n", monkeypatch, SamplingConfig(seed=last)) == [("a", last), ("b", 0)]


def test_what_a_terminal_would_act_on_is_escaped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    talk("\x1b[31mred\n", monkeypatch)
    assert capsys.readouterr().out == "\\x1b[31mred and on\n"
