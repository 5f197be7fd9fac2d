"""A line that says how far it is, how fast, and how long it will take."""

import io
import re
import time
from collections.abc import Iterator

import pytest

from src.data_processing import progress
from src.data_processing.file_formats import Documents
from src.data_processing.progress import Progress
from src.data_processing.text_sources import Download, Source


class Fetched(Source):
    """A source of which only how far its download is matters."""

    def __init__(self, status: str = "", download: Download | None = None) -> None:
        super().__init__({}, [], 0)
        self._status, self._download = status, download

    def batches(self, unit: int, skip: int) -> Iterator[tuple[Documents, float]]:
        raise AssertionError("nobody reads it")

    def status(self) -> str:
        return self._status

    def download(self) -> Download | None:
        return self._download


def test_lines_while_it_goes_on(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.05)
    with Progress([Fetched(), Fetched("downloaded 1 of 2 files")]) as shown:
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
    shown = Progress([Fetched()])
    shown.begin(0.25, documents=0, tokens=500)
    shown.update(0.5, documents=1, tokens=1_000)
    started = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: started + 100)
    assert re.fullmatch(r"50%, 1 documents, 1,500 tokens, (9|10) tokens/s, about 3 min left", shown.line())


@pytest.mark.parametrize(
    ("share", "download", "left"),
    [
        pytest.param(0.5, Download(600, 2.0, waited_s=0.0), "about 5 min", id="the download is slower"),
        pytest.param(0.5, Download(100, 2.0, waited_s=0.0), "about 2 min", id="tokenising is slower"),
        pytest.param(0.0, Download(120, 2.0, waited_s=100.0), "about 60 s", id="nothing to tokenise yet"),
        pytest.param(0.5, Download(20, 2.0, waited_s=70.0), "about 30 s", id="a wait says nothing of tokenising"),
        pytest.param(0.5, Download(0, 0.0, waited_s=70.0), "about 30 s", id="all is there"),
        pytest.param(0.5, Download(20, 0.0, waited_s=70.0), None, id="nothing comes any more"),
    ],
)
def test_what_is_left_is_of_the_slower_of_download_and_tokenising(
    monkeypatch: pytest.MonkeyPatch, share: float, download: Download, left: str | None
) -> None:
    """After 100 s."""
    shown = Progress([Fetched(download=download), Fetched()])
    shown.update(share, documents=1, tokens=1_000)
    started = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: started + 100)
    assert re.findall(r"about .* left", shown.line()) == ([f"{left} left"] if left else [])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines as a person sees them, where \\r goes back to a line's start and \\x1b[K erases the rest of it."""
        lines = []
        for written in self.getvalue().split("\n"):
            line, at = "", 0
            for piece in re.findall(r"\r|\x1b\[K|[^\r\x1b]+", written):
                if piece == "\r":
                    at = 0
                elif piece == "\x1b[K":
                    line = line[:at]
                else:
                    line, at = line[:at] + piece + line[at + len(piece) :], at + len(piece)
            lines.append(line)
        return lines
