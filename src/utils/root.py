"""Paths of the repository and its data, independent of the current folder."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Data and runs can live on a larger disk than the code.
TEMP_DATA = Path(os.environ.get("TEMP_DATA_DIR") or ROOT / "temp_data").absolute()
DATASETS = TEMP_DATA / "datasets"
RUNS = TEMP_DATA / "runs"
COMPILE_CACHE = TEMP_DATA / "compile_cache"


def dataset_dir(name: str) -> Path:
    """The dataset folder that `name` refers to: a bare name lies under temp_data/datasets, ./NAME is a path."""
    return _named_or_path(name, DATASETS)


def run_dir(name: str) -> Path:
    """The run directory that `name` refers to: a bare name lies under temp_data/runs, ./NAME is a path."""
    return _named_or_path(name, RUNS)


def _named_or_path(name: str, home: Path) -> Path:
    path = Path(name).expanduser()
    bare = path.name == name and name != ".."
    return home / name if bare else path.absolute()
