"""A dataset on one page: its manifest as tables, the lengths of its documents, and pieces of its text.

    │ the last words of a document
    ──── document ────
    │ The next one begins.

Boundaries come from token ids, and only they leave the margin: a document that spells out `<|endoftext|>`, or a line
like the second one above, cannot imitate them. Control characters are escaped. The tables need manifest.json only, so
a dataset of any size takes a second or two.
"""

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
from src.utils.errors import UserError, cause_of, harmless
from src.utils.logger import RunLogger

BOUNDARY = "──── document ────"
_MARGIN = "│ "
_SAMPLES = (("validation", 1 / 2), ("train", 1 / 3), ("train", 2 / 3))  # split, and where in it
_SAMPLE_TOKENS, _TOKENS_BEFORE, _SEARCHED_TOKENS = 200, 40, 32_768  # the last: how far a boundary may lie
_SAMPLE_LINES, _SKIPPED_LINES = 6, 4  # of each document
_WINDOWS_SHOWN = 4  # of each skipped step


def inspect(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return a page on the dataset in `folder`, which names a damaged shard, and figures for JSON. Raises UserError."""
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


def inspect_skipped(folder: Path, run_dir: Path) -> tuple[str, dict[str, Any]]:
    """Return the beginnings of the documents in up to four windows of each step that a run skipped, and figures.

    `folder` is the dataset that it trained on. Raises UserError for another one, and for records that make no sense.
    """
    manifest, log = read_manifest(folder), RunLogger(run_dir, is_main=False)
    events = [r for r in log.records() if (r["kind"], r.get("name")) == ("event", "skipped step")]
    page = [harmless(f"{run_dir} skipped {f'{len(events):,} step(s)' if events else 'no step'}")]
    shown = 0
    try:
        used = log.settings()["dataset"]
        if used["manifest_sha256"] != manifest.sha256:
            raise UserError(f"Cannot show {run_dir}: it trained on another dataset, {used['name']}. Give it as --out.")
        for event in events:
            places, n_ctx = event.get("windows") or [], event["n_ctx"]
            shown += len(places)
            page.append(harmless(f"== step {event['step']}: {event['detail']}"))
            page[-1] += f"\n{len(places[:_WINDOWS_SHOWN])} of {len(places):,} window(s) of {n_ctx:,} tokens:"
            for index, window in places[:_WINDOWS_SHOWN]:
                shard = manifest.shards[index]
                page.append(excerpt(folder, manifest, shard, window * n_ctx, n_ctx + 1, _SKIPPED_LINES))
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"Cannot read what {run_dir} skipped: its config.json or metrics.jsonl is missing or damaged "
            f"({cause_of(error)}). Give the folder of a run, or the name of one in temp_data/runs."
        ) from None
    counts = {"skipped_steps": len(events), "windows": shown}
    return "\n\n".join(page), {"run": str(run_dir), "dataset": str(folder), **counts}


def excerpt(folder: Path, manifest: Manifest, shard: Shard, first: int, n_tokens: int, document_lines: int) -> str:
    """Return a heading, and the text of `n_tokens` tokens from token `first` on, in lines behind a margin.

    Each end-of-text token is a line without margin. A document has up to `document_lines`.
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
    rows = [["split", "shards", "documents", "tokens", "share", "bytes a token", "tokens a document"]]
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
    rows = [["tokens a document", "documents", "share", ""]]
    for k in range(next((k for k, count in enumerate(counts) if count), len(counts)), len(counts)):
        bar = "█" * -(-40 * counts[k] // max(counts))  # rounded up, so a single document shows
        rows.append([f"{2**k:,} to {2 ** (k + 1) - 1:,}", f"{counts[k]:,}", f"{counts[k] / sum(counts):.1%}", bar])
    return _table(rows, ">>><")


def _table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Put `rows` into columns, each aligned to the left (<) or the right (>)."""
    cells = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True)).rstrip()
        for row in cells
    )


def _samples(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the text around the first boundary behind each place in _SAMPLES, or the text there if none is near."""
    for split, fraction in _SAMPLES:
        shards = [shard for shard in manifest.shards if shard.split == split]
        ends = list(accumulate(shard.tokens for shard in shards))
        number = bisect_right(ends, int(fraction * ends[-1]), hi=len(ends) - 1)
        shard = shards[number]
        first = int(fraction * ends[-1]) - (ends[number] - shard.tokens)
        first = max(0, min(first, shard.tokens - 2 * _SAMPLE_TOKENS))  # not only the last words of a shard
        with suppress(UserError):  # the excerpt says it
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
    """Return the text of `ids`, without boundaries, in up to `limit` lines behind the margin."""
    is_ours = manifest.tokenizer_sha256 == Tokenizer.sha256
    text = load_tokenizer().decode(ids.tolist()) if is_ours else " ".join(map(str, ids))
    width = max(40, shutil.get_terminal_size((100, 24)).columns) - len(_MARGIN)
    lines = []
    for line in text.split("\n"):
        parts = textwrap.wrap(harmless(line.expandtabs(4)), width, drop_whitespace=False)
        lines += [(_MARGIN + part).rstrip(" ") for part in parts or [""]]
    return lines[:limit] + ([f"({len(lines) - limit:,} more line(s))"] if len(lines) > limit else [])
