"""Multiple-choice items in HellaSwag's format, from a file or from the Hugging Face hub."""

import gzip
import json
import os
import ssl
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import constants as hub

from src.utils.errors import UserError

HUB_TIMEOUT_SECONDS = 5
NEEDED = "Needed: ind (an integer), ctx (text), endings (four texts) and label (0 to 3)"
INSTEAD = "Give a local copy (.jsonl or .jsonl.gz, original format), or 'held-out' for a stand-in from held-out text"


@dataclass(frozen=True)
class Item:
    """One question with four endings."""

    ind: int
    ctx: str
    endings: tuple[str, ...]
    label: int
    """Index of the right ending."""
    activity_label: str | None = None
    """This and the next two are for lm-eval's protocol; None where the file lacks them."""
    ctx_a: str | None = None
    ctx_b: str | None = None
    """The second part of `ctx`, which may be empty."""


def load_items(path: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a .jsonl or .jsonl.gz in HellaSwag's format.

    Raises UserError with file and line number for a file that is missing, damaged, empty or of another format.
    """
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")  # opening a FIFO would wait for ever
        with open_text(path, "rt", encoding="utf-8") as lines:
            numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            items = [_parse(line, f"{path}, line {number}") for number, line in islice(numbered, limit)]
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}. {INSTEAD}.") from None
    if not items:
        raise UserError(f"{path} is empty. {NEEDED}, one JSON object per line.")
    return items


def fetch_items(limit: int | None = None) -> list[Item]:
    """The first `limit` of the 10,042 items of HellaSwag's validation set, from the Hugging Face hub or its cache.

    Raises UserError, within seconds, where the hub cannot be reached.
    """
    import datasets  # used here only, and its import takes a second

    refuse_silent_hub()  # `datasets` itself would retry for half a minute
    try:
        records = datasets.load_dataset("Rowan/hellaswag", split="validation")
    except Exception as error:  # of any library below: httpx, pyarrow, the hub's client
        raise UserError(f"Cannot fetch HellaSwag from {hub.ENDPOINT}: {error}. {INSTEAD}.") from error
    return [_as_item(record, f"Rowan/hellaswag, record {i}") for i, record in enumerate(islice(records, limit))]


def refuse_silent_hub() -> None:
    """Raises UserError, within seconds, where `fetch_items` would wait for a hub that does not answer."""
    if not hub.HF_HUB_OFFLINE and not hub_answers(hub.ENDPOINT):
        raise UserError(
            f"Cannot fetch HellaSwag: {hub.ENDPOINT} does not answer. {INSTEAD}. "
            "If it was fetched before, HF_HUB_OFFLINE=1 uses the cached copy."
        )


def hub_answers(endpoint: str) -> bool:
    """True where an HTTP server answers at that address."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_SECONDS).close()
    except (OSError, ValueError, HTTPException) as error:
        # A status is an answer. A certificate that Python rejects may be known to `datasets`.
        return isinstance(error, urllib.error.HTTPError) or isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def cached_items() -> Path | None:
    """The copy that an earlier `fetch_items` left, under the name that `datasets` gives it."""
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(hub.HF_HOME) / "datasets")
    return next(cache.glob("Rowan___hellaswag/*/*/*/hellaswag-validation.arrow"), None)


def _parse(line: str, where: str) -> Item:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: found {_short(line.strip())}, which is not JSON. {NEEDED}.") from None
    return _as_item(record, where)


def _as_item(record: Any, where: str) -> Item:
    """The item of a record; raises UserError that names its wrong fields."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: found {_short(record)}, which is not a JSON object. {NEEDED}.")
    endings, parts = record.get("endings"), ("activity_label", "ctx_a", "ctx_b")
    is_good = {
        "ind": type(record.get("ind")) is int,
        "ctx": _is_text(record.get("ctx")),
        "endings": isinstance(endings, list) and len(endings) == 4 and all(map(_is_text, endings)),
        "label": str(record.get("label")) in ("0", "1", "2", "3"),  # the hub's are strings
        **{name: record[name] is None or isinstance(record[name], str) for name in parts if name in record},
    }
    if wrong := [name for name, good in is_good.items() if not good]:
        values = ", ".join(f"{name} = {_short(record[name])}" if name in record else f"no {name}" for name in wrong)
        raise UserError(f"{where}: found {values}. {NEEDED}.")
    return Item(record["ind"], record["ctx"], tuple(record["endings"]), int(record["label"]), *map(record.get, parts))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
