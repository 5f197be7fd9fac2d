"""Drill 34: text in other encodings, pointers and large windows are read or refused by name, never in silence."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.data_processing.documents import MODULE, all_decoded, write_json_lines

LETTER = "A letter to a friend,\nwith café and naïveté.\n" * 40
CHINESE, RUSSIAN = "漢字仮名交じり文。" * 200, "Привет, мир! " * 200
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"


def prepare(commands: Commands, folder: Path, name: str, content: bytes):
    """Prepare a file with another source of two documents next to it."""
    folder.mkdir()
    write_json_lines(folder / "a.jsonl", ["one", "two"])
    (folder / name).write_bytes(content)
    return commands.module(MODULE, "--source", "files", "--path", str(folder), "--out", "x", "--workers", "1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("t.txt", LETTER.encode("utf-16-le"), "UTF-16 or UTF-32 without a byte", id="utf-16-le"),
        pytest.param("t.md", RUSSIAN.encode("utf-16-be"), "UTF-16 or UTF-32 without a byte", id="russian utf-16-be"),
        pytest.param("t.txt", LETTER.encode("utf-32-be"), "UTF-16 or UTF-32 without a byte", id="utf-32-be"),
        pytest.param("t.txt", (CHINESE * 9 + LETTER).encode("utf-16-le"), "without a byte order", id="late spaces"),
        pytest.param("t.txt", CHINESE.encode("utf-16-le"), "characters are not UTF-8", id="chinese utf-16"),
        pytest.param("t.txt", CHINESE.encode("shift-jis"), "characters are not UTF-8", id="shift-jis"),
        pytest.param("t.txt", RUSSIAN.encode("koi8-r"), "characters are not UTF-8", id="koi8-r"),
        pytest.param("t.jsonl", b'{"text": "a"}\n'.decode().encode("utf-16"), "it is UTF-16 text", id="lines"),
        pytest.param("t.txt", POINTER, "Git LFS pointer. Run git lfs pull", id="pointer"),
        pytest.param("t.parquet", POINTER.replace(b"\n", b"\r\n"), "Git LFS pointer", id="pointer of crlf"),
        pytest.param("t.jsonl", POINTER.replace(b"git-lfs.github", b"hawser.github"), "Git LFS pointer", id="older"),
        pytest.param("t.txt", b"/annex/objects/SHA256E-s1--ab.txt\n", "git-annex pointer", id="annex"),
    ],
)
def test_refused_by_name_with_the_remedy(
    tmp_path: Path, commands: Commands, name: str, content: bytes, message: str
) -> None:
    done = prepare(commands, tmp_path / "texts", name, content)
    assert done.returncode == 2, done.stderr
    assert f"Cannot read {tmp_path / 'texts' / name}: " in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_mark_is_enough(tmp_path: Path, commands: Commands, encoding: str) -> None:
    done = prepare(commands, tmp_path / "texts", "t.txt", LETTER.encode(encoding))
    assert done.returncode == 0, done.stderr
    assert LETTER in all_decoded(tmp_path / "datasets" / "x")


def test_odd_bytes_are_counted_by_file(tmp_path: Path, commands: Commands) -> None:
    done = prepare(commands, tmp_path / "texts", "t.txt", LETTER.encode("latin-1"))
    assert done.returncode == 0, done.stderr
    assert f"replaced by U+FFFD: 120 in {tmp_path / 'texts' / 't.txt'}. If a file" in done.stderr


def test_prose_about_pointers_is_prose(tmp_path: Path, commands: Commands) -> None:
    text = "version https://git-lfs.github.com/spec/v1 begins each pointer, as this essay explains."
    assert prepare(commands, tmp_path / "texts", "t.txt", text.encode()).returncode == 0


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the zstd command")
def test_a_large_window_has_a_command_that_makes_it_readable(tmp_path: Path, commands: Commands) -> None:
    (tmp_path / "plain").write_bytes(b'{"text": "%s"}\n' % (b"x" * 200) * 1_000_000)
    (tmp_path / "texts").mkdir()
    write_json_lines(tmp_path / "texts" / "a.jsonl", ["one", "two"])
    path = tmp_path / "texts" / "it's.jsonl.zst"
    subprocess.run(["zstd", "-q", "--ultra", "--long=31", str(tmp_path / "plain"), "-o", str(path)], check=True)
    command = ["--source", "files", "--path", str(tmp_path / "texts"), "--out", "x", "--max-documents", "9"]
    refused = commands.module(MODULE, *command)
    assert refused.returncode == 2
    assert f"Cannot read {path}: its zstd window is larger than 128 MiB." in refused.stderr
    remedy = refused.stderr.strip().rpartition("give that file: ")[2]
    subprocess.run(["bash", "-c", remedy.replace("zstd -o", "zstd -q -o")], check=True)
    path.unlink()
    assert commands.module(MODULE, *command).returncode == 0
