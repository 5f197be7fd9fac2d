"""A dataset is checked, and its damaged shards are made anew from the sources."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from src.data_processing.dataset_writer import ShardPlan, write_planned
from src.data_processing.document_sort import SortedDocuments, sort_documents
from src.data_processing.encoding import KeyRange
from src.data_processing.request import Request
from src.data_processing.shards import SHARD_NAME, Manifest, Shard, read_manifest, stray_files
from src.data_processing.source_runs import encode_sources, open_sources
from src.data_processing.verification import ensure_verified, find_faults
from src.data_processing.work_folder import claimed_work, empty, remove_leftovers
from src.utils.errors import UserError, say
from src.utils.files import storage_errors, sync


def verify(folder: Path) -> Manifest:
    """The manifest of the dataset in `folder`, after reading every byte of it; raises UserError naming each fault."""
    manifest = read_manifest(folder)
    ensure_verified(folder, manifest, trust_stamp=False)
    if strays := stray_files(folder, manifest):
        say(strays)
    say(f"verified: {folder}")
    return manifest


def repair(folder: Path, workers: int) -> Manifest:
    """Makes the damaged shards of a dataset anew; the others stay as they are.

    Raises UserError where the sources are not what they were, StorageError, or BusyError.
    """
    manifest = read_manifest(folder)
    faults = find_faults(folder, manifest, trust_stamp=False)
    if not faults:
        remove_leftovers(folder)
        say(f"nothing to repair: {folder}")
        return manifest
    say("\n".join(faults.values()))
    with ExitStack() as stack:
        work = stack.enter_context(claimed_work(folder, keep_unfinished=False))
        empty(work)  # of an earlier repair
        documents = _read_again(manifest, [manifest.shards[index] for index in faults], work, workers, stack)
        for index in faults:
            _write_again(manifest, index, documents, work)
        with storage_errors(folder):
            for index in faults:  # none before all are made
                os.replace(work / manifest.shards[index].file, folder / manifest.shards[index].file)
            sync(folder)
    say(f"repaired {len(faults)} of {len(manifest.shards)} shards in {folder}")
    return manifest


def _read_again(
    manifest: Manifest, shards: Sequence[Shard], work: Path, workers: int, stack: ExitStack
) -> SortedDocuments:
    """The documents in the key ranges of `shards`, from the sources."""
    request = Request.from_stored(manifest.request)
    try:
        sources = open_sources(request, manifest.sources, work, stack)
    except UserError as error:
        raise UserError(f"cannot repair: {error}") from None
    if len(sources) != len(manifest.sources):
        raise UserError(f"cannot repair: there were {len(manifest.sources)} sources then, {len(sources)} are found now")
    for now, then in zip((source.details for source in sources), manifest.sources, strict=True):
        if changed := [name for name in now if now[name] != then.get(name)]:
            raise UserError(
                f"cannot repair from {then['name']}, which is not what it was: {_difference(now, then, changed[0])}; "
                "bring it back as it was, or delete the folder and prepare the dataset again"
            )
    # What a limit in tokens let through is known in documents, and these can be counted without their tokens.
    read = manifest.counts["documents"] + manifest.counts["dropped_duplicates"]
    request = replace(request, max_tokens=None, max_documents=read)
    encode_sources(sources, request, work, workers, wanted=[_key_range(shard) for shard in shards])
    return sort_documents(work, request.drop_duplicates)


def _write_again(manifest: Manifest, index: int, documents: SortedDocuments, work: Path) -> None:
    """Writes shard `index` into `work`; raises UserError where it does not come out as it was."""
    shard = manifest.shards[index]
    ranges = [_numbers(_key_range(shard), documents)]
    if index:  # the validation documents lie among those of training
        begin, end = _numbers(_key_range(manifest.shards[0]), documents)
        ranges = [(ranges[0][0], min(begin, ranges[0][1])), (max(end, ranges[0][0]), ranges[0][1])]
    ranges = [(begin, end) for begin, end in ranges if begin < end]
    tokens = sum(int(documents.records["tokens"][begin:end].sum()) for begin, end in ranges)
    name = SHARD_NAME.fullmatch(shard.file)
    assert name is not None, "read_manifest has checked this"
    again = None
    if tokens == shard.tokens:
        prefix = shard.file[: name.start(1) - len("_i_")]
        again = write_planned(documents, ShardPlan(tuple(ranges), tokens), work, prefix, index)
    if again != shard:
        found = f"{tokens} tokens" if again is None else f"{again.documents} documents with sha256 {again.sha256}"
        raise UserError(
            f"cannot repair {shard.file}: from the sources it would have {found}, expected {shard.tokens} tokens, "
            f"{shard.documents} documents, with sha256 {shard.sha256}; delete the folder and prepare the dataset again"
        )


def _numbers(keys: KeyRange, documents: SortedDocuments) -> tuple[int, int]:
    """From and to, of the documents in a range of keys."""
    high, low = documents.records["key"][:, 0], documents.records["key"][:, 1]
    ends = [tuple(np.frombuffer(key, ">u8").astype(np.uint64)) for key in keys]
    before = (high < ends[0][0]) | ((high == ends[0][0]) & (low < ends[0][1]))
    after = (high > ends[1][0]) | ((high == ends[1][0]) & (low > ends[1][1]))
    return int(before.sum()), len(high) - int(after.sum())


def _key_range(shard: Shard) -> KeyRange:
    return bytes.fromhex(shard.first_key), bytes.fromhex(shard.last_key)


def _difference(now: dict[str, Any], then: dict[str, Any], name: str) -> str:
    if name != "files":
        return f"{name} is {now[name]!r} now, {then.get(name)!r} then"
    here, there = ({entry["path"]: entry["sha256"] for entry in details.get("files", ())} for details in (now, then))
    path = min(path for path, _ in here.items() ^ there.items())
    return f"{path} has changed" if path in here and path in there else f"{path} is {'new' if path in here else 'gone'}"
