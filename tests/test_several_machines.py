"""Runs on several machines: several launchers on this one, each started as on a separate machine."""

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
from tests.drills.pair import fork_pair
from tests.drills.small_run import SETTINGS, start
from tests.test_processes import data, losses  # noqa: F401 (data: a fixture)


def free_port() -> str:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Machines:
    """Two machines with a launcher and a process each."""

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


def test_a_process_killed_on_one_machine_restarts_all(commands: Commands, data: Path, machines):  # noqa: F811
    """And a stop on one machine then stops and saves on both."""
    settings = ["--run-name", "far", "--data.dir", str(data), "--checkpoint.every-steps", "10", *SETTINGS]
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


def test_a_machine_that_does_not_come_is_waited_for_only_so_long(commands: Commands):
    options = ["--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "1", "--rdzv-conf", "timeout=3"]
    options += ["--master-addr", "127.0.0.1", "--master-port", free_port(), str(ROOT / "pretrain.py"), "debug"]
    ended = commands.module("src.utils.torchrun", *options)
    assert ended.returncode == torchrun.EXIT_LOST_MACHINE
    assert ended.stderr.splitlines()[-1].startswith("Cannot reach all machines: ")
    assert "Start the same command on all of them again." in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_directory_that_is_not_shared(commands: Commands, data: Path, tmp_path: Path):  # noqa: F811
    """The run resumes with the same machine first, and is refused with the other one first."""
    assert start(commands, data).returncode == 0
    others = {0: {"TEMP_DATA_DIR": str(tmp_path / "another disk")}}
    ended = fork_pair(commands, tmp_path, "", data, "--train.micro-batch-size", "4", variables=others)
    assert ended.code == 2
    assert ended.stderr.count("has checkpoints up to step 4 in") == 1


def test_machines_with_other_settings_are_refused(commands: Commands, data: Path, tmp_path: Path):  # noqa: F811
    ended = fork_pair(commands, tmp_path, "sys.argv += ['--train.seed', os.environ['RANK']]\n", data)
    assert ended.code == 2
    assert "train.seed: 1, in process 0 0" in ended.stderr


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
def slurm(commands: Commands, data: Path, tmp_path: Path) -> Callable[..., subprocess.Popen]:  # noqa: F811
    """Starts the job as Slurm would on two nodes: slurm(overrides...)."""
    for name, content in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    port = next(port for port in map(int, iter(free_port, "")) if 20000 <= port < 40000)
    job |= {"SLURM_JOB_ID": str(port - 20000)}  # the job's port is 20000 + its id % 20000
    job |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    job |= {"PRESET": "debug", "RUN_NAME": "job", "NPROC": "1"}

    vocabulary = ("--model.n-vocab", "50257")  # the launcher's last stages write a text

    def submit(*overrides: str, folder: Path = ROOT) -> subprocess.Popen:
        return subprocess.Popen(
            [str(ROOT / "slurm" / "pretrain.sbatch"), "--data.dir", str(data), *overrides, *SETTINGS, *vocabulary],
            env={**commands.environment, **job, "SLURM_SUBMIT_DIR": str(folder)},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )

    return submit


def test_a_preempted_job_goes_back_into_the_queue_and_on_to_the_end(commands: Commands, slurm):
    overrides = ("--train.total-steps", "200")
    requeued = commands.temp_data / "requeued"
    with slurm(*overrides) as job:
        wait_for_steps(commands, "job", 5, [job])
        job.send_signal(signal.SIGUSR1)
        _, output = job.communicate(timeout=120)
    assert job.returncode == 143, output
    assert len(requeued.read_text().splitlines()) == 1
    stopped_at = json.loads((commands.temp_data / "runs" / "job" / "status.json").read_text())["step"]
    assert 0 < stopped_at < 200
    with slurm(*overrides) as job:
        _, output = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert f"resume: from step_{stopped_at:07d} of 200 steps" in output
    assert len(requeued.read_text().splitlines()) == 1
    assert len(losses(commands, "job")) == 200


STOPPED_LAUNCHER = """#!/usr/bin/env bash
trap 'exit 143' USR1
echo "  \\"launch\\": \\"$LAUNCH_ID\\"" >"$TEMP_DATA_DIR/runs/job/config.json"
touch "$TEMP_DATA_DIR/started"
while :; do sleep 0.05; done
"""


def test_a_job_that_its_user_stopped_stays_stopped(commands: Commands, slurm, tmp_path: Path):
    """Here with a stand-in for the launcher."""
    submitted, status = tmp_path / "submitted", commands.temp_data / "runs" / "job" / "status.json"
    submitted.mkdir()
    (submitted / "run_pre_training_e2e.sh").write_text(STOPPED_LAUNCHER)
    (submitted / "run_pre_training_e2e.sh").chmod(0o755)
    status.parent.mkdir(parents=True)
    status.write_text('{"message": "stopped on request after step 7 (the file STOP)"}')
    with slurm(folder=submitted) as job:
        while not (commands.temp_data / "started").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=120)
    assert job.returncode == 143
    assert not (commands.temp_data / "requeued").exists()
