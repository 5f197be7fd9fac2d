"""Multiple-choice items in HellaSwag's format, from a file or from the Hugging Face hub."""

import gzip
import json
import os
import ssl
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import constants as hub

from src.utils.errors import UserError

HUB_TIMEOUT_SECONDS = 5
NEEDED = "needed: ind (an integer), ctx (text), endings (four texts) and label (0 to 3)"
PARTS = ("activity_label", "ctx_a", "ctx_b")
"""Fields of an item that only lm-eval's protocol asks by: texts where there are any; HellaSwag's own file has them."""
INSTEAD = "give a local copy (.jsonl or .jsonl.gz, original format), or 'held-out' for a stand-in from held-out text"


@dataclass(frozen=True)
class Item:
    """One question. By the reference's protocol a single space stands between `ctx` and an ending."""

    ind: int
    ctx: str
    endings: tuple[str, ...]
    label: int
    """Index of the right one of the four endings."""
    activity_label: str | None = None
    ctx_a: str | None = None
    ctx_b: str | None = None
    """May be empty. `ctx` is ctx_a, or ctx_a and ctx_b; None where the file does not have them apart."""


def load_items(path: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a .jsonl or .jsonl.gz in HellaSwag's format.

    Raises UserError with file and line number for a file that is missing, damaged, empty or of another format.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            items = list(islice(_parse(lines, path), limit))
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {INSTEAD}") from None
    if not items:
        raise UserError(f"{path} is empty; {NEEDED}, one JSON object a line")
    return items


def fetch_items(limit: int | None = None) -> list[Item]:
    """The first `limit` items of HellaSwag's validation set (10,042 items), from the Hugging Face hub or its cache.

    Raises UserError, within seconds, where the hub cannot be reached.
    """
    import datasets  # the one function that needs it, and it takes a second to import

    refuse_silent_hub()  # datasets itself would try for half a minute
    try:
        records = datasets.load_dataset("Rowan/hellaswag", split="validation")
    except Exception as error:  # of any library below: httpx, pyarrow, the hub's client
        raise UserError(f"cannot fetch HellaSwag from {hub.ENDPOINT}: {error}; {INSTEAD}") from error
    return [_as_item(record, f"Rowan/hellaswag, record {i}") for i, record in enumerate(islice(records, limit))]


def refuse_silent_hub() -> None:
    """Raises UserError, within seconds, where `fetch_items` would ask a hub that does not answer."""
    if not hub.HF_HUB_OFFLINE and not hub_answers(hub.ENDPOINT):
        raise UserError(
            f"cannot fetch HellaSwag: {hub.ENDPOINT} does not answer; {INSTEAD}. "
            "Where it was fetched before, HF_HUB_OFFLINE=1 uses the cached copy"
        )


def cached_items() -> Path | None:
    """The copy that an earlier `fetch_items` left, as datasets names it, or None."""
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(hub.HF_HOME) / "datasets")
    return next(cache.glob("Rowan___hellaswag/*/*/*/hellaswag-validation.arrow"), None)


def _parse(lines: Iterable[str], path: Path) -> Iterator[Item]:
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{where}: found {_short(line.strip())}, which is not JSON; {NEEDED}") from None
        yield _as_item(record, where)


def _as_item(record: Any, where: str) -> Item:
    """Raises UserError with what was found at `where` instead of an item."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: found {_short(record)}, which is not a JSON object; {NEEDED}")
    endings = record.get("endings")
    found = {
        "ind": type(record.get("ind")) is int,
        "ctx": _is_text(record.get("ctx")),
        "endings": isinstance(endings, list) and len(endings) == 4 and all(map(_is_text, endings)),
        "label": str(record.get("label")) in ("0", "1", "2", "3"),  # the hub's are strings
        **{name: record[name] is None or isinstance(record[name], str) for name in PARTS if name in record},
    }
    if wrong := [name for name, good in found.items() if not good]:
        values = ", ".join(f"{name} = {_short(record[name])}" if name in record else f"no {name}" for name in wrong)
        raise UserError(f"{where}: found {values}; {NEEDED}")
    parts = (record.get(name) for name in PARTS)
    return Item(record["ind"], record["ctx"], tuple(record["endings"]), int(record["label"]), *parts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def hub_answers(endpoint: str) -> bool:
    """Whether anything at that address speaks HTTP."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_SECONDS).close()
    except (OSError, ValueError, HTTPException) as error:
        # A status is an answer, and so is a certificate that datasets may know better.
        return isinstance(error, urllib.error.HTTPError) or isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True
