"""Drill 39: FIFOs, folders and links where a run reads or writes its files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.small_run import start


@pytest.fixture
def data(commands: Commands, dataset: Callable[..., Path]) -> Path:
    """And the run `drill` on it, which has two steps to do."""
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    assert start(commands, data).returncode == 0
    shutil.rmtree(commands.temp_data / "runs" / "drill" / "checkpoints" / "step_0000004")
    return data


def clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def test_they_are_refused_or_replaced_and_no_start_hangs(commands: Commands, data: Path, tmp_path: Path) -> None:
    runs, mine = commands.temp_data / "runs", tmp_path / "mine"
    mine.write_text("my own\n" * 1000)
    others: dict[str, Callable[[Path], object]] = {
        "FIFO": os.mkfifo,
        "link": lambda path: path.symlink_to(mine),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": lambda path: (path / "not empty").mkdir(parents=True),
    }
    # Training does without some files, if there is a warning, and is refused where it needs one.
    harmless = ["log.txt", "status.json", "status.json.tmp", "config.json"]
    cases = [(kind, names) for kind in ("FIFO", "link", "folder") for names in (harmless, ["metrics.jsonl"])]
    cases += [(kind, [name]) for kind in ("FIFO", "link") for name in ("checkpoints", "../.case.lock", "../case")]
    cases += [("device", ["metrics.jsonl"]), ("link", ["metrics.jsonl.tmp"]), ("folder", ["metrics.jsonl.tmp"])]
    for kind, names in cases:
        run = runs / "case"
        shutil.copytree(runs / "drill", run)
        paths = [Path(os.path.normpath(run / name)) for name in names]
        for path in paths:
            clear(path)
            others[kind](path)
        result = start(commands, data, "--run-name", run.name)
        may_work = names == harmless or (kind, names) == ("link", ["metrics.jsonl.tmp"])
        assert result.returncode in ((0,) if may_work else (2, 4)), (kind, names, result.stderr)
        assert "Traceback" not in result.stderr, (kind, names)
        assert result.returncode == 0 or str(paths[0]) in result.stderr, (kind, names, result.stderr)
        assert mine.read_text() == "my own\n" * 1000, (kind, names)
        for left in (run, runs / ".case.lock"):
            clear(left)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_in_a_checkpoint_they_are_damage(commands: Commands, data: Path, name: str) -> None:
    root = commands.temp_data / "runs" / "drill" / "checkpoints"
    shutil.copytree(root / "step_0000002", root / "step_0000003")
    (root / "step_0000003" / name).unlink()
    os.mkfifo(root / "step_0000003" / name)
    result = start(commands, data)
    assert result.returncode == 0, result.stderr
    assert "resume: from step_0000002 of 4 steps" in result.stderr
    assert "step_0000003" in result.stderr
