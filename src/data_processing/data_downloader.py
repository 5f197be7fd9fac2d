"""Documents -> token shards and their manifest.

python -m src.data_processing.data_downloader --source pydocs
python -m src.data_processing.data_downloader --source files --path my_texts --out my_text
python -m src.data_processing.data_downloader --source fineweb-edu --workers 16
python -m src.data_processing.data_downloader --verify --out my_text     (or --repair, or --inspect)
"""

import argparse
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from src import available_cores
from src.data_processing.document_shuffle import (
    DOWNLOADS,
    WORK,
    Journal,
    SortedDocuments,
    claimed_work,
    encode_sources,
    nothing_to_resume,
    start_over,
    write_shards,
)
from src.data_processing.inspect_dataset import excerpts, inspect
from src.data_processing.shards import (
    MANIFEST,
    TOKEN_DTYPE,
    Manifest,
    Shard,
    check_shard,
    ensure_verified,
    find_faults,
    read_manifest,
    shard_fault,
    stray_files,
    write_manifest,
)
from src.data_processing.text_sources import SOURCES, ChangedError, Request, Source, find_files
from src.data_processing.tokenizer import Tokenizer
from src.model_configs.arguments import Parser, between
from src.utils.errors import StorageError, UserError, cause_of, exit_with, print_result, say
from src.utils.files import bytes_below, fingerprint, free_bytes, size_text, storage_errors, sync
from src.utils.root import dataset_dir

_REPAIR_FOLDER = ".repairing"


def main() -> None:
    args = _parse_arguments()
    start = time.monotonic()
    folder = dataset_dir(args.out)
    if args.inspect:
        page, figures = excerpts(folder, args.at) if args.at else inspect(folder)
        print(page)
        print_result(figures)
        return
    if args.verify:
        manifest = read_manifest(folder)
        ensure_verified(folder, manifest, trust_stamp=False)
        if strays := stray_files(folder, manifest):
            say(strays)
        say(f"verified: {folder}")
    elif args.repair:
        manifest = repair(folder, args.workers)
    else:
        manifest = prepare(_request(args), folder, args.workers)
    counts = {name: manifest.counts[name] for name in ("documents", "tokens", "text_bytes")}
    shards = {"validation_tokens": manifest.validation[0].tokens, "shards": len(manifest.shards)}
    seconds = round(time.monotonic() - start, 3)
    print_result(
        {"dataset": str(folder), **counts, **shards, "seconds": seconds},
        f"dataset {folder}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, of which "
        f"{shards['validation_tokens']:,} for validation, in {shards['shards']} shards; {seconds:.1f} s",
    )


def prepare(request: Request, folder: Path, workers: int, expected: Manifest | None = None) -> Manifest:
    """Return the dataset that `request` describes, in `folder`: the existing one, or a new one.

    With `expected`, the sources must match that manifest. Raises UserError, StorageError, or BusyError if another
    process is preparing the same folder.
    """
    if os.path.exists(folder / MANIFEST):  # False for a folder that cannot be searched; Path.exists would raise
        return _existing(request, folder)
    with claimed_work(folder) as work:
        if (folder / MANIFEST).exists():  # another process has just finished
            return _existing(request, folder)
        journal = Journal.read(work, request)
        if journal and journal.is_complete:
            say(f"resuming {folder}: all documents are tokenised")
        else:
            say(f"preparing {folder} from {', '.join(request.sources)}")
            earlier = expected.sources if expected else journal.sources if journal else []
            sources: list[Source] = []
            for name in request.sources:
                pinned = [entry for entry in earlier if entry.get("name") == name]
                sources += SOURCES[name].open(request, pinned, work / DOWNLOADS)
            # Files are hashed again at each start. For the hub and for a repair, the pinned version counts.
            current = [source.details for source in sources]
            if expected and (changes := _changes(_content(expected.sources), _content(current))):
                raise UserError(f"the sources have changed: {changes}")
            if journal is None or journal.sources != current:
                journal = start_over(folder, work, request, current)
            elif journal.counts["tokens"]:
                say(f"resuming after {journal.counts['tokens']:,} tokens")
            needed, free = disk_needed(request, folder), free_bytes(folder)
            # Preflight requires all of it. Here a mirror of the hub may hold only part of the pinned files.
            if needed > free * (4 if any(SOURCES[name].uses_hub for name in request.sources) else 1):
                raise StorageError(
                    f"Cannot prepare {folder}: at least {size_text(needed)} of disk needed, {size_text(free)} free. "
                    "Make room, choose another disk with --out or TEMP_DATA_DIR, or use --max-tokens."
                )
            with nothing_to_resume(work, ChangedError):
                encode_sources(sources, request, journal, work, workers)
        documents = SortedDocuments(work, journal, request.drop_duplicates)
        with nothing_to_resume(work):  # too few documents
            shards = write_shards(documents, request, folder)
        # Last, because it makes the folder a dataset. The end of the block deletes the unfinished work.
        write_manifest(folder, _manifest(request, journal, documents, shards))
    if journal.replaced_in:
        say(
            f"warning: invalid UTF-8 in {journal.counts['replaced_invalid']} document(s) was replaced by U+FFFD: "
            f"{', '.join(f'{count:,} in {name}' for name, count in journal.replaced_in.items())}. If a file "
            "is in another encoding, convert it and prepare the dataset again: iconv -f LATIN1 -t UTF-8 FILE > NEW"
        )
    return read_manifest(folder)


def repair(folder: Path, workers: int) -> Manifest:
    """Replace the damaged shards of a dataset: prepare it again inside its folder, and move only those shards.

    Raises UserError if the sources have changed, StorageError, or BusyError.
    """
    manifest = read_manifest(folder)
    faults = find_faults(folder, manifest, trust_stamp=False)
    again = folder / _REPAIR_FOLDER
    if (again / MANIFEST).exists() or not faults:  # an earlier repair, whose shards may have been moved
        with storage_errors(again, "delete"), suppress(FileNotFoundError):
            shutil.rmtree(again)
    if not faults:
        say(f"nothing to repair: {folder}")
        return manifest
    say("\n".join(faults.values()))
    damaged, fields = [manifest.shards[number] for number in faults], dict(manifest.request)
    try:
        prepare(Request(fields.pop("source"), **fields), again, workers, expected=manifest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # another program may have written the request
        raise UserError(
            f"Cannot repair {folder}: {cause_of(error)}. Restore the sources, or the shards from a copy."
        ) from error
    for shard in damaged:
        if fault := shard_fault(again, shard, manifest.n_vocab, full=True):
            raise UserError(
                f"Cannot repair {shard.file}: the sources produce a different shard ({fault}). Delete {folder} and "
                "prepare the dataset again."
            )
    with storage_errors(folder):
        for shard in damaged:  # only after all are verified
            os.replace(again / shard.file, folder / shard.file)
        sync(folder)
        shutil.rmtree(again)
    say(f"repaired {len(faults)} of {len(manifest.shards)} shards in {folder}")
    return manifest


def disk_needed(request: Request, folder: Path) -> int:
    """Estimate the minimum bytes that preparing `request` in `folder` still needs; 0 if unknown."""
    limits = (request.max_tokens or math.inf, (request.max_documents or math.inf) * 1_100)  # FineWeb-Edu's mean
    tokens = int(min(sum(SOURCES[name].tokens(request) for name in request.sources), *limits))
    # Two copies, one as sorted stretches and one as shards, and an eighth of one for records.
    return max(0, tokens * TOKEN_DTYPE.itemsize * 17 // 8 - bytes_below(folder))


def _existing(request: Request, folder: Path) -> Manifest:
    """Return the manifest of `folder`. Raises UserError for a different request, changed files or a damaged shard."""
    manifest = read_manifest(folder)
    refuse_other(request, folder, manifest)
    for shard in manifest.shards:
        check_shard(folder, shard, manifest.n_vocab)
    # Left by a process that was killed between its last two steps. Another process that holds it also deletes it.
    shutil.rmtree(folder / WORK, ignore_errors=True)
    say(f"already prepared: {folder}")
    return manifest


def refuse_other(request: Request, folder: Path, manifest: Manifest) -> None:
    """Raise UserError if the dataset in `folder` is not the one that `request` describes."""
    if changes := differences(request, folder, manifest):
        raise UserError(
            f"Cannot prepare {folder}: it holds another dataset: {changes}. Choose another --out (DATA_DIR for the "
            f"launcher), delete that folder to prepare it again, or train on it with --data.dir {folder.name}."
        )


def differences(request: Request, folder: Path, manifest: Manifest) -> str:
    """Describe how the dataset in `folder` differs from the one that `request` describes; empty for no difference.

    Files are compared by name and size, and also by content if they were written or linked since the preparation.
    """
    changes = _changes(manifest.request, request.stored())
    if changes or "files" not in request.sources:
        return changes
    then = {entry["path"]: entry for source in manifest.sources for entry in source.get("files", ())}
    now: dict[str, Any] = {}
    with suppress(UserError, OSError):  # files deleted since the preparation: the dataset no longer needs them
        for path in chain(*find_files(request.paths).values()):
            now[str(path)] = entry = {"path": str(path)} | then.get(str(path), {})
            written = max(path.stat().st_mtime, path.lstat().st_mtime)
            if path.stat().st_size != entry.get("bytes") or written > (folder / MANIFEST).stat().st_mtime:
                entry.update(fingerprint(path))
        changes = _changes(_content([{"files": then.values()}]), _content([{"files": now.values()}]))
    return changes


def _content(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Map the path of each file to the start of its hash, and each package to its version."""
    content: dict[str, Any] = {}
    for source in sources:
        content.update({entry["path"]: f"sha256 {entry['sha256'][:12]}..." for entry in source.get("files", ())})
        content.update(source.get("packages", {}))
    return content


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the differences; empty for none."""
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    described = []
    for name in changed[:5]:
        old, new = (values.get(name, "absent") for values in (then, now))
        old, new = (", ".join(value) if isinstance(value, list) else value for value in (old, new))
        change = f"was {'none' if old in (None, '') else old}, is {'none' if new in (None, '') else new}"
        if name.startswith("/") and "absent" in (old, new):  # a file
            change = "is new" if old == "absent" else "is gone"
        described.append(f"{name} {change}")
    return "; ".join(described + ([f"and {len(changed) - 5} more"] if len(changed) > 5 else []))


def _manifest(request: Request, journal: Journal, documents: SortedDocuments, shards: tuple[Shard, ...]) -> Manifest:
    def totals(records: np.ndarray) -> dict[str, int]:
        return {"documents": len(records)} | {name: int(records[name].sum()) for name in ("tokens", "text_bytes")}

    records, read, total = documents.records, journal.counts, totals(documents.records)
    sources: list[dict[str, Any]] = []
    for number, entry in enumerate(journal.sources):
        own = totals(records[records["source"] == number])  # without dropped duplicates, like the counts of shards
        sources.append(entry | own | {"share": round(own["tokens"] / max(1, total["tokens"]), 6)})
    counts = {
        **total,
        "documents_read": read["documents"] + read["skipped_empty"],
        "dropped_duplicates": read["documents"] - total["documents"],
        "skipped_empty": read["skipped_empty"],
        "replaced_invalid": read["replaced_invalid"],
    }
    return Manifest(
        sources=sources,
        request=request.stored(),
        tokenizer=Tokenizer.name,
        tokenizer_sha256=Tokenizer.sha256,
        n_vocab=Tokenizer.n_vocab,
        end_of_text=Tokenizer.end_of_text,
        seed=request.seed,
        counts=counts,
        document_lengths=np.bincount(np.frexp(records["tokens"])[1] - 1).tolist(),  # by floor(log2)
        shards=shards,
    )


def _parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m src.data_processing.data_downloader",
        description="Turns documents into token shards for training: shuffled, tokenised with r50k_base, split into "
        "validation (shard 0) and training (the rest), with a manifest that says where they came from.",
        epilog="The result is one JSON object, the last line of stdout, or text on a terminal. Exit codes: 0 done, 2 "
        "bad input, 4 storage, 5 another process is preparing the folder, 130 Ctrl-C. Rerun the same command to "
        "resume a stopped preparation; at most its last 64M tokens are repeated.",
    )
    kinds = "; ".join(f"{name}: {kind.help}" for name, kind in SOURCES.items())
    taken = "take the first documents of the sources, or a random part of a hub dataset, up to this many"
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    count: dict[str, Any] = {"type": between(1, 10**15), "metavar": "N"}
    add, modes = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--source", **several, choices=tuple(SOURCES), help=f"{kinds}; several are combined in the given order")
    help = (
        "for --source files: files, folders (searched to any depth) or patterns; .txt and .md are one document each, "
        "or several above 65,536 characters; "
    )
    help += ".jsonl, .jsonl.gz, .jsonl.zst, .parquet and .arrow have one per line or row"
    add("--path", **several, default=[], metavar="FILE_OR_GLOB", help=help)
    add("--dataset", metavar="OWNER/NAME", help="for --source hub: the dataset's name on the hub")
    add("--config", metavar="NAME", help="for --source hub: the dataset's configuration")
    add("--split", metavar="NAME", help="for --source hub: the dataset's split")
    help = "field or column that holds the text (%(default)s)"
    add("--text-field", metavar="NAME", default=Request.text_field, help=help)
    add("--max-tokens", **count, help=f"{taken} tokens (default: all)")
    add("--max-documents", **count, help=f"{taken} (default: all)")
    add("--drop-duplicates", action="store_true", help="keep one copy of byte-identical documents")
    help = "folder of the dataset; a bare name means temp_data/datasets/NAME (default: named after the source)"
    add("--out", metavar="DIR", help=help)
    help = "processes that tokenise; the result is the same for any number (default: one per core, %(default)s)"
    add("--workers", type=between(1, 1_024), metavar="N", default=available_cores(), help=help)
    help = "a shard holds at most this many tokens, or one longer document (default: %(default)s)"
    add("--tokens-per-shard", **count, default=Request.tokens_per_shard, help=help)
    help = "seed of the shuffle (default: %(default)s)"
    add("--seed", type=between(0, 2**63 - 1), metavar="N", default=Request.seed, help=help)
    modes.add_argument("--verify", action="store_true", help="check the dataset in --out, every byte, and exit")
    modes.add_argument("--repair", action="store_true", help="replace the damaged shards of --out, and exit")
    modes.add_argument("--inspect", action="store_true", help="show the content of the dataset in --out, and exit")
    help = "with --inspect: show these tokens of a shard, such as 3:0-200, instead"
    add("--at", **several, default=[], metavar="SHARD:FIRST-END", help=help)
    args = parser.parse_args()
    sources = args.source or []
    if not (sources or args.verify or args.repair or args.inspect):
        raise UserError(
            "Cannot prepare a dataset: no text is named. Name files or folders: ./llm data my_texts/, "
            "which means --source files --path my_texts/. Or name a source: --source pydocs. --help lists all."
        )
    if "" in (*args.path, args.out, args.dataset):
        raise UserError("An option is empty. Perhaps it comes from a variable that is not set.")
    if bool(args.path) != ("files" in sources):
        raise UserError("--source files needs --path FILE_OR_GLOB ..., and --path is for --source files.")
    if bool(args.dataset) != ("hub" in sources):
        raise UserError("--source hub needs --dataset OWNER/NAME, and --dataset is for --source hub.")
    if args.at and not args.inspect:
        raise UserError("--at is for --inspect.")
    if not (args.out or sources):
        raise UserError("--out DIR is needed: the name of a dataset, or a folder.")
    args.out = args.out or _request(args).default_name
    if ".." in Path(args.out).parts:
        raise UserError(f"--out {args.out} contains '..'. Name the folder itself.")
    return args


def _request(args: argparse.Namespace) -> Request:
    fields = {field.name for field in dataclasses.fields(Request)} - {"sources", "paths"}
    paths = [os.path.abspath(os.path.expanduser(path)) for path in args.path]
    return Request(list(dict.fromkeys(args.source)), paths, **{name: getattr(args, name) for name in fields})


if __name__ == "__main__":
    exit_with(main)
