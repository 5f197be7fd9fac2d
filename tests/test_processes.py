"""Runs of several processes, started as a user starts them."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.utils.root import ROOT
from tests.conftest import Commands

SETTINGS = [
    *("--model.n-vocab", "300", "--model.n-ctx", "16", "--model.n-embd", "16", "--model.n-head", "2"),
    *("--model.n-layer", "2", "--train.batch-tokens", "128", "--train.micro-batch-size", "2"),
    *("--train.device", "cpu", "--train.precision", "float32", "--train.log-every-steps", "1"),
    *("--train.compile", "off"),  # which auto would try for runs as long as some of these claim to be
    *("--eval.val-tokens", "160", "--eval.hellaswag-items", "0", "--eval.sample-prompts"),
]


@pytest.fixture
def data(dataset: Callable[..., Path]) -> str:
    return str(dataset(train_tokens=[700, 900], n_vocab=300))


def train(commands: Commands, data: str, run: str, *more: str, processes: int = 1) -> None:
    result = commands.pretrain("debug", "--run-name", run, "--data.dir", data, *more, *SETTINGS, processes=processes)
    assert result.returncode == 0, result.stderr


def losses(commands: Commands, run: str, kind: str = "train") -> list[float]:
    return [record["loss"] for record in commands.metrics(run, kind)]


def test_two_processes_train_as_one_does(commands: Commands, data: str):
    for run, processes in (("one", 1), ("two", 2)):
        train(commands, data, run, "--train.total-steps", "20", processes=processes)
    assert len(losses(commands, "one")) == 20
    assert losses(commands, "two") == pytest.approx(losses(commands, "one"), rel=1e-5)
    assert losses(commands, "two", "validation") == pytest.approx(losses(commands, "one", "validation"), rel=1e-5)
    tokens = [[r["tokens"] for r in commands.metrics(run, "validation")] for run in ("one", "two")]
    assert tokens[0] == tokens[1]
    derived = json.loads((commands.temp_data / "runs" / "two" / "config.json").read_text())["derived"]
    assert (derived["world_size"], derived["grad_accumulation_steps"]) == (2, 2)


def test_two_stopped_by_a_signal_go_on_to_the_same_bits(commands: Commands, data: str):
    """With dropout, so that each process's random state counts."""
    settings = ("--train.total-steps", "300", "--model.ffn-dropout", "0.2", "--checkpoint.every-steps", "1000")
    train(commands, data, "whole", *settings, processes=2)
    code_file = commands.temp_data / "exit_code"
    code_file.touch()
    log = commands.temp_data / "runs" / "halved" / "metrics.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "pretrain.py"), "debug", "--run-name", "halved", "--data.dir", data, *settings, *SETTINGS]
    with subprocess.Popen(
        command,
        env={**commands.environment, "EXIT_CODE_FILE": str(code_file)},
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count('"train"') > 20):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert code_file.read_text() == "143"
    (stopped,) = (log.parent / "checkpoints").iterdir()
    assert "step_0000020" < stopped.name < "step_0000300"
    train(commands, data, "halved", *settings, processes=2)
    assert losses(commands, "halved") == losses(commands, "whole")
    for file in ("model", "optimizer", "rank_00000", "rank_00001"):
        whole, halved = (
            load_file(commands.temp_data / "runs" / run / "checkpoints" / "step_0000300" / f"{file}.safetensors")
            for run in ("whole", "halved")
        )
        assert set(whole) == set(halved)
        assert all(torch.equal(whole[name], halved[name]) for name in whole)


KILLED_ONCE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pretrain
from src.utils.errors import exit_with

original = pretrain.train_step

def train_step(run, batches):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.state.progress.step == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(run, batches)

pretrain.train_step = train_step
sys.argv = ["pretrain.py", *{arguments!r}]
exit_with(pretrain.main)
"""


def test_a_run_begun_anew_is_begun_anew_once(commands: Commands, data: str, tmp_path: Path):
    """Though its command says so at every start: the launcher's next start goes on."""
    settings = ["--train.total-steps", "20", "--checkpoint.every-steps", "5"]
    train(commands, data, "again", *settings)
    arguments = ["debug", "--run-name", "again", "--data.dir", data, *settings, *SETTINGS, "--resume", "never"]
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE.format(root=str(ROOT), arguments=arguments))
    result = commands.run([sys.executable, "-m", "src.utils.launch", "--max-restarts", "1", str(script)])
    assert result.returncode == 0, result.stderr
    assert "starting again, 1 of 1 times" in result.stderr
    assert "resume: from step_00000" in result.stderr
    assert [path.name for path in (commands.temp_data / "runs").glob("again.*")] == ["again.set-aside-1"]
    assert len(losses(commands, "again")) == 20


def test_another_number_of_processes_goes_on_with_the_same_samples(commands: Commands, data: str):
    train(commands, data, "one", "--train.total-steps", "20", "--checkpoint.every-steps", "10")
    train(commands, data, "one", "--train.total-steps", "20", "--resume", "10", processes=2)
    again = losses(commands, "one")
    train(commands, data, "reference", "--train.total-steps", "20")
    assert len(again) == 20
    assert again == pytest.approx(losses(commands, "reference"), rel=1e-5)
    (event,) = [r for r in commands.metrics("one", "event") if r["name"] == "resume"]
    assert "processes 2 instead of 1" in event["detail"]


def test_a_batch_two_processes_cannot_share(commands: Commands, data: str):
    more = ["--run-name", "odd", "--data.dir", data, *SETTINGS, "--train.micro-batch-size", "8"]
    code_file = commands.temp_data / "exit_code"
    code_file.touch()
    commands.environment["EXIT_CODE_FILE"] = str(code_file)
    result = commands.pretrain("debug", *more, processes=2)
    assert result.returncode != 0
    assert "micro_batch_size can be 1, 2 or 4" in result.stderr
    assert code_file.read_text() == "2"
    assert not (commands.temp_data / "runs" / "odd").exists()


FAILING_RUN = """
import os, sys
sys.path.insert(0, {root!r})
import pretrain
from src.utils.errors import StorageError, exit_with

original = pretrain.train_step

def train_step(run, batches):
    if os.environ["RANK"] == "1" and run.state.progress.step == 5:
        raise StorageError("the disk of process 1 is gone")
    return original(run, batches)

pretrain.train_step = train_step
sys.argv = ["pretrain.py", *{arguments!r}]
exit_with(pretrain.main)
"""


def test_one_failing_process_takes_the_other_with_it(commands: Commands, data: str, tmp_path: Path):
    """In seconds, although the other waits for it in a collective; its message is there and its exit code counts."""
    arguments = ["debug", "--run-name", "failing", "--data.dir", data, "--train.total-steps", "100000", *SETTINGS]
    script = tmp_path / "failing_run.py"
    script.write_text(FAILING_RUN.format(root=str(ROOT), arguments=arguments))
    code_file = tmp_path / "exit_code"
    code_file.touch()
    commands.environment["EXIT_CODE_FILE"] = str(code_file)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = time.monotonic()
    result = commands.run([*launcher, str(script)])
    assert time.monotonic() - started < 60
    assert result.returncode != 0
    assert "error (process 1): the disk of process 1 is gone" in result.stderr
    assert code_file.read_text() == "4"


# The last page takes longer than the processes then wait for one that gives no sign of life.
SLOW_PAGE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import pretrain
from src.model_assessment import trackers
from src.utils import handle_ddp
from src.utils.errors import exit_with
from src.utils.watchdog import Watchdog
class Impatient(Watchdog):
    def doing(self, what):
        if what == "the last report":
            self.limit_s = 2
            print("impatient", file=sys.stderr)
        super().doing(what)
handle_ddp.Watchdog = Impatient
handle_ddp.SIGN_SECONDS = 0.1
start = trackers.subprocess.Popen
trackers.subprocess.Popen = lambda command, **how: start([sys.executable, "-c", "import time; time.sleep(4)"], **how)
sys.argv[0] = "pretrain.py"
exit_with(pretrain.main)
"""


def test_a_slow_last_page_ends_no_finished_run(commands: Commands, data: str, tmp_path: Path):
    (tmp_path / "slow.py").write_text(SLOW_PAGE)
    (tmp_path / "runs" / "slow").mkdir(parents=True)
    (tmp_path / "runs" / "slow" / "report.html").touch()  # else none is made at the end
    command = [sys.executable, "-m", "src.utils.launch", "--processes", "2", "--max-restarts", "0"]
    settings = ["--run-name", "slow", "--data.dir", data, "--train.total-steps", "2"]
    done = commands.run([*command, str(tmp_path / "slow.py"), "debug", *settings, *SETTINGS])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("impatient") == 2
