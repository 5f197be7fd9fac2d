"""Every kind of file gives its documents in batches, and any batch can be the first."""

import gzip
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.data_processing.file_formats import BATCH_CHARS, Batch, column_texts, read_batches
from src.utils.errors import UserError
from tests.data_processing.documents import some_texts, write_json_lines

TEXTS = ["short", "", *some_texts(4_000, words=250), "y" * 3_000_000, "last"]


def lines(path: Path) -> None:
    write_json_lines(path, TEXTS)


def gz(path: Path) -> None:
    """Two members in a row, as `cat a.gz b.gz` makes them."""
    data = write_json_lines(path, TEXTS).read_bytes()
    path.write_bytes(gzip.compress(data[:100_000], 1) + gzip.compress(data[100_000:], 1))


def zst(path: Path) -> None:
    data = write_json_lines(path, TEXTS).read_bytes()
    frames = [pa.compress(part, "zstd", asbytes=True) for part in (data[:100_000], data[100_000:])]
    path.write_bytes(b"".join(frames))


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), path, row_group_size=1_500)


def parquet_of_categories(path: Path) -> None:
    """As pandas writes them."""
    pq.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), path, row_group_size=1_500)


def parquet_of_views(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.string_view())}), path, row_group_size=1_500)


def arrow_file_of_categories(path: Path) -> None:
    table = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2_500)


def arrow_stream_of_views(path: Path) -> None:
    table = pa.table({"text": pa.array(TEXTS, pa.string_view())})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2_500)


def arrow_file(path: Path) -> None:
    table = pa.table({"text": TEXTS})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2_500)


def arrow_stream(path: Path) -> None:
    table = pa.table({"text": pa.array(TEXTS, pa.large_string())})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1_000)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lines),
        ("a.JSONL.GZ", gz),
        ("a.jsonl.zst", zst),
        ("a.parquet", parquet),
        ("c.parquet", parquet_of_categories),
        ("d.parquet", parquet_of_views),
        ("a.arrow", arrow_file),
        ("c.arrow", arrow_file_of_categories),
        ("d.arrow", arrow_stream_of_views),
        ("b.arrow", arrow_stream),
    ],
)
def test_batches_of_about_a_mebibyte_from_any_of_them_on(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    write(path)
    batches = list(read_batches(path, "text"))
    texts = [batch.texts for batch in batches]
    assert list(chain.from_iterable(texts)) == TEXTS
    assert len(batches) >= 4
    ordinary = [size_of(documents) for documents in batches]
    assert sorted(ordinary)[-2] < 3 * BATCH_CHARS, "only the batch with the long document is long"
    for skip in (1, len(batches) - 1, len(batches)):
        assert [batch.texts for batch in read_batches(path, "text", skip)] == texts[skip:]


def test_lines_keep_their_numbers_over_batches(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10_000, words=60))
    with open(path, "a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match="line 10001: not JSON"):
        list(read_batches(path, "text"))


def test_categories_of_numbers_are_not_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([1, 2]).dictionary_encode()}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'text' must hold text, found type int64"):
        list(read_batches(tmp_path / "a.parquet", "text"))


def test_categories_that_are_not_utf8_become_lone_surrogates() -> None:
    text = pa.Array.from_buffers(pa.binary(), 1, pa.array([b"caf\xe9"]).buffers()).view(pa.string())
    for column in (text.dictionary_encode(), text.cast(pa.string_view())):
        assert column_texts(column) == ["caf\udce9"]


def test_a_file_that_is_not_arrow_or_zstd_is_named(tmp_path: Path) -> None:
    for name in ("a.arrow", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 10)
        with pytest.raises(UserError, match=str(tmp_path / name)):
            list(read_batches(tmp_path / name, "text"))


def size_of(documents: Batch) -> int:
    return sum(len(text) for text in documents.texts)


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize(
    "text", ["A letter to a friend,\nwith caf\xe9.", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!\n"]
)
def test_text_in_other_encodings_is_decoded_or_refused(tmp_path: Path, encoding: str, text: str) -> None:
    """Text with a mark is decoded, lines of JSON are in UTF-8 only."""
    has_mark = encoding in ("utf-8-sig", "utf-16", "utf-32")
    path = write_json_lines(tmp_path / "b.jsonl", [text])
    path.write_bytes(path.read_text().encode(encoding))
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    for file, is_read in ((tmp_path / "a.txt", has_mark), (path, encoding == "utf-8-sig")):
        if is_read:
            assert [batch.texts for batch in read_batches(file, "text")] == [[text]]
        else:
            with pytest.raises(UserError, match=rf"Cannot read {file}: it .*UTF-.* Convert it to UTF-8: iconv"):
                list(read_batches(file, "text"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_git_lfs_pointer_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=rf"Cannot read {tmp_path / name}: it is a Git LFS pointer. Run git lfs pull"):
        list(read_batches(tmp_path / name, "text"))


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_columns_of_bytes_and_of_nulls_are_text(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["one", None, "caf\xe9"]).dictionary_encode() if pa.types.is_dictionary(kind) else None
    column = texts if texts is not None else pa.array(["one", None, "caf\xe9"]).cast(kind)
    for name, values, expected in (("a", column, ["one", "", "caf\xe9"]), ("b", pa.nulls(2), ["", ""])):
        pq.write_table(pa.table({"text": values}), tmp_path / f"{name}.parquet")
        batches = read_batches(tmp_path / f"{name}.parquet", "text")
        assert [text for documents in batches for text in documents.texts] == expected


def test_a_column_of_numbers_names_the_others(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"found type int64. Choose one of text, body with --text-field NAME\."):
        list(read_batches(tmp_path / "a.parquet", "text"))


def test_an_arrow_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """A mapped one would kill the process."""
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema({"text": pa.string()})) as writer:
        for _ in range(100):
            writer.write_batch(pa.record_batch({"text": ["x" * 100_000] * 20}))
    batches = read_batches(path, "text")
    next(batches)
    os.truncate(path, 5_000_000)
    with pytest.raises(UserError, match=f"Cannot read {path}: "):
        list(batches)
