"""Sources give all their documents in one order, and name what is wrong with a file."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.data_processing import python_docs
from src.data_processing.text_sources import (
    PythonDocs,
    Source,
    column_texts,
    find_files,
    open_files,
    read_texts,
)
from src.utils.errors import UserError
from tests.data_processing.documents import some_texts, write_json_lines


def texts_of(*paths: Path | str, text_field: str = "text") -> list[str]:
    return [text for source in open_files([str(path) for path in paths], text_field) for text in texts_in(source)]


def texts_in(source: Source) -> list[str]:
    return [text for unit in range(len(source.units)) for text in source.texts(unit)]


def json_lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_each_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntext\n")
    (tmp_path / "b.md").write_text("# two")
    (tmp_path / "c.jsonl").write_text(json_lines({"text": "three", "n": 1}, {"text": "fo\u2028ur"}) + "\n \n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json_lines({"text": None}, {"text": "five"}).encode()))
    pq.write_table(pa.table({"id": [1, 2], "text": ["six", None]}), tmp_path / "e.parquet")
    assert texts_of(tmp_path) == ["one\ntext\n", "# two", "three", "fo\u2028ur", "", "five", "six", ""]


@pytest.mark.parametrize("between", ["\n\n", "\n"], ids=["paragraphs", "lines"])
def test_a_book_is_divided_at_ends_of_paragraphs_or_lines(tmp_path: Path, between: str) -> None:
    book = between.join(f"{number} " + "word " * 40 for number in range(500))
    (tmp_path / "book.txt").write_text(book)
    (tmp_path / "short.txt").write_text(between.join(["a short one"] * 100))
    *parts, short = texts_of(tmp_path)
    assert between.join(parts) == book
    assert between.join(["a short one"] * 100) == short
    assert all(16_384 <= len(part) <= 2 * 16_384 for part in parts)
    assert len(parts) > 4


def test_bytes_that_are_not_utf8_become_lone_surrogates(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    column = pa.Array.from_buffers(pa.binary(), 1, pa.array([b"caf\xe9"]).buffers()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    assert texts_of(tmp_path) == ["caf\udce9"] * 3


def test_files_are_sorted_found_once_and_described(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", ".hidden/d.txt", "picture.png", "deep/.secret.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    sources = open_files([str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "b.txt")], "text")
    assert [texts_in(source) for source in sources] == [["a.txt", "b.txt", "deep/er/c.txt"]]
    [source] = sources
    assert source.details["files"][0] == {
        "path": str(tmp_path / "a.txt"),
        "bytes": 5,
        "sha256": hashlib.sha256(b"a.txt").hexdigest(),
    }


def test_what_else_lies_there_is_said_and_links_are_followed_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "picture.png").touch()
    os.mkfifo(folder / "pipe.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("two")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "round").symlink_to(folder)
    assert sorted(texts_of(folder)) == sorted(texts_of(folder / "*")) == ["one", "two"]
    assert f"left out 2 file(s) of {folder}, such as p" in capfd.readouterr().err


@pytest.mark.parametrize("given", ["snapshots/f/x.parquet", "snapshots", "snapshots/*/*.parquet", "."])
def test_a_link_has_its_own_name_and_its_target_may_have_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """As in the cache of the Hugging Face hub, where the files are called by their hashes."""
    (tmp_path / "snapshots" / "f").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "blobs" / "abc123")
    for name in ("x", "y"):  # one blob
        (tmp_path / "snapshots" / "f" / f"{name}.parquet").symlink_to("../../blobs/abc123")
    monkeypatch.chdir(tmp_path)
    sources = open_files([given, "snapshots/f/y.parquet"], "text")
    assert [texts_in(source) for source in sources] == [["one", "two"]]
    [described] = sources[0].details["files"]
    assert described["path"] == str(tmp_path / "snapshots" / "f" / "x.parquet")
    assert described["sha256"] == hashlib.sha256((tmp_path / "blobs" / "abc123").read_bytes()).hexdigest()


def test_links_that_lead_nowhere_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "gone.txt").symlink_to("nothing")
    (tmp_path / "round.txt").symlink_to("round.txt")
    assert find_files([str(tmp_path)]) == {str(tmp_path): [tmp_path / "a.txt"]}


def test_intermediate_results_of_datasets_are_left_out_unless_named(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "cache-1a2b.arrow", "cache-1a2b_00001_of_00002.arrow"):
        (tmp_path / name).touch()
    for given in (tmp_path, tmp_path / "*.arrow"):
        assert find_files([str(given)]) == {str(given): [tmp_path / "data-00000-of-00001.arrow"]}
    named = tmp_path / "cache-1a2b.arrow"
    assert find_files([str(named)]) == {str(named): [named]}


def test_a_name_with_pattern_characters_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("one")
    assert texts_of(tmp_path / "a[1].txt") == ["brackets"]
    assert texts_of(tmp_path / "**" / "a?.txt") == ["one"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.txt", "absent.txt, seen from .*: it does not exist"),
        ("*.jsonl", r"\*.jsonl, seen from .*: it does not exist"),
        (
            "picture.png",
            "picture.png: expected a regular file ending in .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow",
        ),
        ("empty", "empty: expected a regular file ending in"),
    ],
)
def test_a_path_that_leads_nowhere(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "picture.png").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_files([str(tmp_path / path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        (b'{"text": "a"}\n["b"]\n', "line 2: expected a JSON object, found list"),
        (
            b'{"text": "a"}\n\n{"body": "b", "url": "c"}\n',
            "line 3: expected one field 'text', found body, url. .*--text-f",
        ),
        (b'{"text": 5}\n', "line 1: field 'text' must hold text, found 5"),
        (b"[" * 100_000 + b"\n", "line 1: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}, {message}"):
        texts_of(path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(json_lines(*[{"text": f"text {i}"} for i in range(1000)]).encode())
    for name, content in (
        ("cut.jsonl.gz", whole[:-50]),
        ("plain.jsonl.gz", b'{"text": "a"}\n'),
        ("x.parquet", b"PAR1"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=str(tmp_path / name)):
            texts_of(tmp_path / name)


@pytest.fixture(scope="module")
def documentation() -> list[str]:
    return texts_in(PythonDocs())


def test_pydocs_is_enough_prose_to_train_on(documentation: list[str]) -> None:
    assert sum(map(len, documentation)) > 2_000_000
    assert len(documentation) > 300
    assert all(document.strip() for document in documentation)
    assert len(set(documentation)) == len(documentation)


def test_pydocs_holds_what_help_shows(documentation: list[str]) -> None:
    """Compared with the docstrings of imported modules, which the source only reads."""
    import inspect
    import textwrap

    module = next(text for text in documentation if text.startswith("textwrap.TextWrapper\n"))
    for item in (textwrap.TextWrapper, textwrap.TextWrapper.wrap, textwrap.dedent):
        assert (inspect.getdoc(item) or "none") in module
    assert "textwrap.TextWrapper.wrap\n\n" in module
    assert any("numpy.lib" in text for text in documentation)


def test_docstrings_are_found_under_conditions_and_in_reading_order(tmp_path: Path) -> None:
    long = "This sentence is long enough to be kept, as it has more than a hundred characters, which is the limit."
    source = f'''
"""Module. {long}"""
if True:
    class A:
        """Class. {long}"""
        def f(self):
            """short"""
            def g():
                """Inner. {long}"""
def h():
    """Class. {long}"""
'''
    (tmp_path / "mod.py").write_text(source)
    text = "\n\n\n".join([f"mod\n\nModule. {long}", f"mod.A\n\nClass. {long}", f"mod.A.f.g\n\nInner. {long}"])
    assert list(python_docs._module_text(tmp_path / "mod.py", tmp_path, set())) == [text + "\n"]
    (tmp_path / "broken.py").write_text("def (")
    assert list(python_docs._module_text(tmp_path / "broken.py", tmp_path, set())) == []


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    path.write_text("One.")
    for given in (path, tmp_path):
        with pytest.raises(UserError, match=r"its name is not UTF-8\. Rename it"):
            find_files([str(given)])


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json_lines({"body": "one", "text": "no"}))
    pq.write_table(pa.table({"body": pa.array(["two"], pa.large_string())}), tmp_path / "b.parquet")
    assert texts_of(tmp_path, text_field="body") == ["one", "two"]


def test_empty_text_files_among_others_are_empty_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "c.md", "e.txt", "f.txt"):
        (tmp_path / name).touch()
    (tmp_path / "b.jsonl").write_text(json_lines({"text": "one"}, {"text": "two"}))
    pq.write_table(pa.table({"text": ["three"]}), tmp_path / "d.parquet")
    assert texts_of(tmp_path) == ["", "one", "two", "", "three", "", ""]
    assert texts_of(tmp_path / "a.txt") == [""]


# Formats of files

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


def write_arrow(path: Path, texts: Any, new: Callable[..., Any], rows: int) -> None:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def arrow_file_of_categories(path: Path) -> None:
    write_arrow(path, pa.array(TEXTS).dictionary_encode(), pa.ipc.new_file, 2_500)


def arrow_stream_of_views(path: Path) -> None:
    write_arrow(path, pa.array(TEXTS, pa.string_view()), pa.ipc.new_stream, 2_500)


def arrow_file(path: Path) -> None:
    write_arrow(path, TEXTS, pa.ipc.new_file, 2_500)


def arrow_stream(path: Path) -> None:
    write_arrow(path, pa.array(TEXTS, pa.large_string()), pa.ipc.new_stream, 1_000)


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
def test_every_format_gives_all_texts(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    path = tmp_path / name
    write(path)
    assert list(read_texts(path, "text")) == TEXTS


def test_the_number_of_a_bad_line(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10_000, words=60))
    with open(path, "a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match="line 10001: not JSON"):
        list(read_texts(path, "text"))


def test_categories_of_numbers_are_not_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([1, 2]).dictionary_encode()}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'text' must hold text, found type int64"):
        list(read_texts(tmp_path / "a.parquet", "text"))


def test_categories_that_are_not_utf8_become_lone_surrogates() -> None:
    text = pa.Array.from_buffers(pa.binary(), 1, pa.array([b"caf\xe9"]).buffers()).view(pa.string())
    for column in (text.dictionary_encode(), text.cast(pa.string_view())):
        assert column_texts(column) == ["caf\udce9"]


def test_a_file_that_is_not_arrow_or_zstd_is_named(tmp_path: Path) -> None:
    for name in ("a.arrow", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 10)
        with pytest.raises(UserError, match=str(tmp_path / name)):
            list(read_texts(tmp_path / name, "text"))


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
            assert list(read_texts(file, "text")) == [text]
        else:
            with pytest.raises(UserError, match=rf"Cannot read {file}: it .*UTF-.* Convert it to UTF-8: iconv"):
                list(read_texts(file, "text"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_git_lfs_pointer_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=rf"Cannot read {tmp_path / name}: it is a Git LFS pointer. Run git lfs pull"):
        list(read_texts(tmp_path / name, "text"))


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_columns_of_bytes_and_of_nulls_are_text(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["one", None, "caf\xe9"]).dictionary_encode() if pa.types.is_dictionary(kind) else None
    column = texts if texts is not None else pa.array(["one", None, "caf\xe9"]).cast(kind)
    for name, values, expected in (("a", column, ["one", "", "caf\xe9"]), ("b", pa.nulls(2), ["", ""])):
        pq.write_table(pa.table({"text": values}), tmp_path / f"{name}.parquet")
        assert list(read_texts(tmp_path / f"{name}.parquet", "text")) == expected


def test_a_column_of_numbers_names_the_others(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"found type int64. Choose one of text, body with --text-field NAME\."):
        list(read_texts(tmp_path / "a.parquet", "text"))


def test_an_arrow_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """A mapped one would kill the process."""
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema({"text": pa.string()})) as writer:
        for _ in range(100):
            writer.write_batch(pa.record_batch({"text": ["x" * 100_000] * 20}))
    texts = read_texts(path, "text")
    next(texts)
    os.truncate(path, 5_000_000)
    with pytest.raises(UserError, match=f"Cannot read {path}: "):
        list(texts)
