"""Documents -> token shards and their manifest.

python -m src.data_processing.data_downloader --source pydocs
python -m src.data_processing.data_downloader --source files --path my_texts --out my_text
python -m src.data_processing.data_downloader --source fineweb-edu --workers 16
python -m src.data_processing.data_downloader --verify --out my_text     (or --repair, or --inspect)
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from src import available_cores
from src.data_processing.document_shuffle import (
    DOWNLOADS,
    WORK,
    SortedDocuments,
    claimed_work,
    disk_needed,
    fill_buckets,
    plan_shards,
    resume,
    start_over,
    write_shards,
)
from src.data_processing.shards import (
    MANIFEST,
    Manifest,
    check_shard,
    ensure_verified,
    find_faults,
    read_manifest,
    shard_fault,
    stray_files,
    write_manifest,
)
from src.data_processing.text_sources import SOURCES, Request, Source, find_files, open_sources
from src.data_processing.tokenizer import Tokenizer
from src.utils.errors import BusyError, StorageError, UserError, exit_with, say
from src.utils.files import fingerprint, free_bytes, size_text, storage_errors, sync
from src.utils.root import dataset_dir, run_dir

_REPAIR_FOLDER = ".repairing"
_DEFAULT_WINDOWS = 4
# The options that go with each thing that is done to an existing dataset.
_TAKEN = {"verify": ("out",), "repair": ("out", "workers"), "inspect": ("out", "skipped", "windows")}


def main() -> None:
    args = _parse_arguments()
    start = time.monotonic()
    folder = dataset_dir(args.out)
    if args.inspect:
        from src.data_processing.inspect_dataset import inspect, inspect_skipped  # imports matplotlib

        result = inspect_skipped(folder, run_dir(args.skipped), args.windows) if args.skipped else inspect(folder)
        print(result.page)
        print(json.dumps(result.figures))
        return
    if args.verify:
        manifest = verify(folder)
    elif args.repair:
        manifest = repair(folder, args.workers)
    else:
        manifest = prepare(_request(args), folder, args.workers)
    counts = {name: manifest.counts[name] for name in ("documents", "tokens", "text_bytes")}
    seconds = round(time.monotonic() - start, 3)
    validation = {"validation_tokens": manifest.validation[0].tokens}
    shards = {"shards": len(manifest.shards), "seconds": seconds}
    print(json.dumps({"dataset": str(folder), **counts, **validation, **shards}))


def prepare(request: Request, folder: Path, workers: int, expected: Manifest | None = None) -> Manifest:
    """Return the dataset that `request` describes, in `folder`: the existing one, or a new one.

    With `expected`, the sources must be those of that manifest. Raises UserError, StorageError, or BusyError if
    another process prepares the same folder.
    """
    if os.path.exists(folder / MANIFEST):  # False, where Path.exists raises, for a folder that cannot be searched
        return _existing(request, folder)
    with ExitStack() as stack:
        work = stack.enter_context(claimed_work(folder))
        if (folder / MANIFEST).exists():  # since a moment ago
            return _existing(request, folder)
        details, journal = resume(folder, work, request)
        if journal is None or not journal.is_complete:
            say(f"preparing {folder} from {', '.join(request.sources)}")
            sources = open_sources(request, expected.sources if expected else details, work / DOWNLOADS)
            for source in sources:
                stack.callback(source.close)
            _refuse_changes([source.details for source in sources], expected)
            current = [source.details for source in sources]
            if journal is None or details != current:
                journal = start_over(folder, work, request, current, keep_downloads=details == current)
                details = current
            else:
                say(f"resuming after {journal.counts['tokens']:,} tokens")
            _check_disk(sources, request, folder)
            fill_buckets(sources, request, journal, workers)
        else:
            say(f"resuming {folder}: all documents are tokenised, {len(journal.shards)} shards are written")
        documents = SortedDocuments(journal, request.drop_duplicates, len(details))
        try:
            plans = plan_shards(documents.group_tokens, request.tokens_per_shard)
        except UserError as error:
            start_over(folder, work, request, details)  # nothing to resume from
            raise UserError(f"{error}; or raise the limit" if request.is_limited else str(error)) from None
        say(f"writing {len(plans)} shards")
        write_shards(documents, plans, folder, "+".join(request.sources), journal)
        write_manifest(folder, _manifest(request, details, documents, journal))
    if journal.replaced_in:
        files = ", ".join(f"{count} in {name}" for name, count in list(journal.replaced_in.items())[:5])
        say(
            f"invalid UTF-8 in {journal.counts['replaced_invalid']} document(s) was replaced by the character U+FFFD: "
            f"{files}; convert these files to UTF-8 if they are in another encoding"
        )
    return read_manifest(folder)


def verify(folder: Path) -> Manifest:
    """Return the manifest of the dataset in `folder` after reading every byte; raises UserError naming each fault."""
    manifest = read_manifest(folder)
    ensure_verified(folder, manifest, trust_stamp=False)
    if strays := stray_files(folder, manifest):
        say(strays)
    say(f"verified: {folder}")
    return manifest


def repair(folder: Path, workers: int) -> Manifest:
    """Replace the damaged shards of a dataset: it is prepared again inside its folder, and only those are moved.

    Raises UserError if the sources are not what they were, StorageError, or BusyError.
    """
    manifest = read_manifest(folder)
    faults = find_faults(folder, manifest, trust_stamp=False)
    again = folder / _REPAIR_FOLDER
    if faults:
        say("\n".join(faults.values()))
        damaged = [manifest.shards[number] for number in faults]
        if not all(shard_fault(again, shard, manifest.n_vocab, full=True) is None for shard in damaged):
            _prepare_again(manifest, again, workers)
        for shard in damaged:
            if fault := shard_fault(again, shard, manifest.n_vocab, full=True):
                raise UserError(
                    f"cannot repair {shard.file}: the sources give another shard ({fault}). Delete {folder} and "
                    "prepare the dataset again."
                )
        with storage_errors(folder):
            for shard in damaged:  # none before all are verified
                os.replace(again / shard.file, folder / shard.file)
            sync(folder)
        say(f"repaired {len(faults)} of {len(manifest.shards)} shards in {folder}")
    else:
        say(f"nothing to repair: {folder}")
    with storage_errors(again, "delete"), suppress(FileNotFoundError):
        shutil.rmtree(again)
    return manifest


def _prepare_again(manifest: Manifest, folder: Path, workers: int) -> None:
    try:
        request = Request.from_stored(manifest.request)
    except (TypeError, KeyError):
        raise UserError("cannot repair: another program made this dataset. Restore it from a copy.") from None
    if (folder / MANIFEST).exists():  # of a repair that did not help
        with storage_errors(folder, "delete"):
            shutil.rmtree(folder)
    try:
        prepare(request, folder, workers, expected=manifest)
    except UserError as error:
        raise UserError(f"cannot repair: {error}") from None


def _existing(request: Request, folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    _check_same_request(manifest, request, folder)
    for shard in manifest.shards:
        check_shard(folder, shard, manifest.n_vocab)
    if (folder / WORK).exists():  # its process was stopped between its last two steps
        with suppress(BusyError, StorageError), claimed_work(folder):
            pass
    say(f"already prepared: {folder}")
    return manifest


def _manifest(
    request: Request, details: Sequence[dict[str, Any]], documents: SortedDocuments, journal: Any
) -> Manifest:
    total = {name: int(getattr(documents, name).sum()) for name in ("documents", "tokens", "text_bytes")}
    sources = [
        {
            **entry,
            **{name: int(getattr(documents, name)[number]) for name in total},
            "share": round(float(documents.tokens[number]) / max(1, total["tokens"]), 6),
        }
        for number, entry in enumerate(details)
    ]
    counts = {
        **total,
        "documents_read": journal.counts["documents"] + journal.counts["skipped_empty"],
        "dropped_duplicates": journal.counts["documents"] - total["documents"],
        "skipped_empty": journal.counts["skipped_empty"],
        "replaced_invalid": journal.counts["replaced_invalid"],
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
        document_lengths=documents.lengths,
        shards=tuple(journal.shards),
    )


def _refuse_changes(details: Sequence[dict[str, Any]], expected: Manifest | None) -> None:
    """Raise UserError naming the first difference between sources and those of the manifest under repair."""
    if expected is None:
        return
    if len(details) != len(expected.sources):
        raise UserError(f"the dataset has {len(expected.sources)} sources, now there are {len(details)}")
    for now, then in zip(details, expected.sources, strict=True):
        for name in (name for name in now if now[name] != then.get(name)):
            change = f"{name} was {then.get(name)!r} and is {now[name]!r}"
            if name == "files":
                current, earlier = ({e["path"]: e["sha256"] for e in entry.get("files", ())} for entry in (now, then))
                path = min(path for path, _ in current.items() ^ earlier.items())
                change = f"{path} " + (
                    "is gone" if path not in current else "has changed" if path in earlier else "is new"
                )
            raise UserError(f"the source {now['name']} is not what it was: {change}")


def _check_disk(sources: Sequence[Source], request: Request, folder: Path) -> None:
    """Report the disk needed and free; raises StorageError if not even half of the estimate is free."""
    tokens = sum(source.estimated_tokens for source in sources)
    if request.max_documents is not None:
        tokens = min(tokens, request.max_documents * 1_100)  # FineWeb-Edu's mean
    if request.max_tokens is not None:
        tokens = min(tokens, request.max_tokens)
    needed, free = disk_needed(folder, tokens), free_bytes(folder)
    line = f"some {size_text(needed)} of disk needed, {size_text(free)} free at {folder}"
    if needed > 2 * free:
        raise StorageError(f"{line}; make room, choose another disk with --out or TEMP_DATA_DIR, or use --max-tokens")
    if needed > free or needed > 1e8:
        say(f"warning: {line}" if needed > free else line)


def _check_same_request(manifest: Manifest, request: Request, folder: Path) -> None:
    """Raise UserError if the dataset in `folder` is of another request, or its files have changed since."""
    existing, requested = manifest.request, request.stored()
    differences = [
        f"{name} is {existing.get(name)!r} there, {requested.get(name)!r} requested"
        for name in {**existing, **requested}
        if existing.get(name) != requested.get(name)
    ]
    if not differences and "files" in request.sources:
        differences = _changed_files(manifest, request.paths, (folder / MANIFEST).stat().st_mtime)
    if differences:
        raise UserError(
            f"{folder} holds another dataset: {'; '.join(differences)}; "
            "choose another --out (DATA_DIR for the launcher), or delete that folder to prepare it again"
        )


def _changed_files(manifest: Manifest, paths: list[str], prepared: float) -> list[str]:
    """List the differences between the files of the dataset and those that `paths` lead to now.

    By name and size; by content where a file was written to, or a link made, since the time `prepared`.
    """
    try:
        files = find_files(paths)[0]
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


def _request(args: argparse.Namespace) -> Request:
    return Request(
        sources=args.source,
        paths=[os.path.abspath(os.path.expanduser(path)) for path in args.path],
        text_field=args.text_field,
        tokens_per_shard=args.tokens_per_shard,
        seed=args.seed,
        max_documents=args.max_documents,
        max_tokens=args.max_tokens,
        drop_duplicates=args.drop_duplicates,
        dataset=args.dataset,
        config=args.config,
        split=args.split,
    )


def _parse_arguments() -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args()
    given = _given(vars(args))
    for mode in (mode for mode in _TAKEN if mode in given):
        if needless := [name for name in given if name not in (mode, *_TAKEN[mode])]:
            parser.error(f"{_options(needless)} would change nothing: --{mode} takes {_options(_TAKEN[mode])} only")
    sources = args.source or []
    if not sources and not (args.verify or args.repair or args.inspect):
        parser.error(f"--source is needed: {', '.join(SOURCES)}")
    if len(set(sources)) < len(sources):
        parser.error("--source names one source twice; several paths go behind one --path")
    empty = [name for name in ("skipped", "out", "dataset") if getattr(args, name) == ""]
    empty += ["path"] if "" in args.path else []
    if empty:
        parser.error(f"{_options(empty[:1])} is empty; perhaps a variable that is not set")
    needs_paths = [name for name in sources if SOURCES[name].needs_paths]
    if needs_paths and not args.path:
        parser.error(f"--source {needs_paths[0]} needs --path FILE_OR_GLOB ...")
    if args.path and not needs_paths:
        parser.error("--path is for --source files")
    if "hub" in sources and not args.dataset:
        parser.error("--source hub needs --dataset OWNER/NAME")
    if "hub" not in sources and (hub := [name for name in ("dataset", "config", "split") if name in given]):
        parser.error(f"{_options(hub[:1])} is for --source hub")
    if "text_field" in given and not {"files", "hub"} & set(sources):
        parser.error("--text-field is for --source files or hub")
    if args.skipped and not args.inspect:
        parser.error("--skipped is for --inspect")
    if "windows" in given and not args.skipped:
        parser.error("--windows is for --inspect --skipped RUN")
    args.out = args.out or _default_out(args)
    if not args.out:
        parser.error("--out DIR is needed: a name for the dataset, or a folder")
    return args


def _default_out(args: argparse.Namespace) -> str:
    """Return the dataset's name by its sources; empty if one of them has none."""
    names = [SOURCES[source].dataset_name for source in args.source or [""] if source in SOURCES]
    if not names or not all(names):
        return ""
    name = "+".join(names)
    for limit, unit in ((args.max_tokens, "tokens"), (args.max_documents, "documents")):
        name += f"-max-{limit}-{unit}" if limit else ""  # a trial must never pass for the whole
    return name


def _given(names: Iterable[str]) -> list[str]:
    """Return the options on the command line, even those with the default's value."""
    parser = _parser()
    parser.set_defaults(**dict.fromkeys(names))
    return [name for name, value in vars(parser.parse_args()).items() if value is not None]


def _options(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.data_processing.data_downloader",
        description="Turns documents into token shards for training: shuffled, tokenised with r50k_base, split into "
        "validation (shard 0) and training (the rest), with a manifest that says where they came from.",
        epilog="The result is one JSON object, the last line of stdout. Exit codes: 0 done, 2 bad input, 4 storage, "
        "5 another process is preparing the folder, 130 Ctrl-C. Rerun the same command to resume a preparation that "
        "was stopped, from the last 64M tokens.",
    )

    kinds = "; ".join(f"{name}: {kind.help}" for name, kind in SOURCES.items())
    names: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument(
        "--source",
        help=f"{kinds}; several are mixed, and the manifest has their shares",
        **names,
        choices=tuple(SOURCES),
    )
    parser.add_argument(
        "--path",
        help="for --source files: files, folders (searched to any depth) or patterns; .txt and .md are one document "
        "each; .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .arrow one a line or row",
        **names,
        default=[],
        metavar="FILE_OR_GLOB",
    )
    parser.add_argument("--dataset", help="for --source hub: the dataset's name on the hub", metavar="OWNER/NAME")
    parser.add_argument("--config", help="for --source hub: the dataset's configuration", metavar="NAME")
    parser.add_argument("--split", help="for --source hub: the dataset's split", metavar="NAME")
    parser.add_argument(
        "--text-field", help="field or column that holds the text (default: text)", default="text", metavar="NAME"
    )
    number: dict[str, Any] = {"type": _number_from(1), "metavar": "N"}
    taken = "take the first documents of the sources, of a hub dataset a random part, up to this many"
    parser.add_argument("--max-tokens", help=f"{taken} tokens (default: all)", **number)
    parser.add_argument("--max-documents", help=f"{taken} (default: all)", **number)
    parser.add_argument(
        "--drop-duplicates", help="keep one of documents that are equal to the byte", action="store_true"
    )
    parser.add_argument(
        "--out",
        help="folder of the dataset; a bare name means temp_data/datasets/NAME (default: a name by the source; needed "
        "for --source files and hub)",
        metavar="DIR",
    )
    parser.add_argument(
        "--workers",
        help="threads that tokenise; the result is the same for any number (default: one a core, %(default)s here)",
        default=available_cores(),
        **number,
    )
    parser.add_argument(
        "--tokens-per-shard",
        help="a shard holds at most this many tokens, or one longer document (default: %(default)s)",
        default=100_000_000,
        **number,
    )
    parser.add_argument(
        "--seed", help="seed of the shuffle (default: 42)", type=_number_from(0), default=42, metavar="N"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--verify", action="store_true", help="check the dataset in --out, every byte, and exit")
    modes.add_argument("--repair", action="store_true", help="replace the damaged shards of --out, and exit")
    modes.add_argument("--inspect", action="store_true", help="show the content of the dataset in --out, and exit")
    parser.add_argument(
        "--skipped", help="with --inspect: show the text behind the steps that this run skipped", metavar="RUN"
    )
    parser.add_argument(
        "--windows",
        help="with --skipped: windows shown of each step (default: %(default)s)",
        default=_DEFAULT_WINDOWS,
        **number,
    )
    return parser


def _number_from(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text.replace("_", ""))
        if not minimum <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is {'below ' + str(minimum) if value < minimum else 'too large'}")
        return value

    return number


if __name__ == "__main__":
    exit_with(main)
