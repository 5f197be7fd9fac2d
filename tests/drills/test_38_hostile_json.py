"""Drill 38: JSON made by hand, in every kind of file that the commands for trained models read."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.small_run import module
from tests.drills.trained import exported_once, trained, trained_once  # noqa: F401 (fixtures)

HOSTILE = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "infinite": b'{"format": 1, "step": 1e999}',
    "not a number": b'{"format": 1, "step": NaN}',
    "many digits": b'{"format": 1, "step": ' + b"9" * 5_000 + b"}",
    "a lone surrogate": b'{"format": 1, "dataset_sha256": "\\ud800"}',
    "a key twice": b'{"format": 1, "step": 3, "step": 4}',
    "another type": b"[1, 2]",
    "no JSON": b"\xff\xfe\x00\x01",
    "wrong types": b'{"format": 1, "step": "1", "config": [], "sources": {}, "figures": 3, "files": null}',
}


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path) -> Path:  # noqa: F811
    return shutil.copytree(exported_once, tmp_path / "exported")


def refused(commands: Commands, path: Path, name: str, *options: str) -> None:
    result = module(commands, name, *options)
    assert result.returncode == 2, result.stderr
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr


def test_an_export(commands: Commands, exported: Path):
    asked = ("src.model_assessment.sampling", "--checkpoint", str(exported), "--max-new-tokens", "2")
    for file in ("export.json", "config.json"):
        good = (exported / file).read_bytes()
        for content in HOSTILE.values():
            (exported / file).write_bytes(content)
            refused(commands, exported / file, *asked)
        (exported / file).write_bytes(good)
    (exported / "export.json").unlink()  # as of another program
    refused(commands, exported / "config.json", *asked)


def test_multiple_choice_items(commands: Commands, trained: Path, tmp_path: Path):  # noqa: F811
    file = tmp_path / "items.jsonl"
    asked = ("src.model_assessment.hellaswag", "--checkpoint", str(trained), "--data", str(file))
    for name in ("deep", "many digits", "a lone surrogate", "another type", "no JSON"):
        file.write_bytes(HOSTILE[name])
        refused(commands, file, *asked)


def test_a_report_of_a_run_whose_files_were_changed(commands: Commands, trained: Path, tmp_path: Path):  # noqa: F811
    for i, content in enumerate(HOSTILE[name] for name in ("deep", "infinite", "a lone surrogate", "wrong types")):
        run = shutil.copytree(trained, tmp_path / f"run{i}")
        (run / "config.json").write_bytes(content)
        (run / "status.json").write_bytes(content)
        with open(run / "metrics.jsonl", "ab") as file:
            file.write(content + b'\n{"kind": "train", "step": 1e999}\n{"kind": "sample", "step": 7, "text": [1]}\n')
        result = module(commands, "src.model_assessment.report", str(run))
        assert result.returncode == 0, result.stderr
        assert (run / "report.html").stat().st_size > 10_000
