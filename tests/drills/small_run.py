"""What the drills on data share: a run of seconds, and what a refusal looks like."""

from pathlib import Path
from subprocess import CompletedProcess

from tests.conftest import Commands
from tests.test_processes import SETTINGS


def start(commands: Commands, data: Path, *more: str, processes: int = 1) -> CompletedProcess[str]:
    """Starts, or goes on with, the run `drill` of 4 steps with a checkpoint every 2."""
    steps = ("--train.total-steps", "4", "--checkpoint.every-steps", "2")
    arguments = ("--run-name", "drill", "--data.dir", str(data), *steps, *SETTINGS, *more)
    return commands.pretrain("debug", *arguments, processes=processes)


def refusal(commands: Commands, data: Path, *more: str) -> str:
    """The message of a start that is refused; asserts that it says so cleanly and leaves every run as it was."""
    before = contents(commands.temp_data / "runs")
    result = start(commands, data, *more)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("pretrain.py: error: ") == 1
    assert contents(commands.temp_data / "runs") == before
    return result.stderr


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Everything under `folder`, hidden files included; None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def shard_paths(data: Path) -> list[Path]:
    """The shards in index order, the validation shard first."""
    return sorted(data.glob("*.npy"))
