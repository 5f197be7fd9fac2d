"""Damaged shards are made anew from the source, the same to the byte, or it is said why that cannot be."""

import os
from pathlib import Path

import pytest

from src.data_processing.preparation import prepare
from src.data_processing.repair import repair, verify
from src.utils.errors import StorageError, UserError
from tests.conftest import Commands
from tests.data_processing.documents import MODULE, contents, request, some_texts, write_json_lines


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 20_000}, {"max_documents": 300, "drop_duplicates": True}])
def test_only_the_damaged_shards_are_written_again(tmp_path: Path, limits: dict) -> None:
    texts = some_texts(250) + some_texts(100) + some_texts(150, seed=1)
    for part in range(5):
        write_json_lines(tmp_path / f"{part}.jsonl", texts[part * 100 : part * 100 + 100])
    folder = tmp_path / "out"
    manifest = prepare(request(tmp_path / "*.jsonl", tokens_per_shard=3_000, **limits), folder, 1)
    before = contents(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    validation, second, third, *_, last = (folder / shard.file for shard in manifest.shards)
    for path in (validation, last):
        data = bytearray(path.read_bytes())
        data[500:502] = data[502:504][::-1]
        path.write_bytes(data)
    second.unlink()
    os.truncate(third, 17)
    with pytest.raises(UserError, match=r"4 of \d+ shards of .* are not as prepared"):
        verify(folder)
    assert repair(folder, 1) == manifest
    assert contents(folder) == before
    changed = {name for name in before if (folder / name).stat().st_mtime_ns != times[name]}
    assert changed == {path.name for path in (validation, second, third, last)}


def test_a_shard_around_the_validation_documents(tmp_path: Path) -> None:
    """Where the first document of the order is too long to validate on, validation lies among the training keys."""
    for seed in range(6):
        folder = tmp_path / f"texts {seed}"
        folder.mkdir()
        (folder / "long.txt").write_text("word " * 20_000)
        for number in range(4):
            (folder / f"{number}.txt").write_text(f"other {number} " * 500)
        out = tmp_path / f"out {seed}"
        manifest = prepare(request(folder, seed=seed), out, 1)
        before = contents(out)
        (out / manifest.train[0].file).unlink()
        repair(out, 1)
        assert contents(out) == before


def test_a_source_that_has_changed_cannot_mend(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    folder = tmp_path / "out"
    shard = folder / prepare(request(path), folder, 1).train[0].file
    shard.unlink()
    before = contents(folder)
    write_json_lines(path, some_texts(51))
    with pytest.raises(UserError, match=rf"cannot repair from files, which is not what it was: {path} has changed"):
        repair(folder, 1)
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        repair(folder, 1)
    assert contents(folder) == before


def test_another_number_of_sources_cannot_mend(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    asked = request(tmp_path, paths=[str(tmp_path / "*.jsonl"), str(tmp_path)])
    shard = tmp_path / "out" / prepare(asked, tmp_path / "out", 1).train[0].file
    shard.unlink()
    (tmp_path / "b.txt").write_text("new")
    with pytest.raises(UserError, match="there were 1 sources then, 2 are found now"):
        repair(tmp_path / "out", 1)


def test_shards_that_cannot_be_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    folder = tmp_path / "out"
    shard = folder / prepare(request(path), folder, 1).train[0].file
    shard.unlink()
    real = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).parent == folder:
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match=f"cannot write {folder}: Permission denied; "):
        repair(folder, 1)
    assert not (folder / ".preparing").exists()


def test_the_command(tmp_path: Path, commands: Commands) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    folder = tmp_path / "datasets" / "mine"
    shard = folder / prepare(request(path), folder, 1).train[0].file
    sound = commands.module(MODULE, "--repair", "--out", "mine")
    assert (sound.returncode, sound.stderr) == (0, f"nothing to repair: {folder}\n")
    shard.write_bytes(b"")
    done = commands.module(MODULE, "--repair", "--out", "mine")
    assert done.returncode == 0, done.stderr
    assert f"{shard}: expected a .npy file" in done.stderr
    assert f"repaired 1 of 2 shards in {folder}" in done.stderr
    assert commands.module(MODULE, "--verify", "--out", "mine").returncode == 0
    assert commands.module(MODULE, "--repair", "--verify", "--out", "mine").returncode == 2
