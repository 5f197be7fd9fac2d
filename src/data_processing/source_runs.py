"""Sources -> runs of encoded documents on disk, up to what a request allows, from where an earlier start came to."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data_processing import text_sources
from src.data_processing.document_sort import RUN_DOCUMENTS, RUN_TOKENS, read_states, write_run
from src.data_processing.encoding import EncodedBatch, KeyRange, encode_all
from src.data_processing.file_formats import Documents
from src.data_processing.progress import Progress
from src.data_processing.request import Request
from src.data_processing.text_sources import Source
from src.data_processing.work_folder import DOWNLOADS
from src.utils.errors import UserError


def open_sources(request: Request, pinned: Sequence[dict[str, Any]], work: Path, stack: ExitStack) -> list[Source]:
    """The sources of a request, in order; the hub's files as they were at the time of the details `pinned`, if any.

    Downloads go to `work`. `stack` closes the sources. Raises UserError.
    """
    sources: list[Source] = []
    for name in request.sources:
        if name == "pydocs":
            opened: list[Source] = [text_sources.PythonDocs()]
        elif name == "files":
            opened = [*text_sources.open_files(request.paths, request.text_field)]
        else:
            try:
                from src.data_processing.hub_dataset import open_fineweb_edu, open_hub
            except ImportError as error:  # these packages are for the hub alone
                raise UserError(
                    f"--source fineweb-edu needs a package more ({error}); run: pip install -r requirements.txt"
                ) from None
            open_it = open_hub if name == "hub" else open_fineweb_edu
            opened = open_it(request, [entry for entry in pinned if entry["name"] == name], work / DOWNLOADS)
        for source in opened:
            stack.callback(source.close)
        sources += opened
    return sources


class _Place(NamedTuple):
    """Where the next batch is found, and the share of its unit that lies before it."""

    source: int
    unit: int
    batch: int
    share: float


def encode_sources(
    sources: Sequence[Source], request: Request, work: Path, workers: int, wanted: Sequence[KeyRange] | None = None
) -> None:
    """Encodes the documents into runs in `work`, from where the runs that are there end, up to the request's limits.

    With `wanted`, only documents whose keys are in one of these ranges. Raises what reading and writing raise.
    """
    states = read_states(work)
    start = _Place(*states[-1]["next"]) if states else _Place(0, 0, 0, 0.0)
    count = _Count(request, sum(state["read"] for state in states), sum(state["tokens"] for state in states))
    shares = _Shares(sources)
    ahead = workers + 1 if request.is_limited else 8 * workers  # batches; to keep all busy while a run is written
    run = _Run(work, len(states), start)
    with Progress(sources) as progress:
        progress.begin(max(shares.before(start), count.share), count.documents, count.tokens)
        for place, batch in encode_all(_batches(sources, start), workers, request.seed, ahead, wanted):
            leaves_a_download = place[:2] != run.end[:2] and sources[run.end.source].download_bytes
            if run.is_full or leaves_a_download:
                run.write(complete=False, end=place._replace(batch=place.batch - 1))
                _release(sources, run.end)
            batch = count.add(batch)
            run.add(place, batch)
            progress.update(max(shares.before(place), count.share), batch.documents, batch.tokens.size)
            if count.is_reached:
                break
        run.write(complete=True, end=run.end)


class _Run:
    """Batches that wait to be written as one run."""

    def __init__(self, work: Path, number: int, end: _Place) -> None:
        self._work, self._number = work, number
        self.end = end
        """The place behind the last batch."""
        self._batches: list[tuple[int, EncodedBatch]] = []
        self._tokens = self._documents = 0

    @property
    def is_full(self) -> bool:
        return self._tokens >= RUN_TOKENS or self._documents >= RUN_DOCUMENTS

    def add(self, place: _Place, batch: EncodedBatch) -> None:
        self._batches.append((place.source, batch))
        self._tokens += batch.tokens.size
        self._documents += len(batch.token_counts)
        self.end = place

    def write(self, complete: bool, end: _Place) -> None:
        """Writes what there is, and begins the next run at `end`. Raises StorageError."""
        state = {
            "next": end,
            "complete": complete,
            "tokens": self._tokens,
            "read": sum(batch.documents for _, batch in self._batches),
            "skipped_empty": sum(batch.skipped_empty for _, batch in self._batches),
            "replaced_invalid": sum(batch.replaced_invalid for _, batch in self._batches),
        }
        write_run(self._work, self._number, self._batches, state)
        self._number += 1
        self.end = end
        self._batches, self._tokens, self._documents = [], 0, 0


class _Shares:
    """How much of all sources lies before a place."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._units = [np.array(source.unit_bytes, np.float64) for source in sources]
        self._units_before = [np.cumsum(units) - units for units in self._units]
        totals = [units.sum() for units in self._units]
        self._sources_before = np.cumsum(totals) - totals
        self._total = max(1.0, sum(totals))

    def before(self, place: _Place) -> float:
        unit = self._units_before[place.source][place.unit] + place.share * self._units[place.source][place.unit]
        return float(self._sources_before[place.source] + unit) / self._total


def _release(sources: Sequence[Source], place: _Place) -> None:
    for source in sources[: place.source]:
        source.release(len(source.unit_bytes))
    sources[place.source].release(place.unit)


def _batches(sources: Sequence[Source], start: _Place) -> Iterator[tuple[_Place, Documents]]:
    """All batches from `start` on, each with the place behind it."""
    for number, source in enumerate(sources):
        for unit in range(len(source.unit_bytes)):
            if (number, unit) < start[:2]:
                continue
            skip = start.batch if (number, unit) == start[:2] else 0
            for batch, (documents, share) in enumerate(source.batches(unit, skip), start=skip + 1):
                yield _Place(number, unit, batch, share), documents


class _Count:
    """What was read so far, and how much more the request allows."""

    def __init__(self, request: Request, documents: int, tokens: int) -> None:
        self.documents, self.tokens = documents, tokens
        self.max_documents, self.max_tokens = request.max_documents, request.max_tokens
        self.is_reached = False

    def add(self, batch: EncodedBatch) -> EncodedBatch:
        """The part of `batch` that fits; after it the limit is reached, if there was more."""
        allowed = batch.documents
        if self.max_documents is not None:
            allowed = min(allowed, self.max_documents - self.documents)
        if self.max_tokens is not None:
            ends = np.cumsum(batch.token_counts)
            allowed = min(allowed, int(np.searchsorted(ends, self.max_tokens - self.tokens, side="right")))
        self.is_reached = allowed < batch.documents
        if self.is_reached:
            batch = batch.first(allowed)
        self.documents += batch.documents
        self.tokens += batch.tokens.size
        return batch

    @property
    def share(self) -> float:
        """Of what the request allows."""
        of_documents = self.documents / self.max_documents if self.max_documents else 0.0
        return max(of_documents, self.tokens / self.max_tokens if self.max_tokens else 0.0)
