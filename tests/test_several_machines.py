"""Runs on several machines: several launchers on this one, each started as on a machine of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from socket import socket

import pytest

from src.utils import torchrun
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.small_run import SETTINGS
from tests.test_processes import data, losses  # noqa: F401 (data: a fixture)


def free_port() -> str:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Machines:
    """Two machines with a process each: torchrun as the launcher starts it, or the launcher itself."""

    def __init__(self, commands: Commands) -> None:
        self.commands, self.port = commands, free_port()
        self.running: list[subprocess.Popen[str]] = []

    def start(self, machine: int, command: list[str], **variables: str) -> None:
        process = subprocess.Popen(
            command,
            env={**self.commands.environment, **variables},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)

    def torchrun(self, program: Path, *arguments: str, disks: tuple[Path, ...] = ()) -> "Machines":
        for machine in range(2):
            options = ["--nnodes", "2", "--node-rank", str(machine), "--nproc-per-node", "1"]
            options += ["--master-addr", "127.0.0.1", "--master-port", self.port]
            disk = {"TEMP_DATA_DIR": str(disks[machine])} if disks else {}
            command = [sys.executable, "-m", "src.utils.torchrun", *options, str(program), *arguments]
            self.start(machine, command, **disk)
        return self

    def launch(self, *overrides: str) -> "Machines":
        for machine in range(2):
            variables = {"NNODES": "2", "NODE_RANK": str(machine), "MASTER_ADDR": "127.0.0.1", "PRESET": "debug"}
            variables |= {"MASTER_PORT": self.port, "NPROC": "1", "PYTHON": sys.executable}
            self.start(machine, [str(ROOT / "run_pre_training_e2e.sh"), *overrides], **variables)
        return self

    def ends(self) -> list[tuple[int, str]]:
        """Exit code and stderr of each."""
        messages = [process.communicate(timeout=240)[1] for process in self.running]
        return list(zip([process.returncode for process in self.running], messages, strict=True))


@pytest.fixture
def machines(commands: Commands):
    started: list[Machines] = []

    def make() -> Machines:
        started.append(Machines(commands))
        return started[-1]

    yield make
    for process in (process for each in started for process in each.running):
        process.kill()  # its processes follow it
        process.communicate()


def wait_for_steps(commands: Commands, run: str, steps: int, launchers: list[subprocess.Popen[str]]) -> None:
    log, deadline = commands.temp_data / "runs" / run / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"train"') >= steps):
        assert all(process.poll() is None for process in launchers)
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def settings(data: str) -> list[str]:  # noqa: F811 (the fixture)
    return ["--run-name", "far", "--data.dir", data, "--checkpoint.every-steps", "10", *SETTINGS]


def test_a_process_killed_on_one_machine_restarts_all(commands: Commands, settings: list[str], machines):
    """And a stop on one machine then stops and saves on both."""
    pair = machines().launch(*settings, "--train.total-steps", "100000", "--model.n-vocab", "50257")
    wait_for_steps(commands, "far", 12, pair.running)
    listed = subprocess.run(
        ["ps", "-eww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=False
    ).stdout
    processes = [line.split(None, 2) for line in listed.splitlines() if str(commands.temp_data) in line]
    torchruns = {pid for pid, parent, _ in processes if parent == str(pair.running[1].pid)}
    (rank,) = [int(pid) for pid, parent, _ in processes if parent in torchruns]
    os.kill(rank, signal.SIGKILL)
    log = commands.temp_data / "runs" / "far" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while '"resume"' not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    wait_for_steps(commands, "far", log.read_text().count('"train"') + 3, pair.running)
    pair.running[1].send_signal(signal.SIGTERM)
    (first, first_text), (second, second_text) = pair.ends()
    assert (first, second) == (143, 143), first_text + second_text
    assert "process 1 died of SIGKILL" in second_text
    assert all("restart 1 of 3" in text for text in (first_text, second_text))
    assert "restart 2" not in first_text + second_text
    assert all("Traceback" not in text and "closing signal" not in text for text in (first_text, second_text))
    assert json.loads((log.parent / "status.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize("machine", [0, 1])
def test_a_machine_that_does_not_come_is_waited_for_only_so_long(machine: int, commands: Commands):
    options = ["--nnodes", "2", "--node-rank", str(machine), "--nproc-per-node", "1", "--rdzv-conf", "timeout=3"]
    options += ["--master-addr", "127.0.0.1", "--master-port", free_port(), str(ROOT / "pretrain.py"), "debug"]
    ended = commands.module("src.utils.torchrun", *options)
    assert ended.returncode == torchrun.EXIT_LOST_MACHINE
    assert ended.stderr.splitlines()[-1].startswith("Cannot reach all machines: ")
    assert "Start the same command on all of them again." in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_directory_that_is_not_shared(commands: Commands, settings: list[str], machines):
    """The run resumes with the same machine first, and is refused with the other one first."""
    ours, others = commands.temp_data, commands.temp_data / "another disk"
    run = ["debug", *settings, "--train.total-steps", "20"]
    assert [code for code, _ in machines().torchrun(ROOT / "pretrain.py", *run, disks=(ours, others)).ends()] == [0, 0]
    ends = machines().torchrun(ROOT / "pretrain.py", *run, disks=(others, ours)).ends()
    assert [code for code, _ in ends] == [2, 2]
    assert sum(text.count("has checkpoints up to step 20 in") for _, text in ends) == 1


def test_machines_with_other_settings_are_refused(settings: list[str], tmp_path: Path, machines):
    program = tmp_path / "pretrain.py"
    program.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import pretrain; from src.utils.errors import exit_with\n"
        "sys.argv += ['--train.seed', os.environ['RANK']]; exit_with(pretrain.main)\n"
    )
    ends = machines().torchrun(program, "debug", *settings).ends()
    assert [code for code, _ in ends] == [2, 2]
    assert "train.seed: 1, in process 0 0" in ends[1][1]


STAND_INS = {
    "scontrol": """#!/bin/sh
case "$1" in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >> "$TEMP_DATA_DIR/requeued" ;;
esac
""",
    "srun": """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -USR1 $first $second' USR1
code=0
for task in $first $second; do
    while kill -0 $task 2>/dev/null; do task_code=0; wait $task || task_code=$?; done
    [ $task_code -le $code ] || code=$task_code
done
exit $code
""",
}


@pytest.fixture
def slurm(commands: Commands, data: str, tmp_path: Path) -> Callable[..., subprocess.Popen]:  # noqa: F811
    """Starts the job as Slurm would on two nodes: slurm(overrides...)."""
    for name, content in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    port = next(port for port in map(int, iter(free_port, "")) if 20000 <= port < 40000)
    job |= {"SLURM_JOB_ID": str(port - 20000)}  # the job's port is 20000 + its id % 20000
    job |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    job |= {"PRESET": "debug", "RUN_NAME": "job", "NPROC": "1"}

    vocabulary = ("--model.n-vocab", "50257")  # the launcher's last stages write a text

    def start(*overrides: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(ROOT / "slurm" / "pretrain.sbatch"), "--data.dir", data, *overrides, *SETTINGS, *vocabulary],
            env={**commands.environment, **job},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_a_preempted_job_goes_back_into_the_queue_and_on_to_the_end(commands: Commands, slurm):
    overrides = ("--train.total-steps", "200")
    requeued = commands.temp_data / "requeued"
    with slurm(*overrides) as job:
        wait_for_steps(commands, "job", 5, [job])
        job.send_signal(signal.SIGUSR1)
        _, words = job.communicate(timeout=120)
    assert job.returncode == 143, words
    assert len(requeued.read_text().splitlines()) == 1
    stopped_at = json.loads((commands.temp_data / "runs" / "job" / "status.json").read_text())["step"]
    assert 0 < stopped_at < 200
    with slurm(*overrides) as job:
        _, words = job.communicate(timeout=200)
    assert job.returncode == 0, words
    assert f"resume: from step_{stopped_at:07d} of 200 steps" in words
    assert len(requeued.read_text().splitlines()) == 1
    assert len(losses(commands, "job")) == 200


def test_a_job_that_its_user_stopped_stays_stopped(commands: Commands, slurm):
    with slurm("--train.total-steps", "100000") as job:
        wait_for_steps(commands, "job", 2, [job])
        (commands.temp_data / "runs" / "job" / "STOP").touch()
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=120)
    assert job.returncode == 143
    assert not (commands.temp_data / "requeued").exists()
