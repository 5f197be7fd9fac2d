"""Which files a dataset on the Hugging Face hub has, and their bytes, fetched with patience.

Requests go through huggingface_hub's own session, so that HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the
time-outs mean what they mean elsewhere. Its ready-made calls would not do: `hf_hub_download` (2.4.0) begins a file
anew after every failure or kill and leaves the part behind, and `list_repo_tree` waits for ever on a server
that is silent.
"""

import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

from src.utils.errors import StorageError, UserError, say
from src.utils.hub_errors import CHECK_CONNECTION, reason

T = TypeVar("T")

ATTEMPTS = 5
BASE_DELAY_S = 4.0  # before the second attempt; doubled before each further one
_LISTING_ATTEMPTS = 3  # nothing has been fetched yet, so an unreachable hub may be said sooner
_LONGEST_DELAY_S = 300.0  # the window of the hub's rate limits
# An attempt that brought this much was no failure of the connection: the count begins anew.
WORTHWHILE_BYTES = 16 << 20
_RETRIED_STATUS = (408, 425, 429)  # and all from 500


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    path: str
    bytes: int
    sha256: str | None
    """None for a small file that the hub keeps in git."""


@dataclass(frozen=True)
class HubListing:
    """The parquet files of one folder of a dataset at one commit; `dataclasses.asdict` makes it plain data."""

    repository: str
    revision: str
    """The commit's full hash."""
    files: tuple[HubFile, ...]
    """Sorted by path."""

    def __post_init__(self) -> None:
        """Raises ValueError for a name that must not become a part of the paths that downloads have."""
        if not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(f"{self.revision!r} is no commit")
        for file in self.files:
            if not file.path.endswith(".parquet") or not file.path.isprintable():
                raise ValueError(f"{file.path!r} is not the path of a parquet file")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "HubListing":
        """Raises ValueError, KeyError or TypeError for what `asdict` never makes."""
        files = tuple(HubFile(**file) for file in content["files"])
        return cls(content["repository"], content["revision"], files)


class BadAnswerError(OSError):
    """The hub sent something else than was asked for: too little, another part, or other content."""


def list_files(repository: str, folder: str, revision: str | None) -> HubListing:
    """The parquet files in `folder` (not below it) at `revision`, a branch, tag or commit; None: the newest.

    Raises UserError where the hub cannot be reached or does not have them.
    """
    address = f"{constants.ENDPOINT}/api/datasets/{repository}"

    def ask() -> HubListing:
        try:
            content, _ = _get_json(f"{address}/revision/{quote(revision, safe='')}" if revision else address)
            commit = content["sha"]
            if not re.fullmatch("[0-9a-f]{40}", commit):  # before it is asked for
                raise ValueError(f"{commit!r} is no commit")
            entries: list[dict[str, Any]] = []
            page: str | None = f"{address}/tree/{commit}/{quote(folder)}"
            while page:
                found, page = _get_json(page)
                entries += [entry for entry in found if entry["type"] == "file" and entry["path"].endswith(".parquet")]
            files = [HubFile(e["path"], int(e["size"]), (e.get("lfs") or {}).get("oid")) for e in entries]
            return HubListing(repository, commit, tuple(sorted(files, key=lambda file: file.path)))
        except HfHubHTTPError:  # some are ValueErrors too
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise BadAnswerError(f"not an answer of a hub ({type(error).__name__}: {error})") from error

    listing = persist(f"the list of files in {folder}", repository, ask, attempts=_LISTING_ATTEMPTS)
    if not listing.files:
        raise UserError(
            f"{repository} at {listing.revision} holds no parquet file in {folder}; look at {_page(repository)}"
        )
    return listing


def read_range(listing: HubListing, file: HubFile, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` up to `end` of a file, piece by piece, in one attempt.

    Raises what the client raises, and BadAnswerError where the body is not as long as that.
    """
    url = hf_hub_url(listing.repository, file.path, repo_type="dataset", revision=listing.revision)
    headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        found = response.headers.get("Content-Range", "")
        if response.status_code == 206 and not found.startswith(f"bytes {start}-{end - 1}/"):
            raise BadAnswerError(f"asked for bytes {start} to {end - 1}, answered with {found or 'others'}")
        position = start if response.status_code == 206 else 0  # a server without ranges sends the whole file
        for chunk in response.iter_bytes():
            wanted = chunk[max(0, start - position) : max(0, end - position)]
            position += len(chunk)
            if wanted:
                yield wanted
            elif position > end:
                return
        # Reached with the body read to its end, so that the connection serves the next request too.
        if position < end:
            raise BadAnswerError(f"the answer ended after {max(0, position - start)} of {end - start} bytes")


def persist(
    what: str,
    repository: str,
    attempt: Callable[[], T],
    attempts: int = ATTEMPTS,
    stopping: threading.Event | None = None,
    bytes_there: Callable[[], int] = lambda: 0,
) -> T:
    """What `attempt` returns, tried again where it fails for a reason that may pass, after longer and longer waits.

    An attempt that added much to `bytes_there` does not count. Each retry is a line on stderr. Raises UserError,
    at once where there is nothing to hope for, and passes StorageError on.
    """
    stopping = stopping or threading.Event()
    failures = 0
    while True:
        before = bytes_there()
        try:
            return attempt()
        except (UserError, StorageError):
            raise
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            if stopping.is_set():
                raise
            failures = 1 if bytes_there() - before >= WORTHWHILE_BYTES else failures + 1
            if (remedy := _remedy(error, repository)) or failures == attempts:
                _give_up(what, repository, error, remedy, failures)
            delay_s = _delay_s(error, failures)
            say(f"attempt {failures + 1} of {attempts} for {what} in {delay_s:.0f} s: {_reason(error)}")
            if stopping.wait(delay_s):
                raise


def _get_json(url: str) -> tuple[Any, str | None]:
    """The content at an address of the hub's API, and the address of the next page, if there is one."""
    response = get_session().get(url, headers=build_hf_headers(), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    return response.json(), response.links.get("next", {}).get("url")


def _remedy(error: Exception, repository: str) -> str | None:
    """What to do about an error that no further attempt will mend; None for any other."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps the client from asking; unset it"
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
        return "HF_ENDPOINT must be an address such as https://huggingface.co"
    if not isinstance(error, HfHubHTTPError) or error.response.history:
        return None  # redirected: to storage, whose refusals pass, since the hub signs a new address each time
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"accept the dataset's conditions on {_page(repository)}, then set HF_TOKEN or run: hf auth login"
    if status in (401, 403):
        return f"check that {_page(repository)} exists, and the token in HF_TOKEN or of: hf auth login"
    if 400 <= status < 500 and status not in _RETRIED_STATUS:
        return f"it is gone or never was there; look at {_page(repository)}"
    return None


def _give_up(what: str, repository: str, error: Exception, remedy: str | None, failures: int) -> NoReturn:
    tried = f" after {failures} attempts" if failures > 1 else ""
    raise UserError(
        f"cannot get {what} of {repository} from {constants.ENDPOINT} ({_reason(error)}){tried}; "
        + (remedy or f"{CHECK_CONNECTION}; the same command goes on from here")
    ) from error


def _delay_s(error: Exception, failures: int) -> float:
    """Seconds to wait: doubled at each failure, not the same for all, and as many as the server asks for."""
    delay_s = BASE_DELAY_S * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
    if isinstance(error, HfHubHTTPError):
        headers = error.response.headers
        asked = headers.get("Retry-After", "")
        limits = parse_ratelimit_headers(headers) if error.response.status_code == 429 else None
        if asked.isdigit():
            delay_s = max(delay_s, float(asked))
        elif limits and not limits.remaining:
            delay_s = max(delay_s, float(limits.reset_in_seconds))
    return min(delay_s, _LONGEST_DELAY_S)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if isinstance(error, BadAnswerError) else reason(error)


def _page(repository: str) -> str:
    return f"{constants.ENDPOINT}/datasets/{repository}"
