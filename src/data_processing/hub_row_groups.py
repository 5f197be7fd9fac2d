"""Row groups of the parquet files of a hub listing, one column of them, without fetching the files.

For a sample of a large dataset: the row groups of all files in one shuffled order, each fetched by its byte range.
"""

import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from src.data_processing.file_formats import check_column
from src.data_processing.hub_files import BadAnswerError, HubListing, persist, read_range
from src.utils.rand_idx_seq_gen import permutation
from src.utils.read_ahead import ReadAhead

_AHEAD = 8


def remote_row_groups(listing: HubListing, column: str, seed: int, first: int = 0) -> Iterator[pa.Array]:
    """The texts of every row group of all files, in an order decided by `seed`; the `first` of them are left out.

    The files' footers are fetched before anything else. What has no hash to compare with, a part of a file, is
    believed if it can be decoded. Raises UserError where the hub fails for good or `column` holds no text.
    """

    def footer(number: int, stopping: threading.Event) -> pq.FileMetaData:
        path = listing.files[number].path
        what = f"the footer of {path}"
        found = _decoded(what, listing, stopping, lambda: pq.read_metadata(RemoteFile(listing, number)))
        check_column(found.schema.to_arrow_schema(), column, f"{listing.repository}: {path}")
        return found

    with ReadAhead(footer, 0, len(listing.files), _AHEAD) as ahead:
        footers = list(ahead)
    ends = np.cumsum([found.num_row_groups for found in footers])
    order = permutation(int(ends[-1]), seed)

    def row_group(position: int, stopping: threading.Event) -> pa.Array:
        number = int(np.searchsorted(ends, order[position], side="right"))
        group = int(order[position] - ends[number] + footers[number].num_row_groups)

        def attempt() -> pa.Array:
            # pyarrow takes a column of a row group in one read: one request, of these bytes and no others.
            file = pq.ParquetFile(RemoteFile(listing, number), metadata=footers[number])
            return file.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()

        what = f"row group {group} of {listing.files[number].path}"
        return _decoded(what, listing, stopping, attempt)

    with ReadAhead(row_group, first, len(order), _AHEAD) as ahead:
        yield from ahead


class RemoteFile(io.RawIOBase):
    """File `number` of a listing, as a file to read and seek in. Each read is one attempt at one request."""

    def __init__(self, listing: HubListing, number: int) -> None:
        self._listing = listing
        self._file = listing.files[number]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.bytes}[whence]
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._file.bytes if size < 0 else min(self._position + size, self._file.bytes)
        if end <= self._position:
            return b""
        content = b"".join(read_range(self._listing, self._file, self._position, end))
        self._position = end
        return content


def _decoded(what: str, listing: HubListing, stopping: threading.Event, read: Callable[[], Any]) -> Any:
    """What `read` makes of the hub's bytes, with the patience of `persist` also for bytes that make no sense."""

    def attempt() -> Any:
        try:
            return read()
        except pa.ArrowException as error:
            raise BadAnswerError(f"what came is not sound parquet: {error}") from error

    return persist(what, listing.repository, attempt, stopping=stopping)
