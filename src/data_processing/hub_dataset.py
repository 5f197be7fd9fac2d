"""Any parquet dataset of the Hugging Face hub as a source of documents: all of its files, or a random part.

    --source hub --dataset OWNER/NAME [--config NAME] [--split train]        or        --source fineweb-edu

All: one file after the other is downloaded and read. A partial file ends in .partial and is resumed. It gets its final
name once its size and sha256 match the hub's list.
A part (--max-tokens, --max-documents): row groups of all files, in random order, are read, and only their text column.
Config and split: the patterns in the dataset card's YAML decide. Without them, the files are SPLIT.parquet,
SPLIT-*.parquet or SPLIT/*.parquet in the config's folder (without a config: at the top), or in `data` below it.

Requests use huggingface_hub's session, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and its time-outs apply, and only the
hub's host receives the token. Its ready-made calls don't fit: `hf_hub_download` restarts a file after each failure, and
`dataset_info` limits neither time nor size.
"""

import io
import json
import os
import posixpath
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
import pyarrow.parquet as pq
from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers, validate_repo_id

from src.data_processing.text_sources import Request, Source, check_column, column_texts, read_texts
from src.utils.errors import StorageError, UserError, hub_errors, hub_failure, hub_reason, say
from src.utils.files import fingerprint, free_bytes, open_regular, size_text, storage_errors, sync
from src.utils.rand_idx_seq_gen import permutation

T = TypeVar("T")

# The files that the dataset's card gives to this configuration.
_FINEWEB_EDU_CARD = {"configs": [{"config_name": "sample-10BT", "data_files": "sample/10BT/*.parquet"}]}

ATTEMPTS = 5
BASE_DELAY_S = 4.0  # before the second attempt; doubles with each attempt
_LISTING_BYTES, _LISTING_S = 256 << 20, 120.0  # a larger or slower list of files is refused


@dataclass(frozen=True)
class HubFile:
    """A parquet file at one commit of a repository."""

    repository: str
    revision: str
    path: str
    bytes: int
    sha256: str | None
    """None for a small file that the hub keeps in git."""

    @property
    def local_name(self) -> str:
        return self.path.replace("/", "--")

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for values that must not reach a path, an address or a comparison."""
        validate_repo_id(self.repository)
        elsewhere = {"", ".", ".."} & set(self.path.split("/"))
        if not (
            re.fullmatch("[0-9a-f]{40}", self.revision)
            and (self.path.endswith(".parquet") and self.path.isprintable() and not elsewhere)
            and len(self.local_name.encode()) < 240  # .partial is appended to it
            and (type(self.bytes) is int and 0 <= self.bytes < 1 << 50)
            and (self.sha256 is None or re.fullmatch("[0-9a-f]{64}", self.sha256))
        ):
            raise ValueError(f"{self} is impossible")


def open_hub(name: str, request: Request, pinned: Sequence[dict[str, Any]], downloads: Path) -> list[Source]:
    """Open the dataset that `request` describes as the source `name`. Downloads go to the folder `downloads`.

    `pinned`: the details that an earlier preparation recorded. They fix its revision and files, without a network.
    Raises UserError if the hub cannot be reached or has no such dataset.
    """
    if name == "fineweb-edu":
        request = replace(request, dataset="HuggingFaceFW/fineweb-edu", config="sample-10BT", split="train")
        request = replace(request, text_field="text")
    try:
        details = pinned[0] if pinned else _details(name, request)
        files = [HubFile(details["repository"], details["revision"], **file) for file in details["hub_files"]]
        if len({file.local_name for file in files}) < len(files):
            raise ValueError("two of its files would have one name here")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"Cannot use the list of files of {request.dataset}: {type(error).__name__}: {str(error)[:300]}. Check "
            "the name and HF_ENDPOINT, or delete the dataset's folder and prepare it again."
        ) from None
    keys = ("config", "split", "repository", "revision", "hub_files")  # not the counts of an earlier preparation
    details = {"name": name} | {key: details[key] for key in keys if key in details}
    if request.is_limited:
        return [_RandomPart(details, files, request.text_field, request.seed)]
    return [_WholeFiles(details, files, request.text_field, downloads)]


class _WholeFiles(Source):
    """All files. A unit is a file."""

    def __init__(self, details: dict[str, Any], files: Sequence[HubFile], text_field: str, downloads: Path) -> None:
        super().__init__(details, [file.path for file in files])
        self._files, self._text_field, self._folder = files, text_field, downloads / details["revision"]

    def texts(self, unit: int) -> Iterator[str]:
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if unit > 1:  # a resumed preparation may need the last unit again, but rarely an earlier one
                (self._folder / self._files[unit - 2].local_name).unlink(missing_ok=True)
        file, path = self._files[unit], self._folder / self._files[unit].local_name
        if not path.is_file() or path.stat().st_size != file.bytes:
            _retry(file.path, file.repository, lambda: _download(file, path))
        return read_texts(path, self._text_field)


class _RandomPart(Source):
    """The row groups of all files, in an order determined by the seed. A unit is a row group."""

    def __init__(self, details: dict[str, Any], files: Sequence[HubFile], text_field: str, seed: int) -> None:
        self._text_field = text_field
        with ThreadPoolExecutor(8) as threads:
            opened = zip(files, threads.map(self._open, files), strict=True)
        groups = [(file, parquet, n) for file, parquet in opened for n in range(parquet.num_row_groups)]
        self._groups = [groups[position] for position in permutation(len(groups), seed)]
        super().__init__(details | {"order": "row groups"}, [file.path for file, _, _ in self._groups])

    def texts(self, unit: int) -> Iterator[str]:
        file, parquet, number = self._groups[unit]
        # No threads and, below, no pre-buffering: either can abort a process that exits during a read.
        read = partial(parquet.read_row_group, number, columns=[self._text_field], use_threads=False)
        table = _retry(f"row group {number} of {file.path}", file.repository, read)
        return iter(column_texts(table.column(0)))

    def _open(self, file: HubFile) -> pq.ParquetFile:
        name = f"the footer of {file.path}"
        parquet = _retry(name, file.repository, lambda: pq.ParquetFile(_RemoteFile(file), pre_buffer=False))
        check_column(parquet.schema_arrow, self._text_field, f"{file.repository}: {file.path}")
        return parquet


class _RemoteFile(io.RawIOBase):
    """A file on the hub. Each read is one Range request: pyarrow reads a footer or a column chunk."""

    def __init__(self, file: HubFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._file.bytes)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._file.bytes if size < 0 else min(self._file.bytes, self._position + size)
        content = b"".join(_read_range(self._file, self._position, end))
        self._position += len(content)
        return content


def _details(name: str, request: Request) -> dict[str, Any]:
    """List the requested files at the newest commit. Raises ValueError and others for a malformed answer."""
    repository, config, split = str(request.dataset), request.config, request.split or "train"
    validate_repo_id(repository)
    info = _retry("the list of files", repository, lambda: _fetch_info(repository), attempts=3)
    entries = {entry["rfilename"]: entry for entry in info["siblings"]}
    card = _FINEWEB_EDU_CARD if name == "fineweb-edu" else info.get("cardData") or {}
    files = [
        {"path": path, "bytes": entries[path]["size"], "sha256": (entries[path].get("lfs") or {}).get("sha256")}
        for path in choose_files(repository, list(entries), card, config, split)
    ]
    names = {"config": config} if name == "fineweb-edu" else {"config": config, "split": split}
    return names | {"repository": repository, "revision": info["sha"], "hub_files": files}


def choose_files(
    repository: str, paths: Sequence[str], card: dict[str, Any], config: str | None, split: str
) -> list[str]:
    """Return the `paths` that hold `split` of `config`, sorted. `card`: the YAML of the dataset's card.

    Raises UserError that lists what exists, and KeyError, TypeError or AttributeError for a damaged card.
    """
    entries = {str(entry["config_name"]): entry for entry in card.get("configs") or []}
    if entries and config is None:
        default = [name for name, entry in entries.items() if entry.get("default") is True or name == "default"]
        config = next(iter(default or entries)) if default or len(entries) == 1 else None
    # Without configurations in the card, a config is the folder of that name.
    entry = entries.get(str(config)) if entries else {"data_dir": config}
    if entry is None:
        raise UserError(f"Cannot choose files of {repository}: which config? Give --config, one of: {_some(entries)}.")
    if data_files := entry.get("data_files"):
        items = [item if isinstance(item, dict) else {"split": "train", "path": item} for item in _as_list(data_files)]
        names = [name for item in items if item["split"] == split for name in _as_list(item["path"])]
    else:
        names = [f"{folder}{split}{end}.parquet" for folder in ("", "data/") for end in ("", "-*", "/*")]
    patterns = [posixpath.normpath(f"{entry.get('data_dir') or '.'}/{name}") for name in names]
    parquet = {path for path in paths if path.endswith(".parquet")}
    chosen = sorted(path for path in parquet if any(_matches(path, pattern) for pattern in patterns))
    if not chosen:
        raise UserError(
            f"Cannot choose files of {repository}: no parquet file belongs to split {split!r} of config {config!r}; it "
            f"holds {_some(paths)}. Give --config and --split, or download its files and use --source files."
        )
    return chosen


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else value


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def _matches(path: str, pattern: str) -> bool:
    """True if the path matches the pattern. `*` matches within one name, except in a pattern with `**`."""
    is_depth_right = "**" in pattern or path.count("/") == pattern.count("/")
    return is_depth_right and fnmatchcase(path, pattern.replace("**/", "*"))


def _fetch_info(repository: str) -> dict[str, Any]:
    """Fetch the hub's data about a dataset: commit, card, and all files with sizes and hashes."""
    body, deadline = bytearray(), time.monotonic() + _LISTING_S
    with _stream(f"api/datasets/{repository}?blobs=true") as response:
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _LISTING_BYTES or time.monotonic() > deadline:
                raise OSError(f"the list has no end after {len(body):,} bytes")
    return json.loads(body)


def _download(file: HubFile, path: Path) -> None:
    """Append the missing bytes to the partial file, verify it and give it its final name. One attempt."""
    partial = path.with_name(path.name + ".partial")
    with storage_errors(partial):
        output = open_regular(partial, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
        output.seek(0, os.SEEK_END)
    with output:
        if (missing := file.bytes - output.tell()) > free_bytes(path):
            raise StorageError(
                f"Cannot download {file.path}: {size_text(missing)} of disk needed, {size_text(free_bytes(path))} free "
                f"at {path.parent}. Make room, or use another disk with --out or TEMP_DATA_DIR."
            )
        for chunk in _read_range(file, output.tell(), file.bytes):
            # Only writes may become storage errors: the hub's errors are OSErrors too, and are retried.
            with storage_errors(partial, needed_bytes=file.bytes - output.tell()):
                while chunk:
                    chunk = chunk[output.write(chunk) :]
    content = fingerprint(partial)
    if content != {"bytes": file.bytes, "sha256": file.sha256 or content["sha256"]}:
        partial.unlink()
        raise OSError(f"the content differs from the hub's list: received {content}")
    with storage_errors(partial):
        sync(partial)
        partial.rename(path)
        sync(path.parent)


def _read_range(file: HubFile, start: int, end: int) -> Iterator[bytes]:
    """Yield bytes `start` to `end` of a file. One attempt. Raises OSError for a body of the wrong length."""
    if start >= end:
        return
    path = f"datasets/{file.repository}/resolve/{file.revision}/{quote(file.path)}"
    with _stream(path, {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}) as response:
        content_range = response.headers.get("Content-Range", "")
        position = start if content_range else 0  # a server without ranges sends the whole file
        if content_range and not content_range.startswith(f"bytes {start}-{end - 1}/"):
            raise OSError(f"requested bytes {start} to {end - 1}, received {content_range}")
        for chunk in response.iter_bytes():
            yield chunk[max(0, start - position) : max(0, end - position)]
            position += len(chunk)
            if position >= end:
                return
        raise OSError(f"the answer ended after {max(0, position - start)} of {end - start} bytes")


@contextmanager
def _stream(path: str, headers: dict[str, str] | None = None) -> Iterator[httpx2.Response]:
    """Request `path` of the hub. Raises HfHubHTTPError if it refuses."""
    url, timeout = f"{constants.ENDPOINT}/{path}", constants.HF_HUB_DOWNLOAD_TIMEOUT
    # build_hf_headers would first fetch a list of agents from the hub, without a bound on its size.
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = (headers or {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        try:
            hf_raise_for_status(response)
        except UnicodeDecodeError as error:  # an error page in another encoding
            raise HfHubHTTPError(f"HTTP {response.status_code}", response=response) from error
        yield response


def _retry(name: str, repository: str, attempt: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """Return the result of `attempt`. After an error, retry with growing delays and a line on stderr.

    Raises UserError after the last attempt, and at once if the hub refuses.
    """
    number = 1
    while True:
        try:
            return attempt()
        except (UserError, StorageError):
            raise
        except hub_errors() as error:
            answer = error.response if isinstance(error, HfHubHTTPError) else None
            # After a redirect it is the storage that refused. The hub signs a new address for each attempt.
            is_refusal = answer and not answer.history and answer.status_code in (400, 401, 403, 404, 410, 451)
            is_hopeless = isinstance(error, OfflineModeIsEnabled | httpx2.UnsupportedProtocol | httpx2.InvalidURL)
            if number == attempts or is_refusal or is_hopeless:
                page = f"{constants.ENDPOINT}/datasets/{repository}"
                remedy = f"Check {page}, accept its conditions if it has any, set HF_TOKEN, and rerun to resume"
                raise hub_failure(f"get {name} of {repository} from", error, remedy) from error
            delay_s = BASE_DELAY_S * 2 ** (number - 1) * random.uniform(0.75, 1.25)
            limits = parse_ratelimit_headers(answer.headers) if answer else None
            if limits and not limits.remaining:
                delay_s = max(delay_s, min(300, limits.reset_in_seconds))  # 300 s: the hub's longest window
            number += 1
            say(f"Attempt {number} of {attempts} for {name} in {delay_s:.0f} s: {hub_reason(error)}")
            time.sleep(delay_s)
