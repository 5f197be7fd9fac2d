"""Sorted documents -> a dataset's shards: divided and written.

The documents' keys decide the order, so every document is equally likely to be anywhere, whatever order its
source has, and equal documents lie side by side, never on both sides of the split into validation and training.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from src.data_processing.document_sort import SortedDocuments
from src.data_processing.shards import Shard, check_names, write_shard
from src.utils.errors import UserError, say
from src.utils.files import replacing

# Validation is a twentieth of the corpus; of a small one more, up to a quarter, to measure anything at all.
_VALIDATION_SHARE = 20
_SMALL_VALIDATION_SHARE = 4
_USEFUL_VALIDATION_TOKENS = 16_384


@dataclass(frozen=True)
class ShardPlan:
    """The documents of a shard, by their numbers in the order of the keys."""

    ranges: tuple[tuple[int, int], ...]
    """From and to, usually one; two around the validation documents."""
    tokens: int


def plan_shards(documents: SortedDocuments, tokens_per_shard: int) -> list[ShardPlan]:
    """Divides the documents; validation first. A shard holds whole documents, at most `tokens_per_shard` tokens of
    them, or a longer one with those equal to it. Raises UserError where there are fewer than two different documents.
    """
    total = sum(int(records["tokens"].sum(dtype=np.int64)) for records in documents)
    share = max(total // _VALIDATION_SHARE, min(total // _SMALL_VALIDATION_SHARE, _USEFUL_VALIDATION_TOKENS))
    # Validation must not swallow a long document where a short one will do, so it begins with one that fits.
    limit = min(tokens_per_shard, share)
    begin = _first_fitting(documents, limit)
    validation = next(_cut(documents, limit, begin))
    [taken] = validation.ranges
    return [validation, *_cut(documents, tokens_per_shard, 0, leave_out=taken)]


def write_shards(
    documents: SortedDocuments, plans: Sequence[ShardPlan], folder: Path, prefix: str, journal: Path
) -> tuple[Shard, ...]:
    """Writes the planned shards into `folder`, but not those that `journal` lists from an earlier start.

    Tokens that no later shard needs are deleted on the way. Raises StorageError.
    """
    shards = read_journal(journal)
    if shards:
        say(f"going on after {len(shards)} shard(s) that are in {folder}")
    for index, plan in enumerate(plans):
        if index >= len(shards):
            shards.append(write_planned(documents, plan, folder, prefix, index))
            with replacing(journal) as file:
                file.write(json.dumps([asdict(shard) for shard in shards]).encode())
        if index:
            documents.forget(plan.ranges[0][0], plan.ranges[-1][1])
    return tuple(shards)


def read_journal(journal: Path) -> list[Shard]:
    """The shards that an earlier start wrote. Raises ValueError, KeyError or TypeError for a damaged journal."""
    shards = [Shard(**entry) for entry in json.loads(journal.read_bytes())] if journal.exists() else []
    check_names(shards)
    return shards


def write_planned(documents: SortedDocuments, plan: ShardPlan, folder: Path, prefix: str, index: int) -> Shard:
    """Writes shard `index`."""
    records = [documents.records[begin:end] for begin, end in plan.ranges]
    arrays = (tokens for begin, end in plan.ranges for tokens in documents.tokens(begin, end))
    file, sha256 = write_shard(folder, prefix, index, plan.tokens, arrays)
    return Shard(
        file,
        "train" if index else "validation",
        plan.tokens,
        sum(map(len, records)),
        sum(int(part["text_bytes"].sum(dtype=np.int64)) for part in records),
        sha256,
        first_key=key_text(records[0][0]),
        last_key=key_text(records[-1][-1]),
    )


def key_text(record: np.void) -> str:
    """The key of a document's record, as the manifest has it."""
    high, low = record["key"]
    return f"{int(high):016x}{int(low):016x}"


def _first_fitting(documents: SortedDocuments, limit: int) -> int:
    """The first document that fits into `limit` tokens together with those equal to it, or else the shortest."""
    shortest, shortest_at, groups, at = None, 0, 0, 0
    for records in documents:
        starts, tokens = _equal_documents(records)
        groups += len(starts)
        fitting = np.flatnonzero(tokens <= limit)
        if fitting.size:
            return at + int(starts[fitting[0]])
        if tokens.size and (shortest is None or tokens.min() < shortest):
            shortest, shortest_at = tokens.min(), at + int(starts[np.argmin(tokens)])
        at += len(records)
    if groups < 2:
        found = "no document" if groups == 0 else "one document"
        raise UserError(
            f"found {found} that isn't empty, repetitions not counted; at least two are needed, one to validate and "
            "one to train, because documents are not split: give more files, or divide a long text into the lines of "
            "a .jsonl file"
        )
    return shortest_at


def _cut(
    documents: SortedDocuments, limit: int, begin: int, leave_out: tuple[int, int] = (0, 0)
) -> Iterator[ShardPlan]:
    """Shards of at most `limit` tokens, from document `begin` on. Equal documents stay together."""
    ranges: list[tuple[int, int]] = []
    room, at = limit, 0
    for records in documents:
        starts, tokens = _equal_documents(records)
        starts, ends = starts + at, np.append(starts[1:], len(records)) + at
        at += len(records)
        used = (starts >= begin) & ((starts < leave_out[0]) | (starts >= leave_out[1]))
        starts, ends, tokens = starts[used], ends[used], tokens[used]
        total = np.cumsum(tokens)
        group = 0
        while group < len(starts):
            fitting = int(np.searchsorted(total, (total[group - 1] if group else 0) + room, side="right"))
            if fitting <= group and ranges:
                yield ShardPlan(tuple(ranges), limit - room)
                ranges, room = [], limit
                continue
            fitting = max(fitting, group + 1)
            ranges = _extended(ranges, starts[group:fitting], ends[group:fitting])
            room -= int(tokens[group:fitting].sum())
            group = fitting
    if ranges:
        yield ShardPlan(tuple(ranges), limit - room)


def _extended(ranges: list[tuple[int, int]], starts: np.ndarray, ends: np.ndarray) -> list[tuple[int, int]]:
    """`ranges` with more documents, of which there may be a gap somewhere."""
    gaps = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    for part_starts, part_ends in zip(np.split(starts, gaps), np.split(ends, gaps), strict=True):
        begin, end = int(part_starts[0]), int(part_ends[-1])
        if ranges and ranges[-1][1] == begin:
            begin = ranges.pop()[0]
        ranges = [*ranges, (begin, end)]
    return ranges


def _equal_documents(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of documents that have the same key: where each begins, and its tokens."""
    if not len(records):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    keys = records["key"]
    starts = np.flatnonzero(np.concatenate(([True], (keys[1:] != keys[:-1]).any(axis=1))))
    return starts, np.add.reduceat(records["tokens"].astype(np.int64), starts)
