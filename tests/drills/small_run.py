"""What the drills share: a run of seconds, what a refusal looks like, and disks that are full or read-only."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file

from src.utils.files import fingerprint
from tests.conftest import Commands
from tests.drills.forks import run_forks

SETTINGS = [
    *("--model.n-vocab", "300", "--model.n-ctx", "16", "--model.n-embd", "16", "--model.n-head", "2"),
    *("--model.n-layer", "2", "--train.batch-tokens", "128", "--train.micro-batch-size", "2"),
    *("--train.device", "cpu", "--train.precision", "float32", "--train.log-every-steps", "1"),
    *("--train.compile", "off"),  # which auto would try for runs as long as some of these claim to be
    *("--eval.val-tokens", "160", "--eval.hellaswag-items", "0", "--eval.sample-prompts"),
]
STEPS = ("--train.total-steps", "4", "--checkpoint.every-steps", "2")
# with dropout, so that a lost random state would show, and a validation between the checkpoints
LONGER = (
    *("--train.total-steps", "12", "--checkpoint.every-steps", "4"),
    *("--eval.val-every-steps", "3", "--model.ffn-dropout", "0.2"),
)
# the published recipe instead of the preset's
PUBLISHED = (
    *("--model.bias", "--model.no-qk-norm", "--model.no-zero-init"),
    *("--optim.optimizer", "adamw", "--optim.embedding-lr", "None", "--optim.schedule", "cosine"),
)


# The real program behind a few lines of a drill's own.
PROGRAM = """
import sys
import pretrain
from src.utils.errors import exit_with
sys.argv[0] = "pretrain.py"
exit_with(pretrain.main)
"""

# For such lines: `at_line(kind, step, action)` calls `action` before that line of metrics.jsonl is written.
AT_LINE = """
from src.utils.logger import RunLogger

def at_line(kind, step, action):
    metric = RunLogger.metric
    def acting(self, *line, **values):
        if line == (kind, step):
            action()
        metric(self, *line, **values)
    RunLogger.metric = acting
"""


SAYING_WHEN_THE_MODEL_IS_BUILT = """
from src.model import LLM

build = LLM.__init__

def building(self, *arguments):
    print("the model is built")
    build(self, *arguments)

LLM.__init__ = building
"""


def arguments(data: Path, *more: str) -> list[str]:
    """Of pretrain.py: the run `drill` of 4 steps with a checkpoint every 2, unless `more` says otherwise."""
    return ["debug", "--run-name", "drill", "--data.dir", str(data), *STEPS, *SETTINGS, *more]


def start(commands: Commands, data: Path, *more: str) -> CompletedProcess[str]:
    """Starts, or resumes, the run that `arguments` describes."""
    return start_with(commands, "", data, *more)


def start_with(
    commands: Commands, lines: str, data: Path, *more: str, on: "Mounts | None" = None
) -> CompletedProcess[str]:
    """The same, in a process that first executes `lines`, and sees the mounts `on`."""
    process = on.process if on else None
    return run_forks(lines + PROGRAM, arguments(data, *more), [commands.environment], process)[1]


def module(commands: Commands, name: str, *arguments: str, on: "Mounts | None" = None) -> CompletedProcess[str]:
    """Runs the command `python -m NAME`."""
    code = f"import sys, {name} as module\nfrom src.utils.errors import exit_with\n"
    code += f"sys.argv[0] = {name.rsplit('.', 1)[1] + '.py'!r}\nexit_with(module.main)"
    return run_forks(code, arguments, [commands.environment], on.process if on else None)[1]


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
    """Everything under `folder`, hidden files included, but not who holds or held it; None for a folder."""
    paths = (path for path in folder.rglob("*") if path.suffix != ".lock")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def shard_paths(data: Path) -> list[Path]:
    """The shards in index order, the validation shard first."""
    return sorted(data.glob("*.npy"))


def flip_a_byte(path: Path) -> None:
    """In the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, text: str) -> None:
    """Replaces a file of a checkpoint, and what the manifest says of it."""
    path.write_text(text)
    manifest = path.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    content["files"][path.name] = fingerprint(path)
    manifest.write_text(json.dumps(content))


def assert_same_run(one: Path, other: Path, steps: int) -> None:
    """Asserts that two run directories tell of the same `steps` steps, and end in the same bits."""
    lines = [_measured(run) for run in (one, other)]
    assert lines[0] == lines[1]
    fewer, more = sorted((_saved_steps(run) for run in (one, other)), key=len)
    assert (len(fewer), len(more)) == (len(set(fewer)), len(set(more)))
    assert set(fewer) <= set(more)  # which has saved where it was stopped, too
    assert [line["step"] for line in lines[0] if line["kind"] == "train"] == list(range(1, steps + 1))
    ends = [run / "checkpoints" / f"step_{steps:07d}" for run in (one, other)]
    files, others = (sorted(path.name for path in end.iterdir()) for end in ends)
    assert files == others
    for file in (file for file in files if file.endswith(".safetensors")):
        a, b = (load_file(end / file) for end in ends)
        assert set(a) == set(b)
        assert all(torch.equal(a[name], b[name]) for name in a), file


def _saved_steps(run: Path) -> list[int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if record["kind"] == "checkpoint"]


def _measured(run: Path) -> list[dict]:
    """What was computed, each line once, without times, sizes and speeds, which no two runs share."""
    differ = {"time", "seconds", "tokens_per_second", "step_ms", "memory_gb"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    computed = [record for record in records if record["kind"] in ("train", "validation")]
    return [{k: v for k, v in record.items() if k not in differ} for record in computed]


@dataclass(frozen=True)
class Mounts:
    """A place of mounts that nobody else sees."""

    process: int

    def path(self, path: Path) -> Path:
        """Where this test finds what is at `path` there."""
        return Path(f"/proc/{self.process}/root{path}")


@contextmanager
def mounts(script: str) -> Iterator[Mounts]:
    """What the shell commands `script` mount, until the block ends; skips the test where the kernel does not allow it.

    Read-only mounts and full disks stop the superuser too, whom permissions do not.
    """
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this machine gives users no private namespaces")
    holder = ["unshare", "-rm", "sh", "-ec", f"{script}\necho ready\nread line"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "mounting failed"
        yield Mounts(process.pid)
        process.stdin.close()


def small_disk(folder: Path, kilobytes: int) -> str:
    """The command that mounts an empty file system of that size on `folder`, for `mounts`."""
    return f"mount -t tmpfs -o size={kilobytes}k tmpfs {folder}"
