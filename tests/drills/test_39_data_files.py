"""Drill 39, of data: pipes, devices, folders and links are refused by name, and nothing they lead to is touched."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.data_processing.documents import MODULE, some_texts, write_json_lines


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to("/dev/zero"), link_to("nothing")])
def test_a_source(tmp_path: Path, commands: Commands, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.txt")
    done = commands.module(MODULE, "--source", "files", "--path", str(tmp_path / "a.txt"), "--out", "x")
    assert done.returncode == 2
    assert f"Cannot read --path {tmp_path / 'a.txt'}: expected a regular file" in done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    path = write_json_lines(folder / "a.jsonl", some_texts(100))
    done = Commands(folder).module(MODULE, "--source", "files", "--path", str(path), "--out", "x")
    assert done.returncode == 0
    return folder


@pytest.mark.parametrize("mode", ["--verify", "--inspect", "--repair", "--source"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to("/dev/zero")])
def test_a_manifest(
    tmp_path: Path, commands: Commands, prepared: Path, make: Callable[[Path], None], mode: str
) -> None:
    folder = tmp_path / "datasets" / "x"
    shutil.copytree(prepared / "datasets" / "x", folder)
    (folder / "manifest.json").unlink()
    make(folder / "manifest.json")
    arguments = ["--source", "files", "--path", str(prepared / "a.jsonl")] if mode == "--source" else [mode]
    done = commands.module(MODULE, *arguments, "--out", "x")
    assert done.returncode == 2
    assert f"Cannot open {folder / 'manifest.json'}: it is not a regular file. Move it away." in done.stderr


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to("/dev/zero")])
def test_a_stamp_counts_as_absent(
    tmp_path: Path, commands: Commands, prepared: Path, make: Callable[[Path], None]
) -> None:
    folder = tmp_path / "datasets" / "x"
    shutil.copytree(prepared / "datasets" / "x", folder)
    make(folder / ".verified.json")
    assert commands.module(MODULE, "--verify", "--out", "x").returncode == 0
    assert commands.module(MODULE, "--repair", "--out", "x").returncode == 0


@pytest.mark.parametrize("name", ["", "lock", "journal.json", "tokens"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_unfinished_work(tmp_path: Path, commands: Commands, prepared: Path, name: str, kind: str) -> None:
    """It is refused, or made again; a file or folder of the user's that a link leads to stays."""
    work, mine = tmp_path / "datasets" / "x" / ".preparing", tmp_path / "mine"
    mine.mkdir()
    (mine / "tokens").write_text("keep")
    (work if name else work.parent).mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(work / name)
    else:
        (work / name).symlink_to(mine / "tokens" if name else mine)
    done = commands.module(MODULE, "--source", "files", "--path", str(prepared / "a.jsonl"), "--out", "x")
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert done.returncode == 4
        assert str(work / name) in done.stderr
    assert os.listdir(mine) == ["tokens"]
    assert (mine / "tokens").read_text() == "keep"
