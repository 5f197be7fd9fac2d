from pathlib import Path

import pytest

from src.utils import root


def test_a_bare_name_never_means_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert root.dataset_dir("mine") == root.DATASETS / "mine"
    assert root.run_dir("mine") == root.RUNS / "mine"


@pytest.mark.parametrize("name", ["./mine", "a/mine", "..", "."])
def test_a_path_is_relative_to_the_current_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert root.dataset_dir(name).resolve() == (tmp_path / name).resolve()


def test_an_absolute_path_stays_and_a_home_is_found():
    assert root.dataset_dir("/data/set") == Path("/data/set")
    assert root.dataset_dir("~/set") == Path.home() / "set"
    assert root.run_dir("~nobody_here") == root.RUNS / "~nobody_here"
