"""Any parquet dataset of the Hugging Face hub as a source of documents: all of its files, or a random part.

    --source hub --dataset OWNER/NAME [--config NAME] [--split train]        or        --source fineweb-edu

All: files are downloaded in order, the next one while the current one is read. A partial file ends in .partial and is
resumed. It gets its final name once its size and sha256 match the hub's list.
A part (--max-tokens, --max-documents): the row groups of all files in a random order, of each only the text column.

Requests use huggingface_hub's session, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and its time-outs apply, and the token
reaches the hub's host only. Its ready-made calls don't fit: `hf_hub_download` restarts a file after each failure, and
`dataset_info` has no bound on time and size.
"""

import io
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers, validate_repo_id

from src.data_processing.file_formats import Column, Documents, check_column, read_batches
from src.data_processing.hub_layout import choose_files
from src.data_processing.text_sources import Request, Source
from src.utils.errors import CHECK_CONNECTION, StorageError, UserError, hub_reason, say
from src.utils.files import fingerprint, storage_errors, sync
from src.utils.rand_idx_seq_gen import permutation

T = TypeVar("T")

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# The files that the dataset's card gives to this configuration.
_FINEWEB_EDU_CARD = {"configs": [{"config_name": "sample-10BT", "data_files": "sample/10BT/*.parquet"}]}
USUAL_TOKENS = 10_000_000_000  # of the sample, known before the hub answers
USUAL_DOWNLOAD_BYTES = 3 * 2_150_000_000  # the current file, the one before and the one after
_TOKENS_PER_PARQUET_BYTE = 0.35  # of the sample: 10B tokens in 28.5 GB, the other columns included

ATTEMPTS = 5
BASE_DELAY_S = 4.0  # before the second attempt; doubles with each further one
WORTHWHILE_BYTES = 16 << 20  # an attempt that fetched this much resets the count of failures
_LISTING_BYTES, _LISTING_S = 256 << 20, 120.0  # a longer list of files is refused


class BadAnswerError(OSError):
    """The hub's answer differs from the request: too short, another range, or other content."""


@dataclass(frozen=True)
class HubFile:
    """A parquet file at one commit of a repository."""

    repository: str
    revision: str
    path: str
    bytes: int
    sha256: str | None
    """None for a small file that the hub keeps in git."""

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for values that must not reach a path, an address or a comparison."""
        validate_repo_id(self.repository)
        if not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(f"{self.revision!r} is not a commit")
        elsewhere = {"", ".", ".."} & set(self.path.split("/"))
        if elsewhere or not re.fullmatch(r".{1,230}\.parquet", self.path) or not self.path.isprintable():
            raise ValueError(f"{self.path!r} is not the path of a parquet file")
        if type(self.bytes) is not int or not 0 <= self.bytes < 1 << 50:
            raise ValueError(f"{self.bytes!r} is not a size")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"{self.sha256!r} is not a sha256")


def open_hub(request: Request, pinned: Sequence[dict[str, Any]], downloads: Path) -> list[Source]:
    """Open the dataset that `request` names, for downloads into a folder.

    `pinned`: the details that an earlier preparation recorded. They keep its revision and files, and need no network.
    Raises UserError if the hub is out of reach or has no such dataset.
    """
    if not request.dataset:
        raise UserError("Cannot open --source hub: --dataset is missing. Give --dataset OWNER/NAME.")
    details = pinned[0] if pinned else _details(request.dataset, request.config, request.split or "train")
    return _open("hub", details, request, downloads)


def open_fineweb_edu(request: Request, pinned: Sequence[dict[str, Any]], downloads: Path) -> list[Source]:
    """Open FineWeb-Edu's sample of 10B tokens. Arguments and errors: see `open_hub`."""
    details = pinned[0] if pinned else _details(FINEWEB_EDU, "sample-10BT", "train", _FINEWEB_EDU_CARD)
    return _open("fineweb-edu", details, replace(request, text_field="text"), downloads)


class _WholeFiles(Source):
    """All files. A unit is a file."""

    def __init__(self, details: dict[str, Any], files: Sequence[HubFile], text_field: str, downloads: Path) -> None:
        sizes = [file.bytes for file in files]
        super().__init__(details, sizes, int(sum(sizes) * _TOKENS_PER_PARQUET_BYTE))
        self._files, self._text_field, self._folder = files, text_field, downloads / details["revision"]
        self._threads = ThreadPoolExecutor(2, "download")
        self._fetched: dict[int, Future[Path]] = {}
        self._stopping = threading.Event()

    def batches(self, unit: int, skip: int) -> Iterator[tuple[Documents, float]]:
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # A resumed preparation may need the last unit once more, but rarely an earlier one.
            for number in range(unit - 1):
                self._path(number).unlink(missing_ok=True)
        for number in range(unit, min(unit + 2, len(self._files))):
            if number not in self._fetched:
                self._fetched[number] = self._threads.submit(self._fetch, number)
        return read_batches(self._fetched.pop(unit).result(), self._text_field, skip)

    def close(self) -> None:
        self._stopping.set()  # a download ends at its next chunk, or after the client's time-out
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _path(self, number: int) -> Path:
        return self._folder / self._files[number].path.replace("/", "--")

    def _fetch(self, number: int) -> Path:
        """Return the path of a file, complete and verified: an earlier download, the user's HF cache, or a new one."""
        file, path = self._files[number], self._path(number)
        if path.is_file() and path.stat().st_size == file.bytes:
            return path
        with suppress(OSError, ValueError):  # an unreadable cache, or a path that the client refuses
            cached = try_to_load_from_cache(file.repository, file.path, revision=file.revision, repo_type="dataset")
            if isinstance(cached, str) and not _difference(Path(cached), file):
                return Path(cached)
        partial = path.with_name(path.name + ".partial")

        def fetched_bytes() -> int:
            return partial.stat().st_size if partial.is_file() else 0

        _retry(file.path, file.repository, lambda: self._complete(partial, file), self._stopping, fetched_bytes)
        with storage_errors(partial):
            sync(partial)
            partial.rename(path)
            sync(self._folder)
        return path

    def _complete(self, partial: Path, file: HubFile) -> None:
        """Append the missing bytes to a partial file and verify it. One attempt."""
        with storage_errors(partial):
            output = open(partial, "ab", buffering=0)  # noqa: SIM115 (closed below)
        with output:
            for chunk in _read_range(file, output.tell(), file.bytes):
                if self._stopping.is_set():
                    raise BadAnswerError("stopped")
                # Only writes may become storage errors: the hub's errors are OSErrors too, and are retried.
                with storage_errors(partial, needed_bytes=file.bytes - output.tell()):
                    while chunk:
                        chunk = chunk[output.write(chunk) :]
        if difference := _difference(partial, file):
            partial.unlink()
            raise BadAnswerError(difference)


class _RandomPart(Source):
    """The row groups of all files in an order that the seed decides. There is one unit; a batch is a row group."""

    def __init__(self, details: dict[str, Any], files: Sequence[HubFile], text_field: str, seed: int) -> None:
        total = sum(file.bytes for file in files)
        super().__init__(details | {"order": "row groups"}, [total], int(total * _TOKENS_PER_PARQUET_BYTE))
        self._files, self._text_field, self._seed = files, text_field, seed
        self._stopping = threading.Event()

    def batches(self, unit: int, skip: int) -> Iterator[tuple[Documents, float]]:
        with ThreadPoolExecutor(8) as threads:
            try:
                footers = list(threads.map(self._footer, self._files))
            except BaseException:
                self._stopping.set()  # ends the other threads' retries
                raise
        ends = np.cumsum([footer.num_row_groups for footer in footers])
        for position in permutation(int(ends[-1]), self._seed)[skip:]:
            number = int(np.searchsorted(ends, position, side="right"))
            group = int(position - ends[number] + footers[number].num_row_groups)
            yield Column(self._row_group(self._files[number], footers[number], group)), 0.0

    def _footer(self, file: HubFile) -> pq.FileMetaData:
        footer = self._parsed(f"the footer of {file.path}", file, pq.read_metadata)
        check_column(footer.schema.to_arrow_schema(), self._text_field, f"{file.repository}: {file.path}")
        return footer

    def _row_group(self, file: HubFile, footer: pq.FileMetaData, group: int) -> pa.Array:
        def read(remote: _RemoteFile) -> pa.Array:
            # Without pyarrow's buffer ahead and threads: those can abort a process that exits meanwhile.
            parquet = pq.ParquetFile(remote, metadata=footer, pre_buffer=False)
            column = parquet.read_row_group(group, columns=[self._text_field], use_threads=False).column(0)
            return column.cast(pa.large_string()).combine_chunks()

        return self._parsed(f"row group {group} of {file.path}", file, read)

    def _parsed(self, name: str, file: HubFile, read: "Callable[[_RemoteFile], T]") -> T:
        """Retry `read` also if the bytes make no sense: a part of a file has no hash to compare with."""

        def attempt() -> T:
            try:
                return read(_RemoteFile(file))
            except (pa.ArrowException, pa.ArrowInvalid) as error:
                raise BadAnswerError(f"not sound parquet: {error}") from error

        return _retry(name, file.repository, attempt, self._stopping)


class _RemoteFile(io.RawIOBase):
    """A file on the hub. Each read is one Range request: pyarrow reads a footer or the chunk of a column."""

    def __init__(self, file: HubFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._file.bytes)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        start, end = self._position, self._file.bytes
        if size >= 0:
            end = min(end, start + size)
        content = b"".join(_read_range(self._file, start, end))
        self._position += len(content)
        return content


def _open(name: str, details: dict[str, Any], request: Request, downloads: Path) -> list[Source]:
    try:
        files = [HubFile(details["repository"], details["revision"], **file) for file in details["hub_files"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"Cannot use the list of files of {details.get('repository')}: it is damaged: {error}. Delete the "
            "dataset's folder and prepare it again, or check HF_ENDPOINT."
        ) from None
    keys = ("config", "split", "repository", "revision", "hub_files")  # without the counts of an earlier preparation
    details = {"name": name} | {key: details[key] for key in keys if key in details}
    if request.is_limited:
        return [_RandomPart(details, files, request.text_field, request.seed)]
    return [_WholeFiles(details, files, request.text_field, downloads)]


def _details(repository: str, config: str | None, split: str, card: dict[str, Any] | None = None) -> dict[str, Any]:
    """List the files of a config and a split at the newest commit, for the manifest. `card`: in place of the hub's."""
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise UserError(f"Cannot use --dataset {repository!r}: {error} Give OWNER/NAME.") from None

    def ask() -> dict[str, Any]:
        try:
            info = _fetch_info(repository)
            entries = {entry["rfilename"]: entry for entry in info["siblings"]}
            chosen = choose_files(repository, list(entries), card or info.get("cardData") or {}, config, split)
            files = [
                {"path": path, "bytes": entry["size"], "sha256": (entry.get("lfs") or {}).get("sha256")}
                for path, entry in ((path, entries[path]) for path in chosen)
            ]
            names = {"config": config} if card else {"config": config, "split": split}
            return names | {"repository": repository, "revision": info["sha"], "hub_files": files}
        except (UserError, HfHubHTTPError):  # some are ValueErrors too
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadAnswerError(f"not an answer of a hub ({type(error).__name__}: {error})") from error

    advice = f"{CHECK_CONNECTION}; or use local text with --source files --path FOLDER, or --source pydocs"
    return _retry("the list of files", repository, ask, threading.Event(), attempts=3, advice=advice)


def _fetch_info(repository: str) -> dict[str, Any]:
    """Return what the hub knows about a dataset: commit, card, and all files with sizes and hashes."""
    url, body = f"{constants.ENDPOINT}/api/datasets/{repository}?blobs=true", bytearray()
    deadline = time.monotonic() + _LISTING_S
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=build_hf_headers(), timeout=timeout) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _LISTING_BYTES or time.monotonic() > deadline:
                raise BadAnswerError(f"the list has no end after {len(body):,} bytes")
    return json.loads(body)


def _read_range(file: HubFile, start: int, end: int) -> Iterator[bytes]:
    """Yield bytes `start` to `end` of a file. One attempt. Raises BadAnswerError for a body of another length."""
    if start >= end:
        return
    url = f"{constants.ENDPOINT}/datasets/{file.repository}/resolve/{file.revision}/{quote(file.path)}"
    headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        content_range = response.headers.get("Content-Range", "")
        if response.status_code == 206 and not content_range.startswith(f"bytes {start}-{end - 1}/"):
            raise BadAnswerError(f"requested bytes {start} to {end - 1}, received {content_range or 'others'}")
        position = start if response.status_code == 206 else 0  # a server without ranges sends the whole file
        for chunk in response.iter_bytes():
            yield chunk[max(0, start - position) : max(0, end - position)]
            position += len(chunk)
            if position > end:
                return
        if position < end:
            raise BadAnswerError(f"the answer ended after {max(0, position - start)} of {end - start} bytes")


def _difference(path: Path, file: HubFile) -> str:
    """Describe how the content at `path` differs from the hub's list; empty if it doesn't."""
    if (size := path.stat().st_size) != file.bytes:
        return f"received {size} bytes, {file.bytes} are listed"
    if file.sha256 is not None and (sha256 := fingerprint(path)["sha256"]) != file.sha256:
        return f"the content's sha256 is {sha256}, {file.sha256} is listed"
    return ""


def _retry(
    name: str,
    repository: str,
    attempt: Callable[[], T],
    stopping: threading.Event,
    fetched_bytes: Callable[[], int] = lambda: 0,
    attempts: int = ATTEMPTS,
    advice: str = f"{CHECK_CONNECTION}. Rerun to resume",
) -> T:
    """Return what `attempt` returns. Retry transient errors after growing waits, each with a line on stderr.

    An attempt that fetched much doesn't count. Raises UserError, at once if no retry can help.
    """
    failures = 0
    while True:
        bytes_before = fetched_bytes()
        try:
            return attempt()
        except (UserError, StorageError):
            raise
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            if stopping.is_set():
                raise
            failures = 1 if fetched_bytes() - bytes_before >= WORTHWHILE_BYTES else failures + 1
            reason = str(error).splitlines()[0][:200] if isinstance(error, BadAnswerError) else hub_reason(error)
            remedy = _remedy(error, f"{constants.ENDPOINT}/datasets/{repository}")
            if remedy or failures == attempts:
                tried = f" after {failures} attempts" if failures > 1 else ""
                raise UserError(
                    f"Cannot get {name} of {repository} from {constants.ENDPOINT}{tried}: {reason}. {remedy or advice}."
                ) from error
            delay_s = BASE_DELAY_S * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
            limits = parse_ratelimit_headers(error.response.headers) if isinstance(error, HfHubHTTPError) else None
            if limits and not limits.remaining:
                delay_s = max(delay_s, min(300, limits.reset_in_seconds))  # 300 s: the hub's longest window
            say(f"Attempt {failures + 1} of {attempts} for {name} in {delay_s:.0f} s: {reason}")
            if stopping.wait(delay_s):
                raise


def _remedy(error: Exception, page: str) -> str | None:
    """Return the remedy for an error that no retry can help; None for transient errors."""
    if isinstance(error, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE, which forbids the request"
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
        return "Set HF_ENDPOINT to an address such as https://huggingface.co"
    if not isinstance(error, HfHubHTTPError) or error.response.history:
        return None  # after a redirect the storage refused: the hub signs a new address for each attempt
    if isinstance(error, GatedRepoError):
        return f"Accept the dataset's conditions on {page}, then set HF_TOKEN or run: hf auth login"
    if error.response.status_code in (401, 403):
        return f"Check that {page} exists, and the token in HF_TOKEN or of: hf auth login"
    if 400 <= error.response.status_code < 500 and error.response.status_code not in (408, 425, 429):
        return f"Look at {page}: it does not exist, or no longer"
    return None
