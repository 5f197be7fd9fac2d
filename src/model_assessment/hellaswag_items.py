"""Multiple-choice items in HellaSwag's format, from a file, from the Hugging Face hub, or from held-out text."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants as hub

from src.data_processing.tokenizer import Tokenizer
from src.utils.errors import StorageError, UserError, connection_advice, hub_answers
from src.utils.files import open_regular, parse_json

MAX_BYTES = 1_000_000_000  # HellaSwag has 13 MB; a small .gz can hold terabytes
NEEDED = "Needed: ind (an integer), ctx (text), endings (four texts) and label (0 to 3)"
INSTEAD = (
    "Give a local copy in its original format, FILE.jsonl. In training and evaluate, held-out makes a stand-in from "
    "held-out text; in training, --eval.hellaswag-items 0 turns it off"
)

ENDING_TOKENS = 16
# The context starts at the first word in this range before the ending, so a passage fits a model with 80 positions.
MIN_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS = 40, 64
CHOICES = 4

# A shard can hold a hundred million tokens; this part of it has tens of thousands of passages.
_MOST_TOKENS = 4_000_000


@dataclass(frozen=True)
class Item:
    """One question with four endings."""

    ind: int
    ctx: str
    endings: tuple[str, ...]
    label: int
    """Index of the right ending."""
    activity_label: str | None = None
    """This and the next two are for lm-eval's protocol; None if the file lacks them."""
    ctx_a: str | None = None
    ctx_b: str | None = None
    """The second part of `ctx`, which may be empty."""


def load_items(path: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a .jsonl or .jsonl.gz file in HellaSwag's format. Raises UserError with the line."""
    try:
        with open_regular(path) as file:
            text = (gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file).read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"Cannot read {path}: it has more than {MAX_BYTES:,} bytes. {INSTEAD}.")
        lines = [(number, line) for number, line in enumerate(text.split(b"\n"), start=1) if line.strip()][:limit]
    except StorageError as error:  # a FIFO, folder or device
        raise UserError(f"{error} {INSTEAD}.") from None
    except (OSError, EOFError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot read {path}: {cause}. {INSTEAD}.") from None
    if not lines:
        raise UserError(f"{path} is empty. {NEEDED}, one JSON object per line.")
    return [_item(line, f"{path}, line {number}") for number, line in lines]


def fetch_items(limit: int | None = None) -> list[Item]:
    """The first `limit` of HellaSwag's 10,042 validation items, from the hub or its cache. Raises UserError."""
    import datasets  # its import takes a second, and only this function needs it

    refuse_silent_hub()  # `datasets` itself would retry for half a minute
    try:
        records = datasets.load_dataset("Rowan/hellaswag", split="validation")
    except Exception as error:  # from any library below: httpx, pyarrow, the hub's client
        raise UserError(f"Cannot fetch HellaSwag from {hub.ENDPOINT}: {error}. {INSTEAD}.") from error
    return [
        _item(json.dumps(record).encode(), f"Rowan/hellaswag, record {i}")
        for i, record in enumerate(islice(records, limit))
    ]


def refuse_silent_hub() -> None:
    """Raises UserError, within seconds, if `fetch_items` would wait for a hub that does not answer."""
    if not hub.HF_HUB_OFFLINE and not hub_answers():
        raise UserError(
            f"Cannot fetch HellaSwag: {hub.ENDPOINT} does not answer. {connection_advice()}. {INSTEAD}. "
            "If it was fetched before, HF_HUB_OFFLINE=1 uses the cached copy."
        )


def cached_items() -> Path | None:
    """The copy that an earlier `fetch_items` left in the cache of `datasets`, or None."""
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(hub.HF_HOME) / "datasets")
    return next(cache.glob("Rowan___hellaswag/*/*/*/hellaswag-validation.arrow"), None)


def _item(line: bytes, where: str) -> Item:
    """The item of a JSON object. Raises UserError naming the place and the wrong fields."""
    try:
        record = parse_json(line)
    except ValueError as error:
        found = line.strip()[:60].decode(errors="replace")
        raise UserError(f"{where}: found {found!r}, not a JSON object: {error}. {NEEDED}.") from None
    endings, parts = record.get("endings"), [record.get(name) for name in ("activity_label", "ctx_a", "ctx_b")]
    good = {
        "ind": type(record.get("ind")) is int,
        "ctx": _is_text(record.get("ctx")),
        "endings": isinstance(endings, list) and len(endings) == 4 and all(map(_is_text, endings)),
        "label": str(record.get("label")) in ("0", "1", "2", "3"),  # the hub's are strings
        "activity_label, ctx_a, ctx_b": all(part is None or isinstance(part, str) for part in parts),
    }
    if wrong := [name for name in good if not good[name]]:
        raise UserError(f"{where}: missing or wrong: {', '.join(wrong)}. {NEEDED}.")
    return Item(record["ind"], record["ctx"], tuple(record["endings"]), int(record["label"]), *parts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def held_out_items(tokens: np.ndarray, tokenizer: Tokenizer, count: int, seed: int) -> list[Item]:
    """At most `count` items from `tokens`, uint16 ids of documents that each follow an end-of-text token.

    A stand-in for HellaSwag that needs no network and that a small model can learn: choosing the continuation of a
    passage of validation text. A passage is a context and the ENDING_TOKENS tokens after it. An item is one passage
    with the endings of three others, from other documents. Right and wrong endings are drawn alike, so that only the
    context tells which one is right.

    A pure function of its arguments. The right ending's position is uniform, and an item's endings differ. Raises
    UserError if fewer than four documents are long enough.
    """
    # Boilerplate in two documents would be both right and wrong, so only the first passage with an ending counts.
    passages: dict[str, tuple[str, int]] = {}
    for context, ending, document in _passages(np.asarray(tokens[:_MOST_TOKENS]), tokenizer):
        passages.setdefault(ending, (context, document))
    all_endings, document_of = list(passages), np.array([document for _, document in passages.values()])
    if (n_documents := len(set(document_of.tolist()))) < CHOICES:
        raise UserError(
            f"Cannot make multiple-choice items: {n_documents} held-out documents with at least "
            f"{MAX_CONTEXT_TOKENS + ENDING_TOKENS} tokens of running text are too few. Prepare a dataset of more "
            "documents, or give a HellaSwag file. In training, --eval.hellaswag-items 0 turns these items off."
        )
    rng = np.random.default_rng(seed)
    items = []
    for ind, right in enumerate(rng.permutation(len(passages))[:count].tolist()):
        others = np.flatnonzero(document_of != document_of[right])
        endings = [all_endings[i] for i in rng.choice(others, CHOICES - 1, replace=False)]
        label = int(rng.integers(CHOICES))
        endings.insert(label, all_endings[right])
        items.append(Item(ind, passages[all_endings[right]][0], tuple(endings), label))
    return items


def _passages(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, str, int]]:
    """Contexts, endings and documents of passages that don't overlap, in the text's order."""
    is_cut = _word_cuts(tokens, tokenizer)
    cuts = np.flatnonzero(is_cut)
    middles = cuts[cuts < len(tokens) - ENDING_TOKENS]
    ends = middles + ENDING_TOKENS
    # For each token, the position of the end-of-text token before its document.
    document_at = np.maximum.accumulate(np.where(tokens == tokenizer.end_of_text, np.arange(len(tokens)), 0))
    starts = cuts[np.searchsorted(cuts, np.maximum(document_at[middles], middles - MAX_CONTEXT_TOKENS))]
    good = is_cut[ends] & (middles - starts >= MIN_CONTEXT_TOKENS) & (document_at[middles] == document_at[ends])
    free_from = 0
    for start, middle, end in np.stack([starts, middles, ends], axis=1)[good].tolist():
        if start >= free_from:
            context, ending = (tokenizer.decode(part.tolist()) for part in (tokens[start:middle], tokens[middle:end]))
            yield context.removeprefix(" "), ending.removeprefix(" "), int(document_at[start])
            free_from = end


def _word_cuts(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Shape (len(tokens),): True for a token that is a single space and the beginning of a word."""
    begins_word = np.zeros(tokenizer.n_vocab, dtype=bool)
    ends_word = np.zeros(tokenizer.n_vocab, dtype=bool)
    for token in np.unique(tokens).tolist():
        text = tokenizer.decode([token])
        begins_word[token] = len(text) > 1 and text[0] == " " and not text[1].isspace()
        ends_word[token] = not text[-1].isspace() and token != tokenizer.end_of_text
    is_cut = begins_word[tokens]
    is_cut[1:] &= ends_word[tokens[:-1]]
    is_cut[:1] = False
    return is_cut
