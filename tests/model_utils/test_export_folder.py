"""What lies where an export shall be: replaced only when that loses nothing, and never by half an export."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from src.model_utils import hf_export
from src.model_utils.export_folder import EXPORT
from src.model_utils.hf_export import export
from src.utils.errors import StorageError, UserError


@pytest.fixture
def out(tiny_export: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_export, tmp_path / "out")
    return tmp_path / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_replaced_only_when_asked_for(tiny_run: Path, out: Path):
    before = content(out)
    with pytest.raises(UserError, match=r"holds an export; .*--overwrite"):
        export(tiny_run, out, "hf", "bf16")
    assert content(out) == before
    export(tiny_run, out, "hf", "bf16", overwrite=True)
    assert (out / "model.safetensors").stat().st_size < len(before["model.safetensors"])
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_comes_while_a_model_is_exported_stays(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    card = hf_export.model_card

    def slowly(*arguments: Any) -> str:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/other").write_text("another export")
        return card(*arguments)

    monkeypatch.setattr(hf_export, "model_card", slowly)
    with pytest.raises(UserError, match=r"something came into --out .*out meanwhile; choose another"):
        export(tiny_run, tmp_path / "out", "hf", "float32")
    assert content(tmp_path) == {"out/other": b"another export"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_touched(tiny_run: Path, tmp_path: Path, overwrite: bool):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are no export"):
        export(tiny_run, tmp_path / "out", "hf", "float32", overwrite)
    assert content(tmp_path) == {"out/thesis.txt": b"mine"}


def test_what_a_person_added_or_changed_is_not_replaced(tiny_run: Path, out: Path):
    (out / "notes").mkdir()
    with pytest.raises(UserError, match=r"out/notes is no part of the export"):
        export(tiny_run, out, "hf", "float32", overwrite=True)
    (out / "notes").rmdir()
    (out / "README.md").write_text("My own card")
    with pytest.raises(UserError, match=r"out/README.md was changed since its export"):
        export(tiny_run, out, "hf", "float32", overwrite=True)
    assert (out / "README.md").read_text() == "My own card"


def test_what_a_damaged_export_json_does_not_vouch_for_is_not_replaced(tiny_run: Path, out: Path):
    (out / EXPORT).write_text("{")
    before = content(out)
    with pytest.raises(UserError, match=r"so nothing says what may be replaced; move .* away"):
        export(tiny_run, out, "hf", "float32", overwrite=True)
    assert content(out) == before


def test_an_empty_folder_and_missing_ones_above_it(tiny_run: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a/b/c"):
        export(tiny_run, out, "hf", "float32")
        assert (out / "config.json").exists()


@pytest.mark.parametrize("name", ["file", "model.gguf", "model.safetensors"])
def test_a_file_is_no_folder(tiny_run: Path, tmp_path: Path, name: str):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        export(tiny_run, tmp_path / name, "hf", "float32")


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_leaves_what_was_there(tiny_run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool):
    before = content(out)
    target = out if earlier else out.with_name("new")

    def fill(folder: Path, *args: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_export, "write_model_folder", fill)
    with pytest.raises(StorageError, match=r"cannot write .*: No space left on device; [\d,]+ bytes more"):
        export(tiny_run, target, "hf", "float32", overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert content(out) == before


def test_a_dangling_link(tiny_run: Path, tmp_path: Path):
    (tmp_path / "out").symlink_to(tmp_path / "unmounted/disk")
    with pytest.raises(StorageError, match="is a link to"):
        export(tiny_run, tmp_path / "out", "hf", "float32")
