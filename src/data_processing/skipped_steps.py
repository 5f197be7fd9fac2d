"""The texts behind the steps that a run skipped, as its metrics.jsonl names them.

    {"kind": "event", "name": "skipped step", "step": 120, "detail": "loss nan, gradient norm nan", "n_ctx": 2048,
     "windows": [[1, 34], ...]}

A window is a shard, counted over all of manifest.shards, and a number: it holds the n_ctx + 1 tokens from token
number * n_ctx on. What a run's files say is not trusted: it may be damaged, and is escaped before it is shown.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from src.data_processing.excerpts import BOUNDARY, excerpt
from src.data_processing.inspection import Inspection
from src.data_processing.shards import Manifest, read_manifest
from src.utils.errors import UserError, harmless

_DOCUMENTS, _LINES = 4, 12  # shown of a window; its documents share the lines


def inspect_skipped(folder: Path, run_dir: Path, windows: int) -> Inspection:
    """The beginnings of the documents in up to `windows` windows of each step that the run in `run_dir` skipped.

    `folder` is the dataset that it trained on. The figures, to be written as JSON: run, dataset (their folders),
    skipped_steps, windows (recorded ones), unreadable_lines. A window that can't be shown says why on the page.
    Raises UserError where there is no such run or dataset, or where the run trained on another.
    """
    manifest = read_manifest(folder)
    if not run_dir.is_dir():
        raise UserError(f"there is no run directory {run_dir}; give a path, or the name of a run in temp_data/runs")
    _check_dataset(run_dir, folder, manifest)
    events, unreadable = _skipped_steps(run_dir / "metrics.jsonl")
    page = [harmless(f"{run_dir} skipped {f'{len(events):,} step(s)' if events else 'no step'}")]
    if unreadable:
        page.append(f"{unreadable:,} line(s) of its metrics.jsonl are damaged and were passed over")
    for event in events:
        page += _step(folder, manifest, event, windows)
    figures = {
        "run": str(run_dir),
        "dataset": str(folder),
        "skipped_steps": len(events),
        "windows": sum(len(_places(event)) for event in events),
        "unreadable_lines": unreadable,
    }
    return Inspection("\n\n".join(page), figures)


def _check_dataset(run_dir: Path, folder: Path, manifest: Manifest) -> None:
    """Raises UserError unless the run's config.json names this very dataset."""
    path = run_dir / "config.json"
    try:
        dataset = json.loads(path.read_text(encoding="utf-8", errors="replace"))["dataset"]
        name, sha256 = str(dataset["name"]), str(dataset["manifest_sha256"])
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; it says which dataset the run trained on. Is it a run directory?"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} is damaged: it does not say which dataset the run trained on; starting the run again rewrites it"
        ) from None
    if sha256 != manifest.sha256:
        raise UserError(
            f"{run_dir} trained on another dataset: {harmless(name)}, whose manifest has sha256 "
            f"{harmless(sha256[:64])}; that of {folder} has {manifest.sha256}. Name the run's dataset with --out"
        )


def _skipped_steps(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of skipped steps, in the order they were written, and the number of lines that are no objects."""
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
        raise UserError(f"cannot read {path}: {error.strerror}; a run writes it from its first step on") from None
    return events, unreadable


def _step(folder: Path, manifest: Manifest, event: dict[str, Any], windows: int) -> Iterator[str]:
    """The sections of a skipped step: what the run said of it, then its first windows."""
    heading = harmless(f"== step {event.get('step')}: {event.get('detail')}")
    places, n_ctx = _places(event), event.get("n_ctx")
    if not places or not _is_count(n_ctx) or n_ctx == 0:
        yield f"{heading}\nthe run did not record which windows these were"
        return
    which = f"{len(places):,} window(s) of {n_ctx:,} tokens"
    if len(places) > windows:
        which += f"; the first {windows:,} follow, --windows {len(places)} shows all"
    yield f"{heading}\n{which}"
    for place in places[:windows]:
        yield "\n".join(_window(folder, manifest, place, n_ctx))


def _places(event: dict[str, Any]) -> list[Any]:
    places = event.get("windows")
    return places if isinstance(places, list) else []


def _window(folder: Path, manifest: Manifest, place: Any, n_ctx: int) -> Iterator[str]:
    """A heading, and the first lines of the documents in the window; or why it cannot be shown."""
    if not (isinstance(place, list) and len(place) == 2 and all(map(_is_count, place))):
        yield harmless(f"cannot be shown: a window is a shard and a number, found {json.dumps(place)[:100]}")
        return
    index, window = place
    if index < len(manifest.shards):
        count = max(0, manifest.shards[index].tokens - 1) // n_ctx
        name = harmless(manifest.shards[index].file)
        if window >= count:
            yield f"cannot be shown: window {window} of shard {index}, {name}, which has {count:,} windows"
            return
    try:
        lines = excerpt(folder, manifest, index, window * n_ctx, n_ctx + 1).split("\n")
    except UserError as fault:
        yield harmless(f"cannot be shown: {fault}")
        return
    yield f"window {window} of shard {index}: from token {window * n_ctx:,} of {name}"
    starts = [number for number, line in enumerate(lines) if line == BOUNDARY or number == 0]
    each = _LINES // min(_DOCUMENTS, len(starts))
    for start, end in list(zip(starts, [*starts[1:], len(lines)], strict=True))[:_DOCUMENTS]:
        text = start + (lines[start] == BOUNDARY)
        yield from lines[start : min(text + each, end)]
        if end > text + each:
            yield f"({end - text - each:,} more line(s))"
    if len(starts) > _DOCUMENTS:
        yield f"({len(starts) - _DOCUMENTS:,} more document(s))"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
