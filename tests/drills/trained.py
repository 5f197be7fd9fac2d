"""A run that has ended, made once for all drills of commands that open one."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Commands, write_dataset
from tests.drills.small_run import module, start


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    data = write_dataset(home / "datasets" / "random", [700, 900], 2_000, 50_257)
    result = start(Commands(home), data, "--model.n-vocab", "50257")
    assert result.returncode == 0, result.stderr
    return home


@pytest.fixture(scope="session")
def exported_once(trained_once: Path) -> Path:
    """The run's model as a folder for transformers, to be copied."""
    out = trained_once / "exported"
    run = str(trained_once / "runs" / "drill")
    result = module(Commands(trained_once), "src.model_utils.hf_export", "--checkpoint", run, "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def trained(commands: Commands, trained_once: Path) -> Path:
    """A copy of the run `drill` among this test's own runs."""
    return shutil.copytree(trained_once / "runs" / "drill", commands.temp_data / "runs" / "drill")
