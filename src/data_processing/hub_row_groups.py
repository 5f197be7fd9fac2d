"""Row groups of the parquet files of a hub listing, one column of them, without fetching the files.

For a sample of a large dataset: the row groups of all files in one shuffled order, each fetched by its byte range.
Threads fetch bytes and nothing else, because pyarrow in a thread that is left behind can abort the process.
"""

import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from src.data_processing.file_formats import check_column, one_buffer
from src.data_processing.hub_files import BadAnswerError, HubListing, persist, read_range
from src.utils.errors import UserError
from src.utils.rand_idx_seq_gen import permutation
from src.utils.read_ahead import ReadAhead

_AHEAD = 8
_TAIL_BYTES = 64 << 10  # most footers are shorter


def remote_row_groups(listing: HubListing, column: str, seed: int, first: int = 0) -> Iterator[pa.Array]:
    """The texts of every row group of all files, in an order decided by `seed`; the `first` of them are left out.

    The files' footers are fetched before anything else. What has no hash to compare with, a part of a file, is
    believed if it can be decoded. Raises UserError where the hub fails for good or `column` holds no text.
    """
    footers = _footers(listing, column)
    ends = np.cumsum([found.num_row_groups for found in footers])
    order = permutation(int(ends[-1]), seed)

    def place(position: int) -> tuple[int, int]:
        number = int(np.searchsorted(ends, order[position], side="right"))
        return number, int(order[position] - ends[number] + footers[number].num_row_groups)

    def fetch(position: int, stopping: threading.Event) -> "_Part":
        number, group = place(position)
        row_group = footers[number].row_group(group)
        chunk = next(c for c in map(row_group.column, range(row_group.num_columns)) if c.path_in_schema == column)
        start = chunk.data_page_offset
        if chunk.has_dictionary_page:
            start = min(start, chunk.dictionary_page_offset)
        what = f"row group {group} of {listing.files[number].path}"
        return _fetched(what, listing, number, start, start + chunk.total_compressed_size, stopping)

    with ReadAhead(fetch, first, len(order), _AHEAD) as ahead:
        for position, part in enumerate(ahead, start=first):
            number, group = place(position)

            def decode(part: "_Part", number: int = number, group: int = group) -> pa.Array:
                # Not buffered ahead: that reads in threads of pyarrow's, which abort the process if it exits meanwhile.
                file = pq.ParquetFile(part, metadata=footers[number], pre_buffer=False)
                values = file.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()
                return one_buffer(values)

            yield _decoded(part, listing, decode)


def _footers(listing: HubListing, column: str) -> list[pq.FileMetaData]:
    def fetch(number: int, stopping: threading.Event) -> "_Part":
        size, what = listing.files[number].bytes, f"the footer of {listing.files[number].path}"
        tail = _fetched(what, listing, number, max(0, size - _TAIL_BYTES), size, stopping)
        length = int.from_bytes(tail.content[-8:-4], "little") + 8  # parquet ends in it and its magic number
        if not len(tail.content) < length <= size:
            return tail
        return _fetched(what, listing, number, size - length, size, stopping)

    footers = []
    with ReadAhead(fetch, 0, len(listing.files), _AHEAD) as ahead:
        for file, part in zip(listing.files, ahead, strict=True):
            footers.append(_decoded(part, listing, pq.read_metadata))
            check_column(footers[-1].schema.to_arrow_schema(), column, f"{listing.repository}: {file.path}")
    return footers


class _Part(io.RawIOBase):
    """A file of which only the bytes from `start` on are there, as many as `content` has; raises for any others."""

    def __init__(self, what: str, number: int, start: int, content: bytes, size: int) -> None:
        self.what, self.number, self.start, self.content = what, number, start, content
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        begin = self._position - self.start
        end = len(self.content) if size < 0 else min(begin + size, self._size - self.start)
        if not 0 <= begin <= end <= len(self.content):
            raise BadAnswerError(f"it refers to bytes {self._position} and on, which don't belong to it")
        self._position += end - begin
        return self.content[begin:end]


def _fetched(
    what: str, listing: HubListing, number: int, start: int, end: int, stopping: threading.Event | None = None
) -> _Part:
    file = listing.files[number]
    if not 0 <= start < end <= file.bytes:
        raise UserError(
            f"{what} of {listing.repository} at {listing.revision} would be bytes {start} to {end} of {file.bytes}, "
            "so what the hub sent is damaged; start again, or take whole files, which are verified, without a limit"
        )

    def attempt() -> bytes:
        return b"".join(read_range(listing, file, start, end))

    content = persist(what, listing.repository, attempt, stopping=stopping)
    return _Part(what, number, start, content, file.bytes)


def _decoded(part: _Part, listing: HubListing, decode: Callable[[Any], Any]) -> Any:
    """What `decode` makes of a part, fetched again with the patience of `persist` where the bytes make no sense."""
    fetched: _Part | None = part

    def attempt() -> Any:
        nonlocal fetched
        current, fetched = fetched, None
        if current is None:
            end = part.start + len(part.content)
            current = _fetched(part.what, listing, part.number, part.start, end)
        try:
            return decode(current)
        except pa.ArrowException as error:
            raise BadAnswerError(f"what came is not sound parquet: {error}") from error

    return persist(part.what, listing.repository, attempt)
