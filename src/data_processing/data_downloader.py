"""Documents -> token shards and their manifest.

python -m src.data_processing.data_downloader --source pydocs
python -m src.data_processing.data_downloader --source files --path my_texts --out my_text
python -m src.data_processing.data_downloader --source fineweb-edu --workers 16
python -m src.data_processing.data_downloader --verify --out my_text     (or --repair, or --inspect)
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable

from src import available_cores
from src.data_processing.preparation import prepare
from src.data_processing.repair import repair, verify
from src.data_processing.request import Request
from src.utils.errors import exit_with
from src.utils.root import dataset_dir, run_dir

_DEFAULT_OUT = {"pydocs": "pydocs", "fineweb-edu": "fineweb-edu-sample-10BT"}
_DEFAULT_WINDOWS = 4
# What goes with each thing that is done to a dataset that is there.
_TAKEN = {"verify": ("out",), "repair": ("out", "workers"), "inspect": ("out", "skipped", "windows")}


def main() -> None:
    args = _parse_arguments()
    start = time.monotonic()
    folder = dataset_dir(args.out)
    if args.inspect:
        from src.data_processing.inspect_dataset import inspect, inspect_skipped

        found = inspect_skipped(folder, run_dir(args.skipped), args.windows) if args.skipped else inspect(folder)
        print(found.page)
        print(json.dumps(found.figures))
        return
    if args.verify:
        manifest = verify(folder)
    elif args.repair:
        manifest = repair(folder, args.workers)
    else:
        request = Request(
            sources=args.source,
            paths=[os.path.abspath(os.path.expanduser(path)) for path in args.path],
            text_field=args.text_field,
            tokens_per_shard=args.tokens_per_shard,
            seed=args.seed,
            max_documents=args.max_documents,
            max_tokens=args.max_tokens,
            drop_duplicates=args.drop_duplicates,
        )
        manifest = prepare(request, folder, args.workers)
    counts = {name: manifest.counts[name] for name in ("documents", "tokens", "text_bytes")}
    seconds = round(time.monotonic() - start, 3)
    validation = {"validation_tokens": manifest.validation[0].tokens}
    shards = {"shards": len(manifest.shards), "seconds": seconds}
    print(json.dumps({"dataset": str(folder), **counts, **validation, **shards}))


def _parse_arguments() -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args()
    given = _given(vars(args))
    is_there = args.verify or args.repair or args.inspect  # the dataset, already
    for mode in (mode for mode in _TAKEN if mode in given):
        if needless := [name for name in given if name not in (mode, *_TAKEN[mode])]:
            parser.error(f"{_options(needless)} would change nothing: --{mode} takes {_options(_TAKEN[mode])} only")
    if args.source is None and not is_there:
        parser.error("--source is needed: fineweb-edu, files or pydocs")
    if args.source and args.out is None and "files" not in args.source:
        args.out = "+".join(_DEFAULT_OUT[source] for source in args.source)
        for limit, unit in ((args.max_tokens, "tokens"), (args.max_documents, "documents")):
            args.out += f"-max-{limit}-{unit}" if limit else ""  # a trial must never pass for the whole
    if args.source and "files" in args.source and not args.path and not is_there:
        parser.error("--source files needs --path FILE_OR_GLOB ...")
    if args.skipped == "":
        parser.error("--skipped is empty; perhaps a variable that is not set")
    if args.skipped and not args.inspect:
        parser.error("--skipped is for --inspect")
    if "windows" in given and not args.skipped:
        parser.error("--windows is for --inspect --skipped RUN")
    if args.path and "files" not in (args.source or ()):
        parser.error("--path is for --source files")
    if "text_field" in given and "files" not in (args.source or ()):
        parser.error("--text-field is for --source files")
    if args.source and len(set(args.source)) < len(args.source):
        parser.error("--source names one source twice; several paths go behind one --path")
    if "" in args.path:
        parser.error("--path is empty; perhaps a variable that is not set")
    if not args.out:
        parser.error("--out DIR is needed: a name for the dataset, or a folder")
    return args


def _given(names: Iterable[str]) -> list[str]:
    """Those that stand on the command line, and be it with the value that is the default."""
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
        "5 another process is preparing the folder, 130 Ctrl-C. A preparation that was stopped goes on by the same "
        "command, from the last 32M tokens that were done.",
    )
    _add_source_arguments(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the dataset; a bare name means temp_data/datasets/NAME "
        "(default: pydocs or fineweb-edu-sample-10BT; needed for --source files)",
    )
    parser.add_argument(
        "--workers",
        type=_number_from(1),
        default=available_cores(),
        metavar="N",
        help="processes that tokenise; the result is the same for any number (default: one a core, %(default)s here)",
    )
    parser.add_argument(
        "--tokens-per-shard",
        type=_number_from(1),
        default=100_000_000,
        metavar="N",
        help="a shard holds at most this many tokens, or one longer document (default: %(default)s)",
    )
    parser.add_argument("--seed", type=_number_from(0), default=42, metavar="N", help="of the shuffle (default: 42)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--verify", action="store_true", help="check the dataset in --out, every byte, and exit")
    modes.add_argument(
        "--repair", action="store_true", help="make the damaged shards of --out anew from their source, and exit"
    )
    modes.add_argument(
        "--inspect", action="store_true", help="show what the dataset in --out holds, samples included, and exit"
    )
    parser.add_argument(
        "--skipped",
        metavar="RUN",
        help="with --inspect: show instead the text behind the steps that this run skipped, its name or folder",
    )
    parser.add_argument(
        "--windows",
        type=_number_from(1),
        default=_DEFAULT_WINDOWS,
        metavar="N",
        help="with --skipped: show this many windows of each step (default: %(default)s)",
    )
    return parser


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        nargs="+",
        action="extend",
        choices=("fineweb-edu", "files", "pydocs"),
        help="fineweb-edu: 10B tokens of educational web pages from the Hugging Face hub (some 28 GB); "
        "files: your own; pydocs: the documentation that comes with Python, NumPy and PyTorch, offline in seconds; "
        "several are mixed, and the manifest has their shares",
    )
    parser.add_argument(
        "--path",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE_OR_GLOB",
        help="for --source files: files, folders (searched to any depth) or patterns; "
        ".txt and .md are one document each; .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .arrow one a line or row",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="for --source files: field or column that holds the text, in files of lines or rows (default: text)",
    )
    parser.add_argument(
        "--max-tokens",
        type=_number_from(1),
        metavar="N",
        help="take no more documents than make up this many tokens: the first of the sources in their order, but of "
        "fineweb-edu a random part (default: all)",
    )
    parser.add_argument(
        "--max-documents",
        type=_number_from(1),
        metavar="N",
        help="take no more than this many, likewise (default: all)",
    )
    parser.add_argument(
        "--drop-duplicates", action="store_true", help="keep one of documents that are equal to the byte"
    )


def _number_from(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text.replace("_", ""))
        if not minimum <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is {'below ' + str(minimum) if value < minimum else 'too large'}")
        return value

    return number


if __name__ == "__main__":
    exit_with(main)
