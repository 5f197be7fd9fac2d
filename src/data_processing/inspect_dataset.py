"""A dataset on one page: its manifest as tables, the lengths of its documents, and excerpts of its text.

    │ the last words of a document
    ──── document ────
    │ The next one begins.

Boundaries come from token ids, and only they are outside the margin: a document that spells out `<|endoftext|>`, or a
line like the second one above, cannot imitate them. Control characters are escaped. The tables need only manifest.json,
so a dataset of any size takes a second or two.
"""

import re
import shutil
import textwrap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from src.data_processing.shards import Manifest, Shard, check_shard, read_manifest
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.utils.errors import UserError, harmless

BOUNDARY = "──── document ────"
_MARGIN = "│ "
_SAMPLES = (("validation", 1 / 2), ("train", 1 / 3), ("train", 2 / 3))  # split, and where in it
_SAMPLE_TOKENS, _TOKENS_BEFORE, _SEARCHED_TOKENS = 200, 40, 32_768  # the last: how far to search for a boundary
_SAMPLE_LINES = 6  # of each document
_MOST_TOKENS = 1_000_000  # at one place


def inspect(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return a page about the dataset in `folder`, and figures for JSON. Raises UserError.

    The page names a shard whose sample cannot be read, but does not verify the others.
    """
    manifest = read_manifest(folder)
    documents, tokens, text_bytes = _totals(manifest.shards)
    tokenizer = f"{manifest.tokenizer}, {manifest.n_vocab:,} ids, the end-of-text token is {manifest.end_of_text}"
    rows = {"dataset": folder, "manifest": f"sha256 {manifest.sha256}", "tokenizer": tokenizer, "seed": manifest.seed}
    identity = _table([[name, str(value)] for name, value in rows.items()], "<<")
    parts = [identity, _sources(manifest), _splits(manifest), _histogram(manifest)]
    figures = {
        "dataset": str(folder),
        "documents": documents,
        "tokens": tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": round(text_bytes / max(1, tokens), 4),
        "validation_tokens": _totals(manifest.validation)[1],
        "shards": len(manifest.shards),
        "document_lengths": manifest.document_lengths,
    }
    return "\n\n".join([*parts, *_samples(folder, manifest)]), figures


def excerpts(folder: Path, places: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the text at `places`, each SHARD:FIRST-END (a shard's number and token numbers), and figures for JSON.

    Raises UserError for a place that the dataset in `folder` does not have.
    """
    manifest, page = read_manifest(folder), list[str]()
    for place in places:
        match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,16})-([0-9]{1,16})", place)
        number, first, end = map(int, match.groups()) if match else (0, 0, 0)
        shards = manifest.shards[number : number + 1]
        if not any(first < end <= min(shard.tokens, first + _MOST_TOKENS) for shard in shards):
            raise UserError(
                f"Cannot show {place[:60]!r}: expected SHARD:FIRST-END, a shard from 0 to {len(manifest.shards) - 1} "
                f"and at most {_MOST_TOKENS:,} of its tokens, such as 0:0-{min(200, manifest.shards[0].tokens)}."
            )
        page += [excerpt(folder, manifest, shard, first, end - first, _MOST_TOKENS) for shard in shards]
    return "\n\n".join(page), {"dataset": str(folder), "places": len(places)}


def excerpt(folder: Path, manifest: Manifest, shard: Shard, first: int, n_tokens: int, document_lines: int) -> str:
    """Return a heading, then the text of `n_tokens` tokens from token `first`, in lines with a margin.

    Each end-of-text token is a line without a margin. A document has up to `document_lines` lines.
    """
    page = [harmless(f"{shard.file}, from token {first:,}")]
    try:
        ids = _read(folder, manifest, shard, first, n_tokens)
    except UserError as error:
        return harmless(f"{shard.file}: {error}")
    before, *documents = np.split(ids, np.flatnonzero(ids == manifest.end_of_text))
    page += _text_lines(before, manifest, document_lines) if before.size else []
    for document in documents:
        page += [BOUNDARY, *_text_lines(document[1:], manifest, document_lines)]
    return "\n".join(page)


def _totals(shards: Sequence[Shard]) -> tuple[int, int, int]:
    """Documents, tokens and text bytes."""
    return sum(s.documents for s in shards), sum(s.tokens for s in shards), sum(s.text_bytes for s in shards)


def _sources(manifest: Manifest) -> str:
    all_tokens = max(1, _totals(manifest.shards)[1])
    rows = [["source", "documents", "tokens", "share", "from"]]
    for source in manifest.sources:
        documents, tokens = source.get("documents", 0), source.get("tokens", 0)
        places = [str(source[key]) for key in ("repository", "config", "revision", "path") if source.get(key)]
        places += [f"{package} {version}" for package, version in source.get("packages", {}).items()]
        numbers = [f"{documents:,}", f"{tokens:,}", f"{tokens / all_tokens:.1%}"]
        rows.append([str(source.get("name")), *numbers, ", ".join(places)])
    return _table(rows, "<>>><")


def _splits(manifest: Manifest) -> str:
    rows = [["split", "shards", "documents", "tokens", "share", "bytes per token", "tokens per document"]]
    all_tokens = max(1, _totals(manifest.shards)[1])
    for name, shards in (("validation", manifest.validation), ("training", manifest.train), ("all", manifest.shards)):
        documents, tokens, text_bytes = _totals(shards)
        numbers = [f"{len(shards):,}", f"{documents:,}", f"{tokens:,}", f"{tokens / all_tokens:.1%}"]
        rows.append([name, *numbers, f"{text_bytes / max(1, tokens):.3f}", f"{tokens / max(1, documents):,.1f}"])
    names = ("skipped_empty", "dropped_duplicates", "replaced_invalid")
    empty, duplicates, invalid = (manifest.counts.get(name, 0) for name in names)
    left_out = f"left out: {empty:,} empty, {duplicates:,} duplicates; invalid UTF-8 replaced in {invalid:,}"
    return f"{_table(rows, '<>>>>>>')}\n{left_out}"


def _histogram(manifest: Manifest) -> str:
    """Count the documents of each length: entry k of the manifest's counts is for 2^k to 2^(k+1) - 1 tokens."""
    counts = manifest.document_lengths
    rows = [["tokens per document", "documents", "share", ""]]
    for k in range(next((k for k, count in enumerate(counts) if count), len(counts)), len(counts)):
        bar = "█" * -(-40 * counts[k] // max(counts))  # rounded up, so a single document shows
        rows.append([f"{2**k:,} to {2 ** (k + 1) - 1:,}", f"{counts[k]:,}", f"{counts[k] / sum(counts):.1%}", bar])
    return _table(rows, ">>><")


def _table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Format `rows` in columns, each aligned left (<) or right (>)."""
    cells = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True)).rstrip()
        for row in cells
    )


def _samples(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the text around the first boundary after each place in _SAMPLES, or the text there if none is near."""
    for split, fraction in _SAMPLES:
        shards = [shard for shard in manifest.shards if shard.split == split]
        ends = list(accumulate(shard.tokens for shard in shards))
        number = bisect_right(ends, int(fraction * ends[-1]), hi=len(ends) - 1)
        shard = shards[number]
        first = int(fraction * ends[-1]) - (ends[number] - shard.tokens)
        first = max(0, min(first, shard.tokens - 2 * _SAMPLE_TOKENS))  # not only the last words of a shard
        with suppress(UserError):  # the excerpt reports it
            near = _read(folder, manifest, shard, first, _SEARCHED_TOKENS)
            boundaries = np.flatnonzero(near == manifest.end_of_text)
            first = max(0, first + int(boundaries[0]) - _TOKENS_BEFORE) if boundaries.size else first
        yield f"{split}: {excerpt(folder, manifest, shard, first, _SAMPLE_TOKENS, _SAMPLE_LINES)}"


def _read(folder: Path, manifest: Manifest, shard: Shard, first: int, count: int) -> np.ndarray:
    check_shard(folder, shard, manifest.n_vocab)
    ids = np.load(folder / shard.file, mmap_mode="r", allow_pickle=False)[first : first + count]
    if ids.size and ids.max() >= manifest.n_vocab:
        raise UserError(f"Cannot show id {ids.max()}: expected ids below {manifest.n_vocab}. Verify the dataset.")
    return np.array(ids)


def _text_lines(ids: np.ndarray, manifest: Manifest, limit: int) -> list[str]:
    """Return the text of `ids`, without boundaries, in up to `limit` lines with the margin."""
    is_ours = manifest.tokenizer_sha256 == Tokenizer.sha256
    text = load_tokenizer().decode(ids.tolist()) if is_ours else " ".join(map(str, ids))
    width = max(40, shutil.get_terminal_size((100, 24)).columns) - len(_MARGIN)
    lines = []
    for line in text.split("\n"):
        parts = textwrap.wrap(harmless(line.expandtabs(4)), width, drop_whitespace=False)
        lines += [(_MARGIN + part).rstrip(" ") for part in parts or [""]]
    return lines[:limit] + ([f"({len(lines) - limit:,} more line(s))"] if len(lines) > limit else [])
