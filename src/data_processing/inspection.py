"""What a dataset holds, on one page: its manifest as tables, how long its documents are, and a few of them to read.

All but the samples comes from manifest.json, so a dataset of any size is inspected in a second or two.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data_processing import document_lengths
from src.data_processing.excerpts import columns, is_ours, samples
from src.data_processing.shards import Manifest, Shard, read_manifest
from src.utils.errors import harmless
from src.utils.root import DATASETS

_MANY_SHARDS = 12  # more than these are not listed one by one
_MAX_BAR_COLUMNS = 40

Row = Sequence[str]


@dataclass(frozen=True)
class Inspection:
    """A page for people and the figures for programs."""

    page: str
    figures: dict[str, Any]
    """To be written as JSON: dataset (its folder), documents, tokens, text_bytes, bytes_per_token,
    validation_tokens, shards (their number), document_lengths (as in the manifest), picture (path or None)."""


def inspect(folder: Path) -> Inspection:
    """Looks into the dataset in `folder` and draws the lengths of its documents.

    The picture becomes NAME.lengths.png beside the folder, or in temp_data/datasets where it cannot be written
    there; where it can be written nowhere, the page says so. A damaged shard is noted on the page. Raises UserError
    where there is no dataset or its manifest is damaged.
    """
    manifest = read_manifest(folder)
    documents, tokens, text_bytes = _totals(manifest.shards)
    picture, picture_line = _write_picture(folder, manifest)
    sections = [
        _identity(folder, manifest),
        _sources(manifest),
        _whole(manifest),
        _splits(manifest),
        _shards(manifest),
        f"{_histogram(manifest)}\n{harmless(picture_line)}",
        "" if is_ours(manifest) else "The ids are another tokenizer's, so the samples show ids, not text.",
        *samples(folder, manifest),
    ]
    figures = {
        "dataset": str(folder),
        "documents": documents,
        "tokens": tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": round(text_bytes / max(1, tokens), 4),
        "validation_tokens": _totals(manifest.validation)[1],
        "shards": len(manifest.shards),
        "document_lengths": manifest.document_lengths,
        "picture": str(picture) if picture else None,
    }
    return Inspection("\n\n".join(section for section in sections if section), figures)


def _totals(shards: Sequence[Shard]) -> tuple[int, int, int]:
    """Documents, tokens and text bytes."""
    return sum(s.documents for s in shards), sum(s.tokens for s in shards), sum(s.text_bytes for s in shards)


def _write_picture(folder: Path, manifest: Manifest) -> tuple[Path | None, str]:
    """The picture's path, or None, and the page's line about it."""
    if not any(manifest.document_lengths):
        return None, "no picture: there is nothing to draw"
    png = document_lengths.draw(manifest.document_lengths, _totals(manifest.shards)[1], folder.name)
    faults = []
    for home in dict.fromkeys((folder.parent, DATASETS)):  # the dataset may be others', and not ours to write beside
        picture = home / f"{folder.name}.lengths.png"
        try:
            home.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(png)
            return picture, f"picture: {picture}"
        except OSError as error:
            faults.append(f"cannot write {picture}: {error.strerror}")
    return None, f"no picture: {'; '.join(faults)}"


def _identity(folder: Path, manifest: Manifest) -> str:
    rows = [
        ["dataset", str(folder)],
        ["manifest", f"sha256 {manifest.sha256}"],
        [
            "tokenizer",
            f"{manifest.tokenizer}, {manifest.n_vocab:,} ids, the end-of-text token is {manifest.end_of_text}",
        ],
        ["seed", str(manifest.seed)],
    ]
    return _table(rows, "ll")


def _sources(manifest: Manifest) -> str:
    _, tokens, _ = _totals(manifest.shards)
    rows = [["source", "documents", "tokens", "share", "from"]]
    for source in manifest.sources:
        counts = [source.get("documents"), source.get("tokens")]
        share = "" if counts[1] is None else f"{counts[1] / max(1, tokens):.1%}"
        numbers = ["" if count is None else f"{count:,}" for count in counts]
        rows.append([str(source.get("name")), *numbers, share, _origin(source)])
    return _table(rows, "lrrrl")


def _origin(source: dict[str, Any]) -> str:
    """Where a source's documents came from, as far as its kind says."""
    parts = [str(source[key]) for key in ("repository", "config") if source.get(key)]
    if source.get("revision"):
        parts.append(f"revision {source['revision']}")
    if source.get("files"):
        paths = [str(file["path"]) for file in source["files"]]
        place = "" if parts else f" in {os.path.commonpath(paths)}"
        parts.append(f"{len(paths):,} files{place}" if len(paths) > 1 else paths[0])
    parts += [f"{package} {version}" for package, version in source.get("packages", {}).items()]
    return ", ".join(parts)


def _whole(manifest: Manifest) -> str:
    documents, tokens, text_bytes = _totals(manifest.shards)
    counts = manifest.counts
    empty, repeated, invalid = (
        counts.get(name, 0) for name in ("skipped_empty", "dropped_duplicates", "replaced_invalid")
    )
    left_out = f"left out: {empty:,} empty, {repeated:,} duplicates; invalid UTF-8 replaced in {invalid:,}"
    rows = [
        ["documents", f"{documents:,}", left_out],
        ["tokens", f"{tokens:,}", ""],
        ["text bytes", f"{text_bytes:,}", ""],
        ["bytes a token", f"{text_bytes / max(1, tokens):.3f}", ""],
        ["tokens a document", f"{tokens / max(1, documents):,.1f}", _median(manifest.document_lengths)],
    ]
    return _table(rows, "lrl")


def _median(counts: Sequence[int]) -> str:
    if not any(counts):
        return ""
    middle = document_lengths.median(counts)
    shortest = 1 << int(middle).bit_length() - 1
    return f"the median about {middle:,.0f}, somewhere from {shortest:,} to {2 * shortest - 1:,}"


def _splits(manifest: Manifest) -> str:
    _, all_tokens, _ = _totals(manifest.shards)
    many = len(manifest.shards) > _MANY_SHARDS
    rows = [["split", "shards", "documents", "tokens", "share", "bytes a token"]]
    if many:
        rows[0] += ["smallest shard", "largest shard"]
    for name, shards in (("validation", manifest.validation), ("training", manifest.train)):
        documents, tokens, text_bytes = _totals(shards)
        share, ratio = tokens / max(1, all_tokens), text_bytes / max(1, tokens)
        rows.append([name, f"{len(shards):,}", f"{documents:,}", f"{tokens:,}", f"{share:.1%}", f"{ratio:.3f}"])
        if many:
            rows[-1] += [f"{extreme(shard.tokens for shard in shards):,}" for extreme in (min, max)]
    return _table(rows, "lrrrrrrr")


def _shards(manifest: Manifest) -> str:
    if len(manifest.shards) > _MANY_SHARDS:
        return ""
    rows = [["shard", "documents", "tokens", "bytes a token"]]
    for shard in manifest.shards:
        ratio = shard.text_bytes / max(1, shard.tokens)
        rows.append([shard.file, f"{shard.documents:,}", f"{shard.tokens:,}", f"{ratio:.3f}"])
    return _table(rows, "lrrr")


def _histogram(manifest: Manifest) -> str:
    if not any(manifest.document_lengths):
        return "the manifest does not say how long the documents are"
    _, tokens, _ = _totals(manifest.shards)
    heading = ["tokens a document", "documents", "share", "of tokens*", ""]
    room = columns() - sum(map(len, heading)) - 2 * len(heading)
    rows = document_lengths.rows(manifest.document_lengths, tokens, max(10, min(_MAX_BAR_COLUMNS, room)))
    return _table([heading, *rows], "rrrrl") + "\n* estimated from the counts and the number of all tokens"


def _table(rows: Sequence[Row], alignment: str) -> str:
    """`rows` in columns two spaces apart, each aligned to the left or the right as its letter, l or r, says."""
    cells = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        aligned = zip(row, widths, alignment, strict=False)
        lines.append(
            "  ".join(cell.ljust(width) if side == "l" else cell.rjust(width) for cell, width, side in aligned)
        )
    return "\n".join(line.rstrip() for line in lines)
