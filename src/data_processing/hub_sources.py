"""FineWeb-Edu's sample of 10B tokens from the Hugging Face hub: all of it, or a part that is drawn at random."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.data_processing.file_formats import Column, Documents, read_batches
from src.data_processing.hub_downloads import Downloads
from src.data_processing.hub_files import HubListing, list_files
from src.data_processing.hub_row_groups import remote_row_groups
from src.data_processing.text_sources import Download, Source
from src.data_processing.work_folder import DOWNLOADS
from src.utils.errors import UserError
from src.utils.files import size_text

REPOSITORY = "HuggingFaceFW/fineweb-edu"
# The dataset's card gives this folder to its configuration sample-10BT.
CONFIG, FOLDER = "sample-10BT", "sample/10BT"
_TEXT_COLUMN = "text"
_PARALLEL_DOWNLOADS = 4
# 10B tokens in 28.5 GB of parquet, the other columns included.
_TOKENS_PER_PARQUET_BYTE = 0.35
# What is known of the sample before the hub is asked.
USUAL_TOKENS = 10_000_000_000
USUAL_DOWNLOAD_BYTES = _PARALLEL_DOWNLOADS * 2_150_000_000


def whole_sample(pinned: dict[str, Any] | None, work: Path) -> Source:
    """All files, downloaded into `work` a few at a time.

    The sample as it is now, or as the details `pinned` of an earlier time have it. Raises UserError where the hub
    cannot be reached.
    """
    return _WholeFiles(_listing(pinned), work)


def random_part(pinned: dict[str, Any] | None, seed: int) -> Source:
    """The row groups of all files in an order that the seed decides, each fetched when it is needed.

    So a small part costs little and is of every crawl. `pinned` and what is raised: as for `whole_sample`.
    """
    return _RowGroups(_listing(pinned), seed)


def _listing(pinned: dict[str, Any] | None) -> HubListing:
    if pinned is not None:
        try:
            return HubListing.from_dict({**pinned, "files": pinned["hub_files"]})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the list of files that this dataset was begun or made with is damaged ({error}); delete its folder, "
                "and prepare it again"
            ) from None
    try:
        return list_files(REPOSITORY, FOLDER, revision=None)
    except UserError as error:
        raise UserError(
            f"{error}; or use text of your own with --source files --path FILE_OR_FOLDER, or the documentation on "
            "this machine with --source pydocs"
        ) from error


class _WholeFiles(Source):
    """A unit is a parquet file."""

    estimate_is_sure = True

    def __init__(self, listing: HubListing, work: Path) -> None:
        sizes = [file.bytes for file in listing.files]
        super().__init__(_details(listing), sizes, int(sum(sizes) * _TOKENS_PER_PARQUET_BYTE))
        self.download_bytes = sum(sorted(sizes)[-_PARALLEL_DOWNLOADS:])
        self._listing, self._work = listing, work
        self._stack = ExitStack()
        self._downloads: Downloads | None = None
        self._released = 0

    def batches(self, unit: int, skip: int) -> Iterator[tuple[Documents, float]]:
        if self._downloads is None:
            downloads = Downloads(self._listing, self._work / DOWNLOADS, first=unit, parallel=_PARALLEL_DOWNLOADS)
            self._downloads, self._released = self._stack.enter_context(downloads), unit
        return read_batches(self._downloads.path(unit), _TEXT_COLUMN, skip)

    def release(self, unit: int) -> None:
        if self._downloads is None:  # an earlier start had come past this source
            return
        for number in range(self._released, unit):
            self._downloads.done_with(number)
        self._released = max(self._released, unit)

    def status(self) -> str:
        if self._downloads is None:
            return ""
        now = self._downloads.progress()
        return (
            f"downloaded {now.files_there} of {len(self.unit_bytes)} files, {size_text(now.bytes_there)} of "
            f"{size_text(now.bytes_total)} ({size_text(now.bytes_per_s)}/s)"
        )

    def download(self) -> Download | None:
        if self._downloads is None:
            return None
        now = self._downloads.progress()
        return Download(now.bytes_total - now.bytes_there, now.bytes_per_s, now.waited_s)

    def close(self) -> None:
        self._stack.close()


class _RowGroups(Source):
    """One unit; a batch is a row group."""

    def __init__(self, listing: HubListing, seed: int) -> None:
        total = sum(file.bytes for file in listing.files)
        super().__init__(_details(listing) | {"order": "row groups"}, [total], int(total * _TOKENS_PER_PARQUET_BYTE))
        self._listing, self._seed = listing, seed

    def batches(self, unit: int, skip: int) -> Iterator[tuple[Documents, float]]:
        for values in remote_row_groups(self._listing, _TEXT_COLUMN, self._seed, first=skip):
            yield Column(values), 0.0


def _details(listing: HubListing) -> dict[str, Any]:
    content = asdict(listing)
    return {
        "name": "fineweb-edu",
        "config": CONFIG,
        "repository": content["repository"],
        "revision": content["revision"],
        "hub_files": list(content["files"]),
    }
