"""A dataset on one page: its manifest as tables, the lengths of its documents, and pieces of its text.

    │ the last lines of a document
    ──── document ────
    │ The next one begins.

Boundaries come from token ids, and only they leave the margin: a document that spells out `<|endoftext|>`, or a line
like the second one above, cannot imitate them. Control characters are escaped. The tables need manifest.json only, so
a dataset of any size takes a second or two.
"""

import json
import shutil
import textwrap
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from src.data_processing.shards import TOKEN_DTYPE, Manifest, Shard, check_shard, read_manifest
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.utils.errors import UserError, harmless

BOUNDARY = "──── document ────"
_MARGIN = "│ "
_SAMPLES = (("validation", "validation", 1 / 2), ("training", "train", 1 / 3), ("training", "train", 2 / 3))
_SAMPLE_TOKENS, _TOKENS_BEFORE, _SEARCHED_TOKENS = 400, 100, 32_768  # the last: how far a boundary may lie
_SAMPLE_LINES, _LINES_BEFORE = 12, 4
_WINDOW_DOCUMENTS, _WINDOW_LINES = 4, 16  # of a skipped window; its documents share the lines


@dataclass(frozen=True)
class Inspection:
    """A page for people and figures for programs, to be written as JSON."""

    page: str
    figures: dict[str, Any]


def inspect(folder: Path) -> Inspection:
    """Describe the dataset in `folder`. The page names a damaged shard.

    Raises UserError if there is no dataset, or its manifest is damaged.
    """
    manifest = read_manifest(folder)
    documents, tokens, text_bytes = _totals(manifest.shards)
    tables = (_identity(folder, manifest), _sources(manifest), _splits(manifest), _histogram(manifest))
    foreign = "" if _is_ours(manifest) else "The ids belong to another tokenizer, so the samples show ids, not text."
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
    return Inspection("\n\n".join(filter(None, [*tables, foreign, *_samples(folder, manifest)])), figures)


def inspect_skipped(folder: Path, run_dir: Path, windows: int) -> Inspection:
    """Show the beginnings of the documents in up to `windows` windows of each step that a run skipped.

    `folder` is the dataset that it trained on. The run's files may be damaged: the page counts bad lines and explains
    a window that it cannot show. Raises UserError if there is no such run or dataset, or the run used another.
    """
    manifest = read_manifest(folder)
    _check_dataset(run_dir, folder, manifest)
    events, unreadable = _skipped_steps(run_dir / "metrics.jsonl")
    page = [harmless(f"{run_dir} skipped {f'{len(events):,} step(s)' if events else 'no step'}")]
    if unreadable:
        page.append(f"{unreadable:,} line(s) of its metrics.jsonl are damaged and were ignored")
    shown = 0
    for event in events:
        places, n_ctx = event.get("windows"), event.get("n_ctx")
        page.append(harmless(f"== step {event.get('step')}: {event.get('detail')}"))
        if not places or not isinstance(places, list) or type(n_ctx) is not int or n_ctx < 1:
            page[-1] += "\nthe run did not record its windows"
            continue
        shown += len(places)
        more = f"; the first {windows:,} follow, --windows {len(places)} shows all" if len(places) > windows else ""
        page[-1] += f"\n{len(places):,} window(s) of {n_ctx:,} tokens{more}"
        page += ["\n".join(_window(folder, manifest, place, n_ctx)) for place in places[:windows]]
    counts = {"skipped_steps": len(events), "windows": shown, "unreadable_lines": unreadable}
    return Inspection("\n\n".join(page), {"run": str(run_dir), "dataset": str(folder), **counts})


def excerpt(folder: Path, manifest: Manifest, shard_index: int, first_token: int, n_tokens: int) -> list[str]:
    """Return the text of `n_tokens` tokens of shard `shard_index` of manifest.shards, in lines behind a margin.

    Each end-of-text token is a line without margin. Lines fit the terminal, or 100 columns. A character that the
    piece cuts is U+FFFD. Raises UserError if the shard is damaged.
    """
    ids = _read(folder, manifest, manifest.shards[shard_index], first_token, n_tokens)
    before, *documents = np.split(ids, np.flatnonzero(ids == manifest.end_of_text))
    lines = _text_lines(before, manifest) if before.size else []
    for document in documents:
        lines += [BOUNDARY, *_text_lines(document[1:], manifest)]
    return lines


def _totals(shards: Sequence[Shard]) -> tuple[int, int, int]:
    """Documents, tokens and text bytes."""
    return sum(s.documents for s in shards), sum(s.tokens for s in shards), sum(s.text_bytes for s in shards)


def _identity(folder: Path, manifest: Manifest) -> str:
    tokenizer = f"{manifest.tokenizer}, {manifest.n_vocab:,} ids, the end-of-text token is {manifest.end_of_text}"
    rows = {"dataset": folder, "manifest": f"sha256 {manifest.sha256}", "tokenizer": tokenizer, "seed": manifest.seed}
    return _table([[name, str(value)] for name, value in rows.items()], "ll")


def _sources(manifest: Manifest) -> str:
    all_tokens = max(1, _totals(manifest.shards)[1])
    rows = [["source", "documents", "tokens", "share", "from"]]
    for source in manifest.sources:
        documents, tokens = source.get("documents"), source.get("tokens")
        numbers = ["" if number is None else f"{number:,}" for number in (documents, tokens)]
        share = "" if tokens is None else f"{tokens / all_tokens:.1%}"
        places = [str(source[key]) for key in ("repository", "config", "revision", "path") if source.get(key)]
        places += [f"{package} {version}" for package, version in source.get("packages", {}).items()]
        rows.append([str(source.get("name")), *numbers, share, ", ".join(places)])
    return _table(rows, "lrrrl")


def _splits(manifest: Manifest) -> str:
    rows = [["split", "shards", "documents", "tokens", "share", "bytes a token", "tokens a document"]]
    all_tokens = max(1, _totals(manifest.shards)[1])
    for name, shards in (("validation", manifest.validation), ("training", manifest.train), ("all", manifest.shards)):
        documents, tokens, text_bytes = _totals(shards)
        ratios = [
            f"{tokens / all_tokens:.1%}",
            f"{text_bytes / max(1, tokens):.3f}",
            f"{tokens / max(1, documents):,.1f}",
        ]
        rows.append([name, *(f"{number:,}" for number in (len(shards), documents, tokens)), *ratios])
    names = ("skipped_empty", "dropped_duplicates", "replaced_invalid")
    empty, duplicates, invalid = (manifest.counts.get(name, 0) for name in names)
    left_out = f"left out: {empty:,} empty, {duplicates:,} duplicates; invalid UTF-8 replaced in {invalid:,}"
    return f"{_table(rows, 'lrrrrrr')}\n{left_out}"


def _histogram(manifest: Manifest) -> str:
    """Count the documents of each length: entry k of the manifest's counts is for 2^k to 2^(k+1) - 1 tokens."""
    counts = manifest.document_lengths
    if not any(counts):
        return "the manifest does not say how long the documents are"
    all_documents, all_tokens = sum(counts), sum(count << k for k, count in enumerate(counts))
    rows = [["tokens a document", "documents", "share", "of tokens*", ""]]
    bar_width = max(10, min(40, _columns() - 60))
    first = next(k for k, count in enumerate(counts) if count)
    for k in range(first, max(k for k, count in enumerate(counts) if count) + 1):
        length = f"{2**k:,} to {2 ** (k + 1) - 1:,}" if k else "1"
        shares = [f"{counts[k] / all_documents:.1%}", f"{(counts[k] << k) / all_tokens:.1%}"]
        eighths = max(round(8 * bar_width * counts[k] / max(counts)), 1 if counts[k] else 0)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]
        rows.append([length, f"{counts[k]:,}", *shares, bar])
    middle = next(k for k, end in enumerate(accumulate(counts)) if 2 * end >= all_documents)
    return (
        f"{_table(rows, 'rrrrl')}\n* estimated: all documents of a line as equally long\n"
        f"the median document has {2**middle:,} to {2 ** (middle + 1) - 1:,} tokens"
    )


def _table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Put `rows` into columns, each aligned to the left or the right as its letter in `alignment`, l or r, says."""
    cells = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        aligned = zip(row, widths, alignment, strict=True)
        lines.append(
            "  ".join(cell.ljust(width) if side == "l" else cell.rjust(width) for cell, width, side in aligned)
        )
    return "\n".join(line.rstrip() for line in lines)


def _is_ours(manifest: Manifest) -> bool:
    """True if our tokenizer decodes the dataset's ids."""
    theirs = (manifest.tokenizer, manifest.tokenizer_sha256, manifest.n_vocab, manifest.end_of_text)
    return theirs == (Tokenizer.name, Tokenizer.sha256, Tokenizer.n_vocab, Tokenizer.end_of_text)


def _samples(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the lines around the first boundary behind each place in _SAMPLES, or the text there if none is near."""
    for name, split, fraction in _SAMPLES:
        indices = [index for index, shard in enumerate(manifest.shards) if shard.split == split]
        ends = list(accumulate(manifest.shards[index].tokens for index in indices))
        token = int(fraction * ends[-1])
        turn = bisect_right(ends, token, hi=len(ends) - 1)
        shard, token = manifest.shards[indices[turn]], token - (ends[turn - 1] if turn else 0)
        try:
            first = token = max(0, min(token, shard.tokens - _SAMPLE_TOKENS))  # not only the last words of a shard
            near = _read(folder, manifest, shard, token, _SEARCHED_TOKENS)
            if (boundaries := np.flatnonzero(near == manifest.end_of_text)).size:
                token += int(boundaries[0])
                first = max(0, token - _TOKENS_BEFORE)
            lines = excerpt(folder, manifest, indices[turn], first, _SAMPLE_TOKENS)
            start = max(0, lines.index(BOUNDARY) - _LINES_BEFORE) if BOUNDARY in lines else 0
            lines = lines[start : start + _SAMPLE_LINES]
        except UserError as error:
            lines = [harmless(f"cannot be shown: {error}")]
        yield "\n".join([harmless(f"{name}, around token {token:,} of {shard.file}"), *lines])


def _read(folder: Path, manifest: Manifest, shard: Shard, first: int, count: int) -> np.ndarray:
    """Read token ids without a memory map, which would make the system read megabytes around them."""
    check_shard(folder, shard, manifest.n_vocab)  # so the file ends with the last token
    path, left = folder / shard.file, shard.tokens - first
    ids = np.fromfile(path, TOKEN_DTYPE, min(count, left), offset=path.stat().st_size - left * TOKEN_DTYPE.itemsize)
    if (wrong := np.flatnonzero(ids >= manifest.n_vocab)).size:
        raise UserError(
            f"Cannot show {path}: token {first + wrong[0]} is {ids[wrong[0]]}; expected ids below "
            f"{manifest.n_vocab}: the content changed."
        )
    return ids


def _text_lines(ids: np.ndarray, manifest: Manifest) -> list[str]:
    """Return the text of `ids`, without boundaries, in lines behind the margin."""
    text = load_tokenizer().decode(ids.tolist()) if _is_ours(manifest) else " ".join(map(str, ids))
    lines = []
    for line in text.split("\n"):
        line, width = harmless(line.expandtabs(4)), _columns() - len(_MARGIN)
        if any(unicodedata.east_asian_width(char) in "WF" for char in line):
            width //= 2  # Chinese and Japanese characters take two columns
        parts = textwrap.wrap(line, width, replace_whitespace=False, drop_whitespace=False, break_on_hyphens=False)
        lines += [(_MARGIN + part).rstrip(" ") for part in parts or [""]]
    return lines


def _columns() -> int:
    """The width of the terminal, at least 40; 100 without one."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def _check_dataset(run_dir: Path, folder: Path, manifest: Manifest) -> None:
    """Raise UserError unless the run's config.json names this dataset."""
    path = run_dir / "config.json"
    try:
        dataset = json.loads(path.read_text(encoding="utf-8", errors="replace"))["dataset"]
        name, sha256 = harmless(str(dataset["name"])), harmless(str(dataset["manifest_sha256"])[:64])
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror}. Give the folder of a run, or the name of one in temp_data/runs."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"Cannot tell what {run_dir} trained on: {path} is damaged. Rerun it to rewrite it.") from None
    if sha256 != manifest.sha256:
        raise UserError(
            f"Cannot show what {run_dir} skipped: it trained on another dataset, {name}, whose manifest has sha256 "
            f"{sha256}; that of {folder} has {manifest.sha256}. Name its dataset with --out."
        )


def _skipped_steps(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the events of skipped steps in a metrics.jsonl, and the number of damaged lines."""
    events, unreadable = [], 0
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict):
                    unreadable += 1
                elif (record.get("kind"), record.get("name")) == ("event", "skipped step"):
                    events.append(record)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. A run writes it from its first step on.") from None
    return events, unreadable


def _window(folder: Path, manifest: Manifest, place: Any, n_ctx: int) -> list[str]:
    """Return the first lines of each document in a window; `place`: a shard and the number of its window."""
    try:
        index, window = place
        shard = manifest.shards[index]
        count = max(0, shard.tokens - 1) // n_ctx
        if type(window) is not int or not 0 <= window < count or index < 0:
            raise UserError(f"shard {index} has windows 0 to {count - 1}")
        lines = excerpt(folder, manifest, index, window * n_ctx, n_ctx + 1)
    except UserError as error:
        return [harmless(f"window {place} cannot be shown: {error}")]
    except (IndexError, TypeError, ValueError):
        expected = f"expected a shard, 0 to {len(manifest.shards) - 1}, and the number of its window"
        return [harmless(f"window {json.dumps(place)[:100]} cannot be shown: {expected}")]
    page = [harmless(f"window {window} of shard {index}: from token {window * n_ctx:,} of {shard.file}")]
    starts = [number for number, line in enumerate(lines) if line == BOUNDARY or number == 0]
    lines_each = _WINDOW_LINES // min(_WINDOW_DOCUMENTS, len(starts))
    for start, end in list(pairwise([*starts, len(lines)]))[:_WINDOW_DOCUMENTS]:
        page += lines[start : min(end, start + lines_each)]
        if end > start + lines_each:
            page.append(f"({end - start - lines_each:,} more line(s))")
    if len(starts) > _WINDOW_DOCUMENTS:
        page.append(f"({len(starts) - _WINDOW_DOCUMENTS:,} more document(s))")
    return page
