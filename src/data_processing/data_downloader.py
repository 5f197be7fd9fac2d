"""Documents -> token shards and their manifest.

python -m src.data_processing.data_downloader --source pydocs
python -m src.data_processing.data_downloader --source files --path my_texts --out my_text
python -m src.data_processing.data_downloader --source fineweb-edu --workers 16
python -m src.data_processing.data_downloader --verify --out my_text
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.data_processing import text_sources
from src.data_processing.dataset_writer import claimed, write_shards
from src.data_processing.encoding import EncodedBatch, encode_all
from src.data_processing.shards import MANIFEST, Manifest, check_shard, read_manifest, unlisted_files, write_manifest
from src.data_processing.tokenizer import Tokenizer
from src.utils.errors import UserError, exit_with
from src.utils.root import dataset_dir

_DEFAULT_OUT = {"pydocs": "pydocs", "fineweb-edu": "fineweb-edu-sample-10BT"}
_REPORT_EVERY_S = 10.0


@dataclass(frozen=True)
class Request:
    """The arguments that decide a dataset's content."""

    source: str
    paths: list[str]
    text_field: str
    tokens_per_shard: int
    seed: int
    max_documents: int | None


def prepare(request: Request, folder: Path, workers: int) -> Manifest:
    """The dataset that `request` describes, in `folder`: the one that is there, or a new one.

    Raises UserError, StorageError, or BusyError where another process prepares the same folder.
    """
    if os.path.exists(folder / MANIFEST):  # False, where Path.exists raises, for a folder that cannot be searched
        manifest = read_manifest(folder)
        _check_same_request(manifest, request, folder)
        for shard in manifest.shards:
            check_shard(folder, shard, manifest.n_vocab)
        _say(f"already prepared: {folder}")
        return manifest
    with claimed(folder):  # before the source is opened, which can be a long download
        _say(f"preparing {folder} from {request.source}")
        source = _open_source(request)
        texts = itertools.islice(source.texts, request.max_documents)
        batches = _reported(encode_all(texts, workers))
        shards, counts = write_shards(batches, folder, request.source, request.seed, request.tokens_per_shard)
        dataset = Manifest(
            sources=[source.details],
            request=asdict(request),
            tokenizer=Tokenizer.name,
            tokenizer_sha256=Tokenizer.sha256,
            n_vocab=Tokenizer.n_vocab,
            end_of_text=Tokenizer.end_of_text,
            seed=request.seed,
            counts=counts,
            document_lengths=[],
            shards=shards,
        )
        write_manifest(folder, dataset)
    if counts["replaced_invalid"]:
        _say(f"invalid UTF-8 in {counts['replaced_invalid']} document(s) was replaced by the character U+FFFD")
    return read_manifest(folder)


def verify(folder: Path) -> Manifest:
    """The manifest of the dataset in `folder`, after reading every byte of it; raises UserError naming each fault."""
    manifest = read_manifest(folder)
    faults = []
    for shard in manifest.shards:
        try:
            check_shard(folder, shard, manifest.n_vocab, full=True)
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError("\n".join([f"{len(faults)} of {len(manifest.shards)} shards are not as prepared:", *faults]))
    if strays := unlisted_files(folder, manifest):
        _say(f"ignored in {folder}, not part of the dataset: {', '.join(strays)}")
    _say(f"verified: {folder}")
    return manifest


def main() -> None:
    args = _parse_arguments()
    start = time.monotonic()
    folder = dataset_dir(args.out)
    if args.verify:
        manifest = verify(folder)
    else:
        paths = [os.path.abspath(os.path.expanduser(path)) for path in args.path]
        request = Request(args.source, paths, args.text_field, args.tokens_per_shard, args.seed, args.max_documents)
        manifest = prepare(request, folder, args.workers)
    counts = {name: manifest.counts[name] for name in ("documents", "tokens", "text_bytes")}
    seconds = round(time.monotonic() - start, 3)
    validation = {"validation_tokens": manifest.validation[0].tokens}
    shards = {"shards": len(manifest.shards), "seconds": seconds}
    print(json.dumps({"dataset": str(folder), **counts, **validation, **shards}))


def _parse_arguments() -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args()
    if args.out is None and args.source in _DEFAULT_OUT:
        subset = f"-first-{args.max_documents}-documents" if args.max_documents else ""
        args.out = _DEFAULT_OUT[args.source] + subset  # a trial must never pass for the whole
    if not args.verify and args.source is None:
        parser.error("--source is needed: fineweb-edu, files or pydocs")
    if args.source == "files" and not args.path and not args.verify:
        parser.error("--source files needs --path FILE_OR_GLOB ...")
    if args.source != "files" and args.path:
        parser.error("--path is for --source files")
    if args.out is None:
        parser.error("--out DIR is needed: a name for the dataset, or a folder")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.data_processing.data_downloader",
        description="Turns documents into token shards for training: shuffled, tokenised with r50k_base, split into "
        "validation (shard 0) and training (the rest), with a manifest that says where they came from.",
        epilog="The result is one JSON object, the last line of stdout. Exit codes: 0 done, 2 bad input, 4 storage, "
        "5 another process is preparing the folder. A preparation that was stopped is begun again by the same command.",
    )
    parser.add_argument(
        "--source",
        choices=("fineweb-edu", "files", "pydocs"),
        help="fineweb-edu: 10B tokens of educational web pages from the Hugging Face hub (some 28 GB); "
        "files: your own; pydocs: the documentation that comes with Python, NumPy and PyTorch, offline in seconds",
    )
    parser.add_argument(
        "--path",
        nargs="+",
        default=[],
        metavar="FILE_OR_GLOB",
        help="for --source files: files, folders (searched to any depth) or patterns; "
        ".txt and .md are one document each, .jsonl, .jsonl.gz and .parquet one document a line or row",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the dataset; a bare name means temp_data/datasets/NAME "
        "(default: pydocs or fineweb-edu-sample-10BT; needed for --source files)",
    )
    parser.add_argument(
        "--workers",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="processes that tokenise; the result is the same for any number (default: 1)",
    )
    parser.add_argument(
        "--tokens-per-shard",
        type=_at_least(1),
        default=100_000_000,
        metavar="N",
        help="a shard holds at most this many tokens, or one longer document (default: %(default)s)",
    )
    parser.add_argument("--seed", type=_at_least(0), default=42, metavar="N", help="of the shuffle (default: 42)")
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field or column of .jsonl and .parquet files that holds the text (default: text)",
    )
    parser.add_argument(
        "--max-documents", type=_at_least(1), metavar="N", help="stop reading after this many (default: read all)"
    )
    parser.add_argument("--verify", action="store_true", help="check the dataset in --out, every byte, and exit")
    return parser


def _at_least(minimum: int) -> Any:
    def number(text: str) -> int:
        value = int(text.replace("_", ""))
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        return value

    return number


def _check_same_request(manifest: Manifest, request: Request, folder: Path) -> None:
    """Raises UserError where the dataset in `folder` was asked for differently, or its files have changed since."""
    there, asked = manifest.request, asdict(request)
    differences = [
        f"{name} is {there.get(name)!r} there, {value!r} asked"
        for name, value in asked.items()
        if there.get(name) != value
    ]
    if not differences and request.source == "files":
        differences = _changed_files(manifest, request.paths)
    if differences:
        raise UserError(
            f"{folder} holds another dataset: {'; '.join(differences)}; "
            "choose another --out, or delete that folder to prepare it anew"
        )


def _changed_files(manifest: Manifest, paths: list[str]) -> list[str]:
    """What differs between the files of the dataset and those that `paths` lead to now, by name and size."""
    try:
        now = {str(path): path.stat().st_size for path in text_sources.find_files(paths)[0]}
    except (UserError, OSError):
        return []  # gone since; the dataset stands without them
    then = {entry["path"]: entry["bytes"] for entry in manifest.sources[0]["files"]}
    changed = sorted({path for path, _ in then.items() ^ now.items()})
    return [f"{path} has {then.get(path, 'no')} bytes there, {now.get(path, 'no')} now" for path in changed]


def _open_source(request: Request) -> text_sources.Source:
    if request.source == "pydocs":
        return text_sources.pydocs()
    if request.source == "files":
        return text_sources.files(request.paths, request.text_field)
    return text_sources.fineweb_edu(request.seed, request.max_documents)


def _reported(batches: Iterable[EncodedBatch]) -> Iterator[EncodedBatch]:
    """Passes `batches` on and tells stderr how far they are: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc="tokenising", unit=" tokens", unit_scale=True) as bar:
            for batch in batches:
                yield batch
                bar.update(batch.tokens.size)
        return
    documents = tokens = 0
    start = last = time.monotonic()
    for batch in batches:
        yield batch
        documents += batch.token_counts.size
        tokens += batch.tokens.size
        if (now := time.monotonic()) - last >= _REPORT_EVERY_S:
            _say(f"{documents:,} documents, {tokens:,} tokens, {tokens / (now - start):,.0f} tokens/s")
            last = now


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main)
