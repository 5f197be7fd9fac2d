"""A line that says how far it is, how fast, and how long it will take."""

import re
import time

import pytest

from src.data_processing import progress
from src.data_processing.progress import Progress


def test_lines_while_it_goes_on(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.05)
    with Progress(lambda: "downloaded 1 of 2 files") as shown:
        shown.begin(0.25, documents=10, tokens=1_000)
        shown.update(0.5, documents=5, tokens=2_000)
        time.sleep(0.3)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert re.fullmatch(r"50%, 15 documents, 3,000 tokens, [\d,]+ tokens/s, downloaded 1 of 2 files", lines[0]), lines[
        0
    ]


def test_what_is_left_counts_from_where_this_start_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the whole in 100 s; half of it is left."""
    shown = Progress(lambda: "")
    shown.begin(0.25, documents=0, tokens=500)
    shown.update(0.5, documents=1, tokens=1_000)
    started = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: started + 100)
    assert re.fullmatch(r"50%, 1 documents, 1,500 tokens, (9|10) tokens/s, about 3 min left", shown.line())
