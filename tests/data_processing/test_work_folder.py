"""Unfinished work is held by one process, and goes when it is of no more use; what stands in the way is named."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from src.data_processing.preparation import prepare
from src.data_processing.work_folder import DOWNLOADS, PLAN, WORK, claimed_work, start_over
from src.utils.errors import BusyError, StorageError, UserError
from tests.data_processing.documents import request, some_texts, write_json_lines


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with claimed_work(tmp_path / "out"), pytest.raises(BusyError, match="is preparing"), claimed_work(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == [], "nothing is left of the work when it ends well"


@pytest.mark.parametrize("worth", [None, DOWNLOADS, "run_000000.json"])
def test_a_failure_leaves_only_what_is_worth_going_on_with(tmp_path: Path, worth: str | None) -> None:
    def fail() -> NoReturn:
        with claimed_work(tmp_path / "out") as work:
            (work / PLAN).touch()
            if worth:
                (work / worth).mkdir()
            raise UserError("of no matter")

    with pytest.raises(UserError, match="of no matter"):
        fail()
    assert (tmp_path / "out" / WORK / PLAN).exists() == (worth is not None)
    assert (tmp_path / "out").exists() == (worth is not None)


def test_shards_of_unknown_origin_are_not_touched(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    stray = tmp_path / "out" / "edu_i_000000_t_5.npy"
    stray.parent.mkdir()
    np.save(stray, np.arange(5, dtype=np.uint16))
    with pytest.raises(UserError, match=r"holds 1 shards without a manifest, such as edu_i_000000_t_5.npy"):
        prepare(request(path), tmp_path / "out", 1)
    assert os.listdir(tmp_path / "out") == [stray.name]


def test_what_cannot_be_deleted_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    work = tmp_path / WORK
    (work / DOWNLOADS).mkdir(parents=True)
    (tmp_path / "edu_i_000000_t_5.npy").touch()
    (work / PLAN).touch()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StorageError, match=f"cannot delete what is in {work}: Permission denied; "):
        start_over(tmp_path, work)
    with pytest.raises(StorageError, match=f"cannot delete {work}: Permission denied; "), claimed_work(tmp_path):
        pass
    with pytest.raises(UserError, match="the first failure"), claimed_work(tmp_path, keep_unfinished=False):
        raise UserError("the first failure")
    (tmp_path / "edu_i_000000_t_5.npy").touch()
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match=r"cannot delete .*edu_i_000000_t_5.npy: Permission denied; "):
        start_over(tmp_path, work)
