"""The request that describes a dataset, the registry of sources of documents, and text files as one source.

A source yields the same documents in the same order every time. It consists of units, such as files. An interrupted
preparation resumes after any batch of documents without reading earlier units.
Bytes that are not UTF-8 arrive as lone surrogates (PEP 383): the writer replaces and counts them.

To add a source, write a subclass of `Source` and a row of `SOURCES`. The command, the launcher, preflight and the
model card read that table.
"""

import codecs
import difflib
import glob
import gzip
import io
import json
import os
import re
import shlex
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from src import available_cores
from src.data_processing import python_docs
from src.utils.errors import UserError, cause_of, say
from src.utils.files import fingerprint, identity

EXTENSIONS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
_ROWS = 64  # converted at once
# In characters; a token has about 4. A book becomes many documents: some to validate on, the others to train on.
LONG_TEXT, PART_OF_LONG_TEXT = 1 << 16, 1 << 14
_JUDGED = 1 << 20  # the first bytes or characters decide the encoding: preflight reads little more
_ODD_BYTE = re.compile("[\udc80-\udcff]")  # as surrogateescape keeps it
# Byte order marks. The longer ones first: UTF-32's starts with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# First bytes of PDF, ZIP (and office), PNG, JPEG, gzip, zstd and parquet files. Zero bytes reveal other binary files.
_BINARY = (b"%PDF-", b"PK\3\4", b"\x89PNG", b"\xff\xd8\xff", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")
_LFS_POINTER = re.compile(rb"\s*version https?://\S+\s+(ext-\S+ \S+\s+)*oid \w+:\w+\s+size \d+\s*")
_ANNEX_POINTER = re.compile(rb"/annex/objects/\S+\s*")
_CONVERT = "Convert it to UTF-8: iconv -f UTF-16LE -t UTF-8 FILE > NEW."
# Text has about 4 to 4.6 bytes per token of r50k_base; compressed text is roughly 3 times as dense.
_BYTES_PER_TOKEN = 4
_COMPRESSION = {".gz": 3, ".zst": 3, ".parquet": 2}
_PYDOCS_TOKENS = 2_400_000  # Python 3.11 with NumPy 2.2 and PyTorch 2.13; other versions differ by a few percent
_HF_CACHE = re.compile(r"cache-.*\.arrow")
Pinned = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """The arguments that determine a dataset's content."""

    sources: list[str]
    """Names in SOURCES, in reading order."""
    paths: list[str]
    """For files: files, folders and patterns."""
    text_field: str = "text"
    """Field or column that holds the text, in files with lines or rows."""
    tokens_per_shard: int = 100_000_000
    """Maximum token ids in a shard, unless it holds one longer document."""
    seed: int = 42
    """Seed of the documents' order and of the random part of a hub dataset."""
    max_documents: int | None = None
    max_tokens: int | None = None
    """Maximum documents, and token ids in whole documents, to take; None: all."""
    drop_duplicates: bool = False
    """Keep one copy of byte-identical documents."""
    dataset: str | None = None
    """For hub: OWNER/NAME. Its config and split follow."""
    config: str | None = None
    split: str | None = None

    @property
    def is_limited(self) -> bool:
        """True if some documents may be left out."""
        return self.max_documents is not None or self.max_tokens is not None

    @property
    def default_name(self) -> str:
        """The dataset's name, from its sources and limits, so that a part is never mistaken for the whole."""
        own = {"files": name_of(self.paths), "hub": (self.dataset or "").replace("/", "_")}
        name = "+".join(own.get(source) or SOURCES[source].dataset_name for source in self.sources)
        for limit, unit in ((self.max_tokens, "tokens"), (self.max_documents, "documents")):
            name += f"-max-{limit}-{unit}" if limit else ""
        return name

    def stored(self) -> dict[str, Any]:
        """Return the request as the manifest stores it. Omits unused hub fields, like older manifests."""
        hub = ("dataset", "config", "split")
        fields = {name: value for name, value in asdict(self).items() if value is not None or name not in hub}
        return {"source": fields.pop("sources"), **fields}


class Source(ABC):
    """Documents in units, such as files."""

    details: dict[str, Any]
    """For the manifest: the name, and package versions, files with their hashes, or the hub's revision."""
    units: Sequence[str]
    """Their names, for messages."""

    def __init__(self, details: dict[str, Any], units: Sequence[str]) -> None:
        self.details, self.units = details, units

    @abstractmethod
    def texts(self, unit: int) -> Iterator[str]:
        """Yield the documents of a unit. Raises UserError for a faulty source, StorageError."""

    def check_unchanged(self) -> None:  # noqa: B027 (most sources cannot change)
        """Raise UserError if documents have changed since the source was opened. Called after the last batch."""


@dataclass(frozen=True)
class SourceKind:
    """A row of SOURCES."""

    dataset_name: str
    """Default folder of a dataset; "" if it depends on the request."""
    help: str
    open: Callable[[Request, Pinned, Path], list[Source]]
    """Open the sources of a request. `Pinned` has the details of the same sources from an earlier start or from the
    manifest under repair, or nothing. The path is a folder for downloads; it is deleted with the unfinished work."""
    tokens: Callable[[Request], int] = lambda _: 0
    """Return the minimum number of tokens, without a network, to estimate the disk space; 0 if unknown."""
    uses_hub: bool = False


def open_files(paths: Sequence[str], text_field: str, pinned: Pinned = ()) -> list["Files"]:
    """Open a source for each of `paths` that adds a file. Raises UserError.

    Long texts are divided, except those of a pinned dataset from an earlier version, which kept them whole.
    """
    divide = all("long_texts" in details for details in pinned)
    return [Files(path, files, text_field, divide) for path, files in find_files(paths).items() if files]


def name_of(paths: Sequence[str]) -> str:
    """Return a name for a dataset of the text in these files, folders and patterns."""
    names = []
    for path in (Path(os.path.abspath(os.path.expanduser(each))) for each in paths):
        while re.search(r"[*?\[]", str(path)) and not path.exists():
            path = path.parent
        extension = next((each for each in EXTENSIONS if path.name.lower().endswith(each)), "")
        name = path.name[: -len(extension)] if extension else path.name
        names.append(re.sub(r"[^\w.-]+", "_", name).strip("._-"))
    first, *rest = dict.fromkeys(name[:60] for name in names if name) or ["my_text"]
    name = "+".join([first, *rest]) if len(rest) < 3 else f"{first}+{len(rest)}-more"
    return name.encode()[:120].decode(errors="ignore")  # file systems count bytes


def find_files(paths: Sequence[str], quiet: bool = False) -> dict[str, list[Path]]:
    """Return the files that each of `paths` adds, sorted; a file with several paths or names counts once.

    A path is a file, a folder (searched to any depth) or a glob pattern. Hidden files in a folder are skipped. Files
    of other kinds are left out, with a line on stderr unless `quiet`. A link keeps its own name: its target in the
    Hugging Face cache is named by a hash. Raises UserError for a path that is missing, has no file of our kinds, or
    cannot be read.
    """
    files: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for given in dict.fromkeys(paths):
        matches = [given] if os.path.exists(given) else glob.glob(given, recursive=True)
        if not matches:
            close = difflib.get_close_matches(Path(given).name, SOURCES)
            raise UserError(
                f"Cannot find --path {given}, seen from {Path.cwd()}: it does not exist. Name a file, a folder or a "
                f"pattern{f', or the source {close[0]}' if close else ''}."
            )
        tops = [Path(match).absolute() for match in matches]
        inside = {path for top in tops for path in (_files_below(top) if top.is_dir() else [top])}
        readable = {path for path in inside if path.name.lower().endswith(EXTENSIONS) and path.is_file()}
        # The datasets package leaves intermediate results next to its data. They are read only if named directly.
        readable -= {path for path in readable if _HF_CACHE.fullmatch(path.name) and not os.path.isfile(given)}
        if not readable:
            raise UserError(f"Cannot read --path {given}: expected a regular file ending in {', '.join(EXTENSIONS)}.")
        for path in readable:
            try:
                str(path).encode()
            except UnicodeEncodeError:  # the manifest could not hold it
                raise UserError(f"Cannot use {str(path)!r}: its name is not UTF-8. Rename it.") from None
        if not quiet and (others := sorted(inside - readable)):
            say(f"left out {len(others)} file(s) of {given}, such as {others[0].name}")
        files[given] = []
        for path in sorted(readable):
            if (target := os.path.realpath(path)) not in seen:
                seen.add(target)
                files[given].append(path)
    return files


def read_texts(path: Path, text_field: str, divide_long: bool = False) -> Iterator[str]:
    """Yield the documents of one file.

    A .txt or .md file is one document, or several if it is long and `divide_long`. Other files hold one per line or
    row, in the field `text_field`. Raises UserError for a file that is damaged or has no such field.
    """
    kind, read = path.suffix.lower(), {".parquet": _read_parquet, ".arrow": _read_arrow}
    try:
        with open(path, "rb") as file:
            head = file.read(1_025)  # pointers are shorter
        if _LFS_POINTER.fullmatch(head):
            raise UserError(f"Cannot read {path}: it is a Git LFS pointer. Run git lfs pull to fetch the file.")
        if _ANNEX_POINTER.fullmatch(head):
            raise UserError(f"Cannot read {path}: it is a git-annex pointer. Run git annex get to fetch the file.")
        if kind in (".txt", ".md"):
            yield from _read_text(path, divide_long)
        else:
            yield from read.get(kind, _read_lines)(path, text_field)
    except UserError:
        raise
    except (EOFError, OSError, ValueError, NotImplementedError, zlib.error) as error:  # includes pyarrow's
        if kind == ".zst" and "too much memory" in str(error):  # its window exceeds pyarrow's 128 MiB
            new = shlex.quote(f"{path.with_suffix('').with_suffix('')}-small-window.jsonl.zst")
            raise UserError(
                f"Cannot read {path}: its zstd window is larger than 128 MiB. Compress it again and give that file: "
                f"zstd -dc --long=31 {shlex.quote(str(path))} | zstd -o {new}"
            ) from None
        raise UserError(
            f"Cannot read {path}: {cause_of(error)}. If the file is damaged, fetch it again, or leave it out."
        ) from None


def column_texts(values: Any) -> list[str]:
    """Return the texts of an Arrow column: strings, large strings, views or categories of them."""
    import pyarrow as pa

    values = values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values
    # As bytes, because pyarrow refuses to convert text that is not UTF-8.
    return [(value or b"").decode("utf-8", "surrogateescape") for value in values.cast(pa.large_binary()).to_pylist()]


def check_column(schema: Any, text_field: str, where: Path | str) -> None:
    """Raise UserError if the Arrow `schema` of `where` has no column `text_field` of text."""
    import pyarrow as pa

    if schema.names.count(text_field) != 1:
        raise _missing_field(str(where), text_field, schema.names)
    kind = schema.field(text_field).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind  # as pandas writes categories
    # Bytes are read as UTF-8. A column of nulls is text that this file happens to lack.
    names = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null"}
    if str(values) not in names:
        raise UserError(
            f"Cannot read {where}: column {text_field!r} must hold text, found type {kind}. Choose one of "
            f"{', '.join(schema.names)} with --text-field NAME."
        )


class PythonDocs(Source):
    """The documentation that comes with Python, NumPy and PyTorch, as installed here."""

    def __init__(self) -> None:
        super().__init__({"name": "pydocs", "packages": python_docs.package_versions()}, ["pydocs"])

    def texts(self, unit: int) -> Iterator[str]:
        return python_docs.documents()


class ChangedError(UserError):
    """A source changed while it was read, so the text may match neither version."""


class Files(Source):
    """The documents of one path that the user named: a file, or the files of a folder or pattern, in order."""

    def __init__(self, path: str, files: Sequence[Path], text_field: str, divide_long: bool = True) -> None:
        self._files, self._text_field, self._divide_long = files, text_field, divide_long
        self._identities = [identity(file) for file in files]  # before hashing, so that later changes show
        with ThreadPoolExecutor(available_cores()) as threads:  # hashing releases the GIL
            described = list(threads.map(_describe, files))
        details = {"name": "files", "path": path, "files": described} | (
            {"long_texts": "divided"} if divide_long else {}
        )
        super().__init__(details, list(map(str, files)))

    def texts(self, unit: int) -> Iterator[str]:
        # Checked before and after, because a file that is replaced and put back has its old content at the end.
        self._check_unchanged(unit)
        yield from read_texts(self._files[unit], self._text_field, self._divide_long)
        self._check_unchanged(unit)

    def check_unchanged(self) -> None:
        for unit in range(len(self._files)):
            self._check_unchanged(unit)

    def _check_unchanged(self, unit: int) -> None:
        path, before, now = self._files[unit], self._identities[unit], identity(self._files[unit])
        if now == before:
            return
        # A backup's hard link, chmod or touch changes only times. Then it is worth comparing the content.
        is_same_file = all(now.get(name) == before.get(name) for name in ("size", "inode"))
        if not is_same_file or _describe(path) != self.details["files"][unit]:
            raise ChangedError(
                f"Cannot use {path}: it changed while it was being prepared. Rerun once it no longer changes."
            )
        self._identities[unit] = now


def _open_hub(name: str, request: Request, pinned: Pinned, downloads: Path) -> list[Source]:
    from src.data_processing.hub_dataset import open_hub  # its import takes a second, and only the hub needs it

    return open_hub(name, request, pinned, downloads)


SOURCES: dict[str, SourceKind] = {
    "fineweb-edu": SourceKind(
        dataset_name="fineweb-edu-sample-10BT",
        help="10B tokens of educational web pages from the Hugging Face hub (about 28 GB)",
        open=partial(_open_hub, "fineweb-edu"),
        tokens=lambda _: 10_000_000_000,
        uses_hub=True,
    ),
    "hub": SourceKind(
        dataset_name="",
        help="any dataset of parquet files on the Hugging Face hub, named by --dataset",
        open=partial(_open_hub, "hub"),
        uses_hub=True,
    ),
    "files": SourceKind(
        dataset_name="",
        help="local files",
        open=lambda request, pinned, downloads: [*open_files(request.paths, request.text_field, pinned)],
        tokens=lambda request: sum(map(_least_tokens, chain(*find_files(request.paths, quiet=True).values()))),
    ),
    "pydocs": SourceKind(
        dataset_name="pydocs",
        help="the documentation that comes with Python, NumPy and PyTorch, offline in seconds",
        open=lambda request, pinned, downloads: [PythonDocs()],
        tokens=lambda request: _PYDOCS_TOKENS,
    ),
}


def _least_tokens(file: Path) -> int:
    # Half of a file's usual number.
    return file.stat().st_size * _COMPRESSION.get(file.suffix.lower(), 1) // (2 * _BYTES_PER_TOKEN)


def _files_below(root: Path) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders. Follows links, but visits each folder once."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"Cannot read the folder {error.filename}: {error.strerror}. Fix its permissions or leave it out."
        )

    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _describe(path: Path) -> dict[str, Any]:
    try:
        return {"path": str(path), **fingerprint(path)}
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Fix its permissions or leave it out.") from None


def _parts(text: str) -> Iterator[str]:
    """Divide a text of more than LONG_TEXT characters at ends of paragraphs, or of lines if it has none.

    Each part has about PART_OF_LONG_TEXT characters. Joined, they are the text without the empty lines between them.
    """
    begin, size = 0, PART_OF_LONG_TEXT
    while len(text) > LONG_TEXT and len(text) - begin > 2 * size:
        end = text.find("\n\n", begin + size, begin + 2 * size)
        end = end if end >= 0 else text.find("\n", begin + size)
        if end < 0:
            break
        yield text[begin:end]
        begin = end + len(text[end : end + size]) - len(text[end : end + size].lstrip("\n"))
    yield text[begin:]


def _read_text(path: Path, divide_long: bool) -> Iterator[str]:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Its line ends become "\\n"."""
    data = path.read_bytes()
    encoding = _encoding_of(data[:_JUDGED], path)
    errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"Cannot read {path}: it begins with {encoding.upper()}'s byte order mark but is damaged: {error.reason} "
            f"at byte {error.start:,}. Fetch it again, or convert it to UTF-8."
        ) from None
    # A few odd bytes are replaced and counted. This many mean another encoding, unless zeros show that it is not text.
    judged = text[:_JUDGED]
    odd = 0 if judged.isascii() or "\0" in judged else len(_ODD_BYTE.findall(judged))
    if odd >= 100 and odd > len(judged) // 10:
        raise UserError(
            f"Cannot read {path}: {odd:,} of {len(judged):,} characters are not UTF-8. "
            "Convert it: iconv -f ENCODING -t UTF-8 FILE > NEW, such as LATIN1 or SHIFT-JIS (iconv -l lists them)."
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield from _parts(text) if divide_long else [text]


def _encoding_of(head: bytes, path: Path) -> str:
    """Return the encoding of a text, or of its beginning, `head`. Raises UserError for a missing byte order mark."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    share = [head[place::4].count(0) / max(1, len(head[place::4])) for place in range(4)]
    # In most characters of UTF-16 and UTF-32, the same bytes of each two or four are zero, and others never are.
    zeros = max(min(share[first], share[second]) for first, second in ((1, 3), (0, 2), (2, 3), (0, 1)))
    if zeros > 0.02 and min(share) <= 0.1 * zeros:
        raise UserError(f"Cannot read {path}: it looks like UTF-16 or UTF-32 without a byte order mark. {_CONVERT}")
    if head.startswith(_BINARY) or head.count(0) > len(head) // 10:
        raise UserError(f"Cannot read {path}: it is a binary file, not text. Convert it to text, or leave it out.")
    return "utf-8"


def _read_lines(path: Path, text_field: str) -> Iterator[str]:
    kind = path.suffix.lower()
    with open(path, "rb") as file:
        lines: Any = gzip.GzipFile(fileobj=file) if kind == ".gz" else file
        if kind == ".zst":
            import pyarrow as pa

            lines = io.BufferedReader(pa.input_stream(file, compression="zstd"))
        # Only "\n" ends a line: json takes care of the rest, and of other line ends inside a text.
        for number, line in enumerate(lines, start=1):
            if number == 1:
                if (encoding := _encoding_of(line[:4096], path)) != "utf-8":
                    raise UserError(f"Cannot read {path}: it is {encoding.upper()} text. {_CONVERT}")
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _text_of(line.decode("utf-8", "surrogateescape"), f"{path}, line {number}", text_field)


def _text_of(line: str, where: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise UserError(f"Cannot read {where}: not JSON: {error}. Every line must be one JSON object.") from None
    if not isinstance(row, dict):
        raise UserError(f"Cannot read {where}: expected a JSON object, found {type(row).__name__}.")
    if text_field not in row:
        raise _missing_field(where, text_field, list(row))
    text = "" if row[text_field] is None else row[text_field]
    if not isinstance(text, str):
        shown = type(text).__name__ if isinstance(text, list | dict) else json.dumps(text)[:60]
        raise UserError(f"Cannot read {where}: field {text_field!r} must hold text, found {shown}.")
    return text


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        check_column(file.schema_arrow, text_field, path)
        for batch in file.iter_batches(_ROWS, columns=[text_field]):
            yield from column_texts(batch.column(0))


def _read_arrow(path: Path, text_field: str) -> Iterator[str]:
    """Read both forms of Arrow's IPC format: a file, and a stream as the package datasets writes it."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as source:  # not mapped: a mapped file that shrinks during the read kills the process
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        check_column(reader.schema, text_field, path)
        for table in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            values = table.column(text_field)
            for first in range(0, len(values), _ROWS):
                yield from column_texts(values.slice(first, _ROWS))


def _missing_field(where: str, text_field: str, fields: list[str]) -> UserError:
    return UserError(
        f"Cannot read {where}: expected one field {text_field!r}, found {', '.join(fields) or 'none'}. Choose one with "
        "--text-field NAME."
    )
