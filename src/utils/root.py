"""Where the repository and its data lie, whatever folder a command is started from."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATASETS = ROOT / "temp_data" / "datasets"
RUNS = ROOT / "temp_data" / "runs"


def dataset_dir(name: str) -> Path:
    """The dataset folder that `name` means: a bare name lies under temp_data/datasets, a path is a path."""
    path = Path(name).expanduser()
    bare = path.name == name and not path.is_dir()
    return DATASETS / name if bare else path.absolute()
