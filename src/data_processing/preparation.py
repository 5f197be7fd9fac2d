"""A dataset is made: documents from their sources into a folder of shards.

Sources -> batches -> token ids (in processes) -> runs sorted by key (on disk) -> shards -> manifest. A preparation
that was stopped goes on behind the last whole run, or the last shard, and ends in the same bytes.
"""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from src.data_processing import text_sources
from src.data_processing.dataset_writer import plan_shards, read_journal, write_shards
from src.data_processing.document_sort import (
    SortedDocuments,
    find_damage,
    read_states,
    sort_documents,
)
from src.data_processing.request import Request
from src.data_processing.shards import (
    MANIFEST,
    TOKEN_DTYPE,
    Manifest,
    check_shard,
    read_manifest,
    shard_fault,
    write_manifest,
)
from src.data_processing.source_runs import encode_sources, open_sources
from src.data_processing.text_sources import Source
from src.data_processing.tokenizer import Tokenizer
from src.data_processing.work_folder import PLAN, claimed_work, remove_leftovers, start_over
from src.utils.errors import StorageError, UserError, say
from src.utils.files import bytes_below, fingerprint, free_bytes, replacing, size_text

# Changes where batches come to be divided differently: then unfinished work is begun anew.
_WORK_VERSION = 1
_JOURNAL = "shards.json"


def prepare(request: Request, folder: Path, workers: int) -> Manifest:
    """The dataset that `request` describes, in `folder`: the one that is there, or a new one.

    Raises UserError, StorageError, or BusyError where another process prepares the same folder.
    """
    if os.path.exists(folder / MANIFEST):  # False, where Path.exists raises, for a folder that cannot be searched
        return _existing(request, folder)
    with ExitStack() as stack:
        work = stack.enter_context(claimed_work(folder))
        if (folder / MANIFEST).exists():  # since a moment ago
            return _existing(request, folder)
        details = _encode_missing(request, folder, work, workers, stack)
        documents = sort_documents(work, request.drop_duplicates)
        try:
            plans = plan_shards(documents, request.tokens_per_shard)
        except UserError as error:  # nothing to go on with
            start_over(folder, work)
            raise UserError(f"{error}; or raise the limit" if request.is_limited else str(error)) from None
        say(f"writing {len(plans)} shards")
        counts, sources, lengths = _statistics(documents, details, read_states(work))
        shards = write_shards(documents, plans, folder, "+".join(request.sources), work / _JOURNAL)
        manifest = Manifest(
            sources=sources,
            request=request.stored(),
            tokenizer=Tokenizer.name,
            tokenizer_sha256=Tokenizer.sha256,
            n_vocab=Tokenizer.n_vocab,
            end_of_text=Tokenizer.end_of_text,
            seed=request.seed,
            counts=counts,
            document_lengths=lengths,
            shards=shards,
        )
        write_manifest(folder, manifest)
    if counts["replaced_invalid"]:
        say(f"invalid UTF-8 in {counts['replaced_invalid']} document(s) was replaced by the character U+FFFD")
    return read_manifest(folder)


def _existing(request: Request, folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    _check_same_request(manifest, request, folder)
    for shard in manifest.shards:
        check_shard(folder, shard, manifest.n_vocab)
    remove_leftovers(folder)
    say(f"already prepared: {folder}")
    return manifest


def _encode_missing(request: Request, folder: Path, work: Path, workers: int, stack: ExitStack) -> list[dict[str, Any]]:
    """Encodes all documents into `work`, or those that are missing there; returns the sources' details."""
    plan = {"version": _WORK_VERSION, "request": request.stored()}
    found = _read_plan(folder, work)
    begun = found if found and {name: found.get(name) for name in plan} == plan else None
    states = read_states(work) if begun else []
    if begun and states and states[-1]["complete"]:
        say(f"going on with {folder}: all documents are tokenised")
        return begun["sources"]
    say(f"preparing {folder} from {', '.join(request.sources)}")
    sources = open_sources(request, begun["sources"] if begun else [], work, stack)
    details = [source.details for source in sources]
    if begun and begun["sources"] == details:
        say(f"going on after {sum(state['tokens'] for state in states):,} tokens that are there")
    else:
        if found is not None:
            say("not what was begun here: starting over")
        start_over(folder, work)
        with replacing(work / PLAN) as file:
            file.write(json.dumps(plan | {"sources": details}).encode())
    _check_disk(sources, request, work)
    encode_sources(sources, request, work, workers)
    return details


def _read_plan(folder: Path, work: Path) -> dict[str, Any] | None:
    """What an earlier start set out to do; None where there was none, empty where what it left is damaged."""
    if not (work / PLAN).exists():
        return None
    journal = work / _JOURNAL
    try:
        plan = json.loads((work / PLAN).read_bytes())
        faults = (shard_fault(folder, shard, Tokenizer.n_vocab, full=True) for shard in read_journal(journal))
        damage = next(filter(None, faults), None) or find_damage(work, tokens_may_be_gone=journal.exists())
    except (ValueError, KeyError, TypeError) as error:
        damage = f"{work}: {error}"
    if damage is None:
        return plan
    say(f"what was there is damaged ({damage})")
    return {}


def _check_disk(sources: Sequence[Source], request: Request, work: Path) -> None:
    """Says what disk is needed and free; raises StorageError where it certainly won't do."""
    tokens = sum(source.estimated_tokens for source in sources)
    if request.max_documents is not None:
        tokens = min(tokens, request.max_documents * 1_100)  # FineWeb-Edu's mean
    if request.max_tokens is not None:
        tokens = min(tokens, request.max_tokens)
    needed = disk_needed(work.parent, tokens, sum(source.download_bytes for source in sources))
    free = free_bytes(work)
    line = f"some {size_text(needed)} of disk needed, {size_text(free)} free at {work.parent}"
    if needed > free and all(source.estimate_is_sure for source in sources):
        raise StorageError(f"{line}; make room, choose another disk with --out or TEMP_DATA_DIR, or use --max-tokens")
    if needed > free or needed > 1e8:
        say(f"warning: {line}" if needed > free else line)


def disk_needed(folder: Path, tokens: int, download_bytes: int) -> int:
    """Roughly the bytes that preparing `tokens` tokens in `folder` needs besides what an earlier start left there."""
    # The unsorted tokens, which go as the shards come, with an eighth for what is there twice meanwhile.
    needed = tokens * TOKEN_DTYPE.itemsize * 9 // 8 + download_bytes
    return max(0, needed - bytes_below(folder))


def _statistics(
    documents: SortedDocuments, details: Sequence[dict[str, Any]], states: Sequence[dict[str, Any]]
) -> tuple[dict[str, int], list[dict[str, Any]], list[int]]:
    """For the manifest: its counts, its sources and the lengths of the documents."""
    n_documents, tokens, text_bytes = (np.zeros(len(details), np.int64) for _ in range(3))
    lengths = np.zeros(33, np.int64)
    for records in documents:
        n_documents += np.bincount(records["source"], minlength=len(details))
        np.add.at(tokens, records["source"], records["tokens"].astype(np.int64))
        np.add.at(text_bytes, records["source"], records["text_bytes"].astype(np.int64))
        lengths += np.bincount(np.frexp(records["tokens"])[1] - 1, minlength=len(lengths))
    total = {"documents": int(n_documents.sum()), "tokens": int(tokens.sum()), "text_bytes": int(text_bytes.sum())}
    left_out = {name: sum(state[name] for state in states) for name in ("skipped_empty", "replaced_invalid")}
    read = total["documents"] + documents.dropped_duplicates + left_out["skipped_empty"]
    sources = [
        {
            **details[number],
            "documents": int(n_documents[number]),
            "tokens": int(tokens[number]),
            "text_bytes": int(text_bytes[number]),
            "share": round(float(tokens[number]) / max(1, total["tokens"]), 6),
        }
        for number in range(len(details))
    ]
    counts = {**total, "documents_read": read, "dropped_duplicates": documents.dropped_duplicates, **left_out}
    return counts, sources, np.trim_zeros(lengths, "b").tolist()


def _check_same_request(manifest: Manifest, request: Request, folder: Path) -> None:
    """Raises UserError where the dataset in `folder` was asked for differently, or its files have changed since."""
    there, asked = manifest.request, request.stored()
    differences = [
        f"{name} is {there.get(name)!r} there, {value!r} asked"
        for name, value in asked.items()
        if there.get(name) != value
    ]
    if not differences and "files" in request.sources:
        differences = _changed_files(manifest, request.paths, (folder / MANIFEST).stat().st_mtime)
    if differences:
        raise UserError(
            f"{folder} holds another dataset: {'; '.join(differences)}; "
            "choose another --out (DATA_DIR for the launcher), or delete that folder to prepare it anew"
        )


def _changed_files(manifest: Manifest, paths: list[str], prepared: float) -> list[str]:
    """What differs between the files of the dataset and those that `paths` lead to now.

    By name and size; by content where a file was written to, or a link made, since the time `prepared`.
    """
    try:
        files = text_sources.find_files(paths)[0]
        now = {str(path): path.stat() for path in files}
        changed = {str(path): max(path.stat().st_mtime, path.lstat().st_mtime) for path in files}
    except (UserError, OSError):
        return []  # gone since; the dataset stands without them
    then = {entry["path"]: entry for source in manifest.sources for entry in source.get("files", ())}
    changes = [f"{path} is new" for path in now if path not in then]
    for path, entry in then.items():
        if path not in now:
            changes.append(f"{path} is gone")
        elif now[path].st_size != entry["bytes"]:
            changes.append(f"{path} has {entry['bytes']} bytes there, {now[path].st_size} now")
        elif changed[path] > prepared and fingerprint(Path(path))["sha256"] != entry["sha256"]:
            changes.append(f"{path} has other content")
    return sorted(changes)
