"""Runs end where a downloaded file does, so that it can go."""

from collections.abc import Iterator
from pathlib import Path

from src.data_processing.document_sort import read_states
from src.data_processing.file_formats import Texts
from src.data_processing.source_runs import encode_sources
from src.data_processing.text_sources import Source
from tests.data_processing.documents import request, some_texts


class Batches(Source):
    """Units of two batches each."""

    def __init__(self, units: int, download_bytes: int = 0) -> None:
        super().__init__({"name": "batches"}, [1] * units, 0)
        self.download_bytes = download_bytes
        self.released = 0

    def batches(self, unit: int, skip: int) -> Iterator[tuple[Texts, float]]:
        for batch in range(skip, 2):
            yield Texts(some_texts(5, seed=10 * unit + batch)), (batch + 1) / 2

    def release(self, unit: int) -> None:
        self.released = max(self.released, unit)


def test_a_download_is_released_once_another_file_is_reached(tmp_path: Path) -> None:
    hub, files = Batches(2, download_bytes=1), Batches(3)
    encode_sources([hub, files], request(tmp_path), tmp_path, 1)
    assert [state["next"][:2] for state in read_states(tmp_path)] == [[0, 1], [1, 0], [1, 2]]
    assert hub.released == 2


def test_a_source_of_one_download_is_released_before_the_next_source(tmp_path: Path) -> None:
    hub, files = Batches(1, download_bytes=1), Batches(1)
    encode_sources([hub, files], request(tmp_path), tmp_path, 1)
    assert [state["next"][:3] for state in read_states(tmp_path)] == [[1, 0, 0], [1, 0, 2]]
    assert [state["read"] for state in read_states(tmp_path)] == [10, 10]
    assert hub.released == 1
