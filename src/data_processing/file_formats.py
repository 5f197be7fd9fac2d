"""Files of text -> batches of documents.

Bytes that are not UTF-8 arrive as lone surrogates (PEP 383): the writer replaces and counts them.
"""

import codecs
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from src.utils.errors import UserError, cause_of

EXTENSIONS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
BATCH_CHARS = 1 << 20
_ROWS = 64  # that are converted at once
# In characters, of which a token has 4. A book is many documents: some to validate on, the others to train on.
LONG_TEXT, PART_OF_LONG_TEXT = 1 << 16, 1 << 14
_JUDGED = 1 << 20  # bytes or characters at a text's beginning that tell its encoding: preflight reads little more
_ODD_BYTE = re.compile("[\udc80-\udcff]")  # as surrogateescape keeps it
# The longer marks first: UTF-16's begins UTF-32's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# How PDF, ZIP with the office formats, PNG, JPEG, gzip, zstd and parquet files begin. Others show by their zeros.
_BINARY = (b"%PDF-", b"PK\3\4", b"\x89PNG", b"\xff\xd8\xff", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")
_LFS_POINTER = re.compile(rb"\s*version https?://\S+\s+(ext-\S+ \S+\s+)*oid \w+:\w+\s+size \d+\s*")
_ANNEX_POINTER = re.compile(rb"/annex/objects/\S+\s*")
_CONVERT = "Convert it to UTF-8: iconv -f UTF-16LE -t UTF-8 FILE > NEW."


class Batch(NamedTuple):
    """Documents of one origin, about a million characters."""

    texts: list[str]
    path: Path | str


def read_batches(
    path: Path, text_field: str, skip: int = 0, divide_long: bool = False, most_bytes: int = -1
) -> Iterator[Batch]:
    """Yield the documents of one file without the first `skip` batches.

    A .txt or .md file is one document, or with `divide_long` perhaps several; `most_bytes` reads only its beginning.
    The others hold one a line or row, in the field `text_field`. The batches are the same every time. Raises UserError
    for a file that is damaged or has no such field.
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
            texts = _read_text(path, divide_long, most_bytes)
        else:
            texts = read.get(kind, _read_lines)(path, text_field)
        for batch in islice(batched(texts), skip, None):
            yield Batch(batch, path)
    except UserError:
        raise
    except (EOFError, OSError, ValueError, NotImplementedError, zlib.error) as error:  # pyarrow's are among them
        if kind == ".zst" and "too much memory" in str(error):  # its window exceeds pyarrow's 128 MiB
            new = shlex.quote(f"{path.with_suffix('').with_suffix('')}-small-window.jsonl.zst")
            raise UserError(
                f"Cannot read {path}: its zstd window is larger than 128 MiB. Compress it again and give that file: "
                f"zstd -dc --long=31 {shlex.quote(str(path))} | zstd -o {new}"
            ) from None
        raise UserError(
            f"Cannot read {path}: {cause_of(error)}. If the file is damaged, fetch it again, or leave it out."
        ) from None


def batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of about BATCH_CHARS characters."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text) + 1
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def column_texts(values: Any) -> list[str]:
    """Return the texts of an Arrow column: strings, large strings, views or categories of them."""
    import pyarrow as pa

    values = values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values
    # As bytes, because pyarrow refuses to hand over text that is not UTF-8.
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


def _parts(text: str) -> Iterator[str]:
    """Divide a text of more than LONG_TEXT characters at ends of paragraphs, or of lines where it has none.

    Each part has about PART_OF_LONG_TEXT characters; together they are the text, without the empty lines between them.
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


def _read_text(path: Path, divide_long: bool, most_bytes: int) -> Iterator[str]:
    """Read a file as a text, decoded from UTF-8, or from UTF-16 or UTF-32 with a mark; its line ends become "\\n"."""
    with open(path, "rb") as file:
        data, is_cut = file.read(most_bytes), bool(file.read(1))
    encoding = _encoding_of(data[:_JUDGED], path)
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape" if encoding == "utf-8" else "surrogatepass")
    try:
        text = decoder.decode(data.removeprefix(codecs.BOM_UTF8), final=not is_cut)
    except UnicodeDecodeError as error:
        raise UserError(
            f"Cannot read {path}: it begins with the mark of {encoding.upper()} and is damaged: {error.reason} at "
            f"byte {error.start:,}. Fetch it again, or convert it to UTF-8."
        ) from None
    # Some odd bytes are replaced and counted. So many are another encoding, unless zeros show that it is not text.
    judged = text[:_JUDGED]
    odd = 0 if judged.isascii() or "\0" in judged else len(_ODD_BYTE.findall(judged))
    if odd >= 100 and odd > len(judged) // 10:
        raise UserError(
            f"Cannot read {path}: {odd:,} of {len(judged):,} characters are not UTF-8. "
            "Convert it from its encoding: iconv -f LATIN1 -t UTF-8 FILE > NEW (iconv -l lists encodings)."
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield from _parts(text) if divide_long else [text]


def _encoding_of(head: bytes, path: Path) -> str:
    """Return the encoding of a text or its beginning, `head`, by its mark. Raises UserError if the mark is missing."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    share = [head[place::4].count(0) / max(1, len(head[place::4])) for place in range(4)]
    # Of each two or four bytes, the same ones are zero in most characters of UTF-16 and UTF-32, and others never.
    zeros = max(min(share[first], share[second]) for first, second in ((1, 3), (0, 2), (2, 3), (0, 1)))
    if zeros > 0.02 and min(share) <= 0.1 * zeros:
        raise UserError(f"Cannot read {path}: it looks like UTF-16 or UTF-32 without a mark. {_CONVERT}")
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

    with pa.OSFile(str(path)) as source:  # not mapped: a mapped file that shrinks meanwhile kills the process
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
