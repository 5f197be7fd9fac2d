"""Where documents come from: iterators of texts, nothing else.

Bytes that are not UTF-8 arrive as lone surrogates (PEP 383), so that whoever writes the text can replace and
count them. Packages that only one source needs are imported by that source.
"""

import glob
import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from src.data_processing import python_docs
from src.utils.errors import UserError

EXTENSIONS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
FINEWEB_EDU = ("HuggingFaceFW/fineweb-edu", "sample-10BT")
_HUB_TIMEOUT_S = 10
_OTHER_SOURCES = (
    "use text of your own with --source files --path FILE_OR_FOLDER, "
    "or the documentation on this machine with --source pydocs"
)


@dataclass(frozen=True)
class Source:
    """Texts, and what identifies them."""

    details: dict[str, Any]
    """For the manifest: the source's name, and package versions, files with their hashes, or the hub's revision."""
    texts: Iterator[str]
    """The documents, empty ones included, in an order that is the same every time. Can be read once."""


def pydocs() -> Source:
    """The documentation that comes with Python, NumPy and PyTorch, as installed here."""
    return Source({"name": "pydocs", "packages": python_docs.package_versions()}, python_docs.documents())


def files(paths: Sequence[str], text_field: str) -> Source:
    """Documents of the files that `find_files` finds, in order.

    A .txt or .md file is one document; .jsonl, .jsonl.gz and .parquet hold one a line or row, in the field
    `text_field`. Raises UserError, while iterating for what lies inside the files.
    """
    found, skipped = find_files(paths)
    return Source(
        {"name": "files", "files": [_describe(path) for path in found], "skipped_files": skipped},
        itertools.chain.from_iterable(_read(path, text_field) for path in found),
    )


def fineweb_edu(seed: int, max_documents: int | None) -> Source:
    """FineWeb-Edu's sample-10BT from the Hugging Face hub, or from the mirror that HF_ENDPOINT names.

    The whole sample is downloaded, some 28 GB, and kept in the hub's cache, unpacked as well. With `max_documents`
    little more is fetched than needed, through a shuffled buffer, so that the documents aren't all of one crawl.
    Raises UserError where the hub cannot be reached.
    """
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(
            f"--source fineweb-edu needs the package datasets ({error}); run: pip install datasets"
        ) from None
    repository, sample = FINEWEB_EDU
    try:
        revision = HfApi().dataset_info(repository, timeout=_HUB_TIMEOUT_S).sha
        streaming = max_documents is not None
        rows = datasets.load_dataset(repository, sample, split="train", revision=revision, streaming=streaming)
    except Exception as error:
        raise _hub_error(error) from error
    rows = rows.select_columns(["text"])
    if streaming:
        rows = rows.shuffle(seed=seed, buffer_size=10_000)
    details = {"name": "fineweb-edu", "repository": repository, "config": sample, "revision": revision}
    return Source(details, _hub_texts(rows))


def find_files(paths: Sequence[str]) -> tuple[list[Path], int]:
    """The files that `paths` name, sorted and each once, and how many others their folders hold.

    A path is a file, a folder, searched to any depth, or a glob pattern. Hidden files of a folder don't count.
    Raises UserError for a path that leads to no file and for a file of an unknown kind that is named itself.
    """
    found: set[Path] = set()
    skipped: set[Path] = set()
    for given in paths:
        matches = [given] if os.path.exists(given) else glob.glob(given, recursive=True)
        if not matches:
            what = "matches nothing" if glob.has_magic(given) else "does not exist"
            raise UserError(f"--path {given} {what} (seen from {Path.cwd()}); name a file, a folder or a pattern")
        known = 0
        for match in map(Path, matches):
            inside = list(_files_below(match)) if match.is_dir() else [match]
            readable = [path.absolute() for path in inside if path.name.endswith(EXTENSIONS)]
            if match.is_file() and not readable:
                raise UserError(f"--path {match}: expected a file ending in {', '.join(EXTENSIONS)}")
            known += len(readable)
            found.update(readable)
            skipped.update(path for path in inside if not path.name.endswith(EXTENSIONS))
        if not known:
            raise UserError(f"--path {given} holds no file ending in {', '.join(EXTENSIONS)}")
    return sorted(found), len(skipped)


def _files_below(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _describe(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend its permissions or leave it out") from None
    return {"path": str(path), "bytes": size, "sha256": digest.hexdigest()}


def _read(path: Path, text_field: str) -> Iterator[str]:
    if path.name.endswith((".txt", ".md")):
        yield path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    elif path.name.endswith(".parquet"):
        yield from _read_parquet(path, text_field)
    else:
        # Only "\n" ends a line: json takes care of the rest, and of no other line ends inside a text.
        opened: IO[str] = (gzip.open if path.name.endswith(".gz") else open)(
            path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n"
        )
        with opened as lines:
            try:
                yield from _read_json_lines(lines, path, text_field)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{path} is cut short or not gzip ({error}); fetch it again or leave it out") from None


def _read_json_lines(lines: IO[str], path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); every line must be one JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}: {line.strip()[:60]}")
        if text_field not in row:
            raise _missing_field(where, text_field, list(row))
        text = "" if row[text_field] is None else row[text_field]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {text_field!r} must hold text, found {json.dumps(text)[:60]}")
        yield text


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"reading {path} needs the package pyarrow; run: pip install pyarrow") from None
    try:
        file = pq.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise _missing_field(str(path), text_field, file.schema_arrow.names)
        kind = file.schema_arrow.field(text_field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column {text_field!r} must hold text, found type {kind}")
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            # As bytes, because pyarrow refuses to hand over text that is not UTF-8.
            for value in batch.column(0).cast(pa.large_binary()):
                yield (value.as_py() or b"").decode("utf-8", errors="surrogateescape")
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a sound parquet file ({error}); fetch it again or leave it out") from None


def _missing_field(where: str, text_field: str, fields: list[str]) -> UserError:
    named = ", ".join(fields) or "none"
    return UserError(f"{where}: no field {text_field!r}; fields found: {named}; choose one with --text-field NAME")


def _hub_texts(rows: Any) -> Iterator[str]:
    """The texts of a `datasets` dataset; a download that fails on the way is a UserError."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:
            raise _hub_error(error) from error
        if row is None:
            return
        yield row["text"] or ""


def _hub_error(error: Exception) -> UserError:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    reason = f"{type(error).__name__}: {str(error).strip() or 'no details'}".splitlines()[0][:200]
    return UserError(
        f"cannot get {FINEWEB_EDU[0]} ({FINEWEB_EDU[1]}) from {endpoint} ({reason}); check the connection, "
        f"name a mirror in HF_ENDPOINT, or {_OTHER_SOURCES}"
    )
