"""Paths of the repository and its data, independent of the current folder."""

import difflib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Data and runs may be on a larger disk than the code.
TEMP_DATA = Path(os.path.expanduser(os.environ.get("TEMP_DATA_DIR") or ROOT / "temp_data")).absolute()
DATASETS = TEMP_DATA / "datasets"
RUNS = TEMP_DATA / "runs"
COMPILE_CACHE = TEMP_DATA / "compile_cache"


def dataset_dir(name: str) -> Path:
    """The dataset folder that `name` refers to: a bare name is a folder under temp_data/datasets, ./NAME is a path."""
    return _named_or_path(name, DATASETS)


def run_dir(name: str) -> Path:
    """The run directory that `name` refers to: a bare name is a folder under temp_data/runs, ./NAME is a path."""
    return _named_or_path(name, RUNS)


def instead_of(path: Path) -> str:
    """A sentence with the runs or datasets to choose from instead of a missing `path`; "" for a path elsewhere."""
    kinds = {RUNS: "runs", DATASETS: "datasets"}
    if path.parent not in kinds or not path.parent.is_dir():
        return ""
    names = sorted(each.name for each in path.parent.iterdir() if each.is_dir() and not each.name.startswith("."))
    similar = difflib.get_close_matches(path.name, names, n=5, cutoff=0.5)
    listed = [*similar, *(name for name in names if name not in similar)]
    rest = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return f" The {kinds[path.parent]} in {path.parent}: {', '.join(listed[:10]) or 'none'}{rest}."


def _named_or_path(name: str, home: Path) -> Path:
    path = Path(os.path.expanduser(name))
    bare = path.name == name and name != ".."
    return home / name if bare else path.absolute()
