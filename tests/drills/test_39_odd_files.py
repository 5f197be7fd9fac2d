"""Drill 39: a FIFO, a device, a folder or a link where the commands for trained models read or write a file."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from src.utils.files import replacing
from tests.conftest import Commands
from tests.drills.small_run import module
from tests.drills.trained import exported_once, trained, trained_once  # noqa: F401 (fixtures)

KINDS: dict[str, Callable[[Path, Path], object]] = {
    "a FIFO": lambda path, victim: os.mkfifo(path),
    "a folder": lambda path, victim: (path / "inside").mkdir(parents=True),
    "a device": lambda path, victim: path.symlink_to("/dev/zero"),
    "a link": lambda path, victim: path.symlink_to(victim),
    "a link to nothing": lambda path, victim: path.symlink_to(path.with_name("nothing")),
    "a link to itself": lambda path, victim: path.symlink_to(path),
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's, which no link may lead us to change."""
    path = tmp_path / "letter.txt"
    path.write_text("Dear user")
    return path


def put(kind: str, path: Path, victim: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    KINDS[kind](path, victim)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read(
    commands: Commands,
    trained: Path,  # noqa: F811
    exported_once: Path,  # noqa: F811
    tmp_path: Path,
    victim: Path,
    kind: str,
):
    for file in ("export.json", "model.safetensors", "config.json"):
        folder = shutil.copytree(exported_once, tmp_path / file)
        if file != "export.json":
            (folder / "export.json").unlink()
        put(kind, folder / file, victim)
        began = time.monotonic()
        result = module(commands, "src.model_assessment.sampling", "--checkpoint", str(folder), "--max-new-tokens", "2")
        assert result.returncode in (2, 4), result.stderr
        assert str(folder) in result.stderr
        assert "Traceback" not in result.stderr
        assert time.monotonic() - began < 10
    path = tmp_path / "items.jsonl"
    put(kind, path, victim)
    command = ("src.model_assessment.hellaswag", "--checkpoint", str(trained), "--data", str(path))
    result = module(commands, *command)
    assert result.returncode == 2, result.stderr
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
    path = tmp_path / "reference.pth"
    put(kind, path, victim)
    result = module(commands, "src.model_utils.reference_import", "--checkpoint", str(path), "--run-name", "imported")
    assert result.returncode == 2, result.stderr
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written(commands: Commands, trained: Path, tmp_path: Path, victim: Path, kind: str):  # noqa: F811
    put(kind, trained / "report.html", victim)
    result = module(commands, "src.model_assessment.report", str(trained))
    if kind == "a folder":
        assert result.returncode == 4, result.stderr
        assert f"Cannot write {trained / 'report.html'}: Is a directory." in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert not (trained / "report.html").is_symlink()
    out = tmp_path / "exported"
    put(kind, out, victim)
    result = module(commands, "src.model_utils.hf_export", "--checkpoint", str(trained), "--out", str(out))
    assert result.returncode == 2, result.stderr
    assert f"Cannot write {out}: it exists." in result.stderr
    assert victim.read_text() == "Dear user"
    assert list(tmp_path.rglob("*.tmp*")) == []


def test_a_link_under_the_name_of_an_unfinished_file(tmp_path: Path, victim: Path):
    (tmp_path / "state.json.tmp").symlink_to(victim)
    with replacing(tmp_path / "state.json") as file:
        file.write(b"{}")
    assert victim.read_text() == "Dear user"


def test_a_killed_report_leaves_nothing_for_good(commands: Commands, trained: Path):  # noqa: F811
    leftovers = [trained / "report.html.17.tmp", trained / "plots" / "loss.png.17.tmp"]
    (trained / "plots").mkdir()
    for path in leftovers:
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    result = module(commands, "src.model_assessment.report", str(trained))
    assert result.returncode == 0, result.stderr
    assert (trained / "plots" / "loss.png").exists()
    assert [path for path in leftovers if path.exists()] == []
