"""Checkpoints on disk: whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from src.model_utils import checkpoint_utils as ck
from src.utils.errors import StorageError, UserError

PARTS = {
    "model": {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5], dtype=torch.bfloat16)},
    "optimizer": {"exp_avg.w": torch.ones(2, 3)},
    "rank_00000": {"cpu": torch.get_rng_state()},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_saved_is_read_back(root: Path):
    size = ck.save_checkpoint(root, 50, PARTS, {"note": "ünïcode", "loss": 0.1})
    assert sorted(p.name for p in (root / "step_0000050").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rank_00000.safetensors",
        "state.json",
    ]
    checkpoint = ck.open_checkpoint(root / "step_0000050")
    assert checkpoint.step == 50
    assert checkpoint.state == {"step": 50, "note": "ünïcode", "loss": 0.1}
    for name, tensors in PARTS.items():
        read = checkpoint.tensors(name)
        assert set(read) == set(tensors)
        assert all(
            torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype for key, tensor in tensors.items()
        )
    on_disk = sum(p.stat().st_size for p in (root / "step_0000050").iterdir() if p.name != "manifest.json")
    assert size == on_disk


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "rank_00000.safetensors"])
def test_a_flipped_byte_is_named_and_the_one_before_is_used(root: Path, name: str):
    for step in (10, 20):
        ck.save_checkpoint(root, step, PARTS, {})
    flip_a_byte(root / "step_0000020" / name)
    with pytest.raises(UserError, match=name):
        ck.open_checkpoint(root / "step_0000020")
    checkpoint, rejected = ck.newest_checkpoint(root)
    assert checkpoint is not None
    assert checkpoint.step == 10
    assert len(rejected) == 1
    assert name in rejected[0]


def test_a_missing_file_a_short_file_and_no_manifest(root: Path):
    for step in (1, 2, 3):
        ck.save_checkpoint(root, step, PARTS, {})
    (root / "step_0000001" / "model.safetensors").unlink()
    short = root / "step_0000002" / "model.safetensors"
    size = short.stat().st_size
    os.truncate(short, size - 1)
    (root / "step_0000003" / "manifest.json").unlink()
    assert "No such file" in (ck.damage(root / "step_0000001") or "")
    assert f"has {size - 1} bytes, expected {size}" in (ck.damage(root / "step_0000002") or "")
    with pytest.raises(UserError) as caught:
        ck.newest_checkpoint(root)
    assert all(f"step_000000{step}" in str(caught.value) for step in (1, 2, 3))


def test_what_may_not_be_read_is_not_damaged(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The superuser may read everything, so permissions are simulated."""

    def denied(path: Path, _: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    ck.save_checkpoint(root, 1, PARTS, {})
    monkeypatch.setattr(ck, "fingerprint", denied)
    with pytest.raises(StorageError, match=r"Cannot read .*: Permission denied\. Fix the permissions"):
        ck.newest_checkpoint(root)


def test_a_name_in_other_digits_is_not_a_checkpoint(root: Path):
    ck.save_checkpoint(root, 1, PARTS, {})
    (root / "step_٠٠٠٠٠٠٩").mkdir()
    assert ck.checkpoint_steps(root) == [1]


def test_an_empty_root_is_a_fresh_start(root: Path):
    assert ck.newest_checkpoint(root) == (None, [])


def test_a_path_that_leaves_the_folder_is_refused(root: Path):
    ck.save_checkpoint(root, 1, PARTS, {})
    manifest = json.loads((root / "step_0000001" / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    (root / "step_0000001" / "manifest.json").write_text(json.dumps(manifest))
    assert "not in this folder" in (ck.damage(root / "step_0000001") or "")


def test_a_save_never_overwrites(root: Path):
    ck.save_checkpoint(root, 5, PARTS, {"first": True})
    with pytest.raises(StorageError):
        ck.save_checkpoint(root, 5, PARTS, {"first": False})
    assert ck.open_checkpoint(root / "step_0000005").state["first"] is True
    assert [p.name for p in root.iterdir()] == ["step_0000005"]


def test_a_failed_save_leaves_nothing_and_says_what_it_needs(root: Path, monkeypatch: pytest.MonkeyPatch):
    ck.save_checkpoint(root, 5, PARTS, {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ck, "save_file", full)
    with pytest.raises(StorageError, match=r"No space left on device. It needs 5,\d+ bytes, [\d,]+ are free"):
        ck.save_checkpoint(root, 6, PARTS, {})
    assert [p.name for p in root.iterdir()] == ["step_0000005"]


@pytest.mark.parametrize("where", [3, 20, -2])  # in the header's length, in the header, in a tensor
def test_a_file_that_differs_from_what_was_written_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch, where: int):
    """Though it is read back as it lies on the disk: the hash is of what is in memory."""
    ck.save_checkpoint(root, 5, PARTS, {})
    save_file = ck.save_file

    def save_badly(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        content = bytearray(path.read_bytes())
        content[where] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(ck, "save_file", save_badly)
    with pytest.raises(StorageError, match=r"Cannot trust|Cannot save"):
        ck.save_checkpoint(root, 6, PARTS, {})
    assert ck.damage(root / "step_0000005") is None
    checkpoint, _ = ck.newest_checkpoint(root)
    assert checkpoint is not None
    assert checkpoint.step == 5


def test_the_disk_is_asked_and_not_the_memory(root: Path, monkeypatch: pytest.MonkeyPatch):
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system does not let go of what it keeps of a file")
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *what: advice.append((os.fstat(file).st_size, *what)))
    ck.save_checkpoint(root, 5, PARTS, {})
    sizes = [path.stat().st_size for path in (root / "step_0000005").iterdir() if path.name != "manifest.json"]
    assert sorted(advice) == sorted((size, 0, 0, os.POSIX_FADV_DONTNEED) for size in sizes)


def test_pruning_keeps_the_newest_and_the_multiples(root: Path):
    for step in (5, 10, 15, 20, 25, 30):
        ck.save_checkpoint(root, step, PARTS, {})
    ck.prune(root, keep_last=2, keep_every_steps=10, verified=set())
    assert ck.checkpoint_steps(root) == [10, 20, 25, 30]
    ck.prune(root, keep_last=2, keep_every_steps=0, verified=set())
    assert ck.checkpoint_steps(root) == [25, 30]


def test_pruning_leaves_two_that_verify(root: Path):
    """Damaged ones don't count as kept, and are not read again once they are known to be whole."""
    for step in (5, 10, 15, 20):
        ck.save_checkpoint(root, step, PARTS, {})
    for step in (15, 20):
        flip_a_byte(ck.step_dir(root, step) / "model.safetensors")
    verified: set[int] = set()
    ck.prune(root, keep_last=2, keep_every_steps=0, verified=verified)
    assert ck.checkpoint_steps(root) == [5, 10, 15, 20]
    assert verified == {5, 10}
    ck.save_checkpoint(root, 25, PARTS, {})
    ck.prune(root, keep_last=2, keep_every_steps=0, verified={*verified, 25})
    assert ck.checkpoint_steps(root) == [10, 20, 25]


def test_leftovers_are_removed_and_checkpoints_are_not(root: Path):
    ck.save_checkpoint(root, 5, PARTS, {})
    (root / "step_0000006.tmp-123").mkdir()
    (root / "step_0000004.removed-9").mkdir()
    (root / "step_0000007.set-aside-1").mkdir()
    assert ck.remove_leftovers(root) == ["step_0000004.removed-9", "step_0000006.tmp-123"]
    assert sorted(p.name for p in root.iterdir()) == ["step_0000005", "step_0000007.set-aside-1"]


def test_finding_by_run_and_by_step(root: Path):
    for step in (1, 2):
        ck.save_checkpoint(root, step, PARTS, {})
    assert ck.find_checkpoint(root.parent)[0].step == 2
    assert ck.find_checkpoint(root / "step_0000001")[0].step == 1
    for missing in (root.parent / "elsewhere", root / "step_0000003"):
        with pytest.raises(UserError, match=rf"{missing} does not exist\. Give"):
            ck.find_checkpoint(missing)
    (root.parent / "elsewhere").mkdir()
    with pytest.raises(UserError, match=r"is not a run, a step_\* folder or an export\. Give"):
        ck.find_checkpoint(root.parent / "elsewhere")
    (root.parent / "elsewhere" / "log.txt").touch()
    with pytest.raises(UserError, match=r"checkpoints holds none yet\. Train first, or wait"):
        ck.find_checkpoint(root.parent / "elsewhere")
