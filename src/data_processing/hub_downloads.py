"""The files of a hub listing on this disk, whole and verified, a few at a time.

A file grows under a name that ends in .partial, at which a later start goes on. It gets its own name once its
size and sha256 agree, so a file with its own name is never verified again. A file that the user's Hugging Face
cache holds is verified and used where it lies.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from huggingface_hub import try_to_load_from_cache

from src.data_processing.hub_files import BadAnswerError, HubFile, HubListing, persist, read_range
from src.utils.files import fingerprint, storage_errors, sync
from src.utils.read_ahead import ReadAhead

_SPEED_WINDOW_S = 60.0  # smooths out the ends of files and short stalls


@dataclass(frozen=True)
class Progress:
    """How far all files of a listing are, those of earlier starts included."""

    bytes_there: int
    bytes_total: int
    files_there: int
    bytes_per_s: float
    """Over the last minute in which anything was being fetched, so not less where the caller is what takes time."""
    waited_s: float
    """How long the caller has waited for files."""


class Downloads:
    """Fetches the files of `listing` from number `first` on into `folder`, inside a `with` block.

    At most `parallel` files are being fetched or waiting for `done_with`. One process at a time may do so in a folder.
    """

    def __init__(self, listing: HubListing, folder: Path, first: int = 0, parallel: int = 4) -> None:
        self._listing = listing
        self._first = first
        self._folder = folder / listing.revision
        self._ahead = ReadAhead(self._fetch, first, len(listing.files), parallel)
        # Of each file; a thread changes the entries of its own file only.
        self._bytes_there = [file.bytes if n < first else self._on_disk(n) for n, file in enumerate(listing.files)]
        self._finished = [n < first for n in range(len(listing.files))]
        self._fetching, self._waiting = _Stopwatch(), _Stopwatch()
        self._fetched = [0] * len(listing.files)  # bytes that came over the network, of each file
        self._measured = deque([(0.0, 0)])
        """Seconds in which anything was being fetched and bytes that had come by then, each time it was asked for."""

    def __enter__(self) -> "Downloads":
        """Raises StorageError."""
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        for number in range(self._first):  # left by a start that was killed before it could delete them
            self._delete(number)
        self._ahead.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ahead.__exit__(kind, error, traceback)

    def path(self, number: int) -> Path:
        """Where file `number` lies, once it does, whole and verified. Raises UserError and StorageError.

        A caller asks for files in order. Asking for more than `parallel` before it is done with any takes their disk.
        """
        with self._waiting.running():
            return self._ahead.result(number)

    def done_with(self, number: int) -> None:
        """Deletes file `number`, unless it lies in the user's own cache, and lets the next download start.

        Raises StorageError.
        """
        self._delete(number)
        self._ahead.release(number)

    def progress(self) -> Progress:
        total = sum(file.bytes for file in self._listing.files)
        there, files = sum(self._bytes_there), sum(self._finished)
        return Progress(there, total, files, self._bytes_per_s(), self._waiting.seconds())

    def _bytes_per_s(self) -> float:
        seconds, fetched = self._fetching.seconds(), sum(self._fetched)
        self._measured.append((seconds, fetched))
        while len(self._measured) > 2 and self._measured[1][0] <= seconds - _SPEED_WINDOW_S:
            self._measured.popleft()
        then, before = self._measured[0]
        return (fetched - before) / max(seconds - then, 1e-9)

    def _target(self, number: int) -> Path:
        return self._folder / self._listing.files[number].path.replace("/", "--")

    def _partial(self, number: int) -> Path:
        return self._target(number).with_name(self._target(number).name + ".partial")

    def _delete(self, number: int) -> None:
        for path in (self._target(number), self._partial(number)):
            with storage_errors(path, "delete"):
                path.unlink(missing_ok=True)

    def _on_disk(self, number: int) -> int:
        paths = (self._target(number), self._partial(number))
        return next((path.stat().st_size for path in paths if path.is_file()), 0)

    def _fetch(self, number: int, stopping: threading.Event) -> Path:
        file, path = self._listing.files[number], self._target(number)
        if not path.is_file() or path.stat().st_size != file.bytes:
            path = self._in_user_cache(file) or self._download(number, stopping)
        self._bytes_there[number] = file.bytes
        self._finished[number] = True
        return path

    def _in_user_cache(self, file: HubFile) -> Path | None:
        listing = self._listing
        found = try_to_load_from_cache(listing.repository, file.path, revision=listing.revision, repo_type="dataset")
        try:
            return Path(found) if isinstance(found, str) and _difference(Path(found), file) is None else None
        except OSError:  # it cannot be read
            return None

    def _download(self, number: int, stopping: threading.Event) -> Path:
        partial = self._partial(number)
        with self._fetching.running():
            persist(
                self._listing.files[number].path,
                self._listing.repository,
                lambda: self._attempt(number, stopping),
                stopping=stopping,
                bytes_there=lambda: self._bytes_there[number],
            )
        with storage_errors(partial):
            sync(partial)
            target = partial.rename(self._target(number))
            sync(self._folder)
        return target

    def _attempt(self, number: int, stopping: threading.Event) -> None:
        """Makes the partial file of `number` whole, from where it is; raises BadAnswerError where it is wrong then."""
        file, partial = self._listing.files[number], self._partial(number)
        if not partial.is_file() or partial.stat().st_size < file.bytes:
            self._append(number, stopping)
        if difference := _difference(partial, file):
            partial.unlink()
            self._bytes_there[number] = 0
            raise BadAnswerError(difference)

    def _append(self, number: int, stopping: threading.Event) -> None:
        file, partial = self._listing.files[number], self._partial(number)
        with storage_errors(partial):
            output = open(partial, "ab", buffering=0)  # noqa: SIM115 (closed below)
        with output:
            self._bytes_there[number] = there = output.tell()
            for chunk in read_range(self._listing, file, there, file.bytes):
                if stopping.is_set():
                    raise BadAnswerError("stopped")
                rest = memoryview(chunk)
                with storage_errors(partial, needed_bytes=file.bytes - self._bytes_there[number]):
                    while rest:
                        rest = rest[output.write(rest) :]
                self._bytes_there[number] += len(chunk)
                self._fetched[number] += len(chunk)


class _Stopwatch:
    """Seconds in which one thread or more did a thing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._before, self._since = 0.0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def seconds(self) -> float:
        with self._lock:
            return self._before + (time.monotonic() - self._since if self._running else 0.0)

    def _change(self, by: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._running:
                self._before += now - self._since
            self._running += by
            self._since = now


def _difference(path: Path, file: HubFile) -> str | None:
    """How the content at `path` differs from what the listing promises, or None."""
    if (size := path.stat().st_size) != file.bytes:
        return f"{size} bytes came, {file.bytes} are listed"
    if file.sha256 is not None and (found := fingerprint(path)["sha256"]) != file.sha256:
        return f"the content's sha256 is {found}, {file.sha256} is listed"
    return None
