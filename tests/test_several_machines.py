"""Runs on several machines: several launchers on this one, each as it would be started on its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import socket

import pytest

from src.utils.root import ROOT
from tests.conftest import Commands
from tests.test_processes import SETTINGS, data, losses  # noqa: F401 (data: a fixture)

FAILING_RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pretrain
from src.utils.errors import StorageError, exit_with

original = pretrain.train_step

def train_step(run, batches):
    if run.state.progress.step == 12 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        {fault}
    return original(run, batches)

pretrain.train_step = train_step
exit_with(pretrain.main)
"""


def free_port() -> str:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def machines(
    commands: Commands,
    program: Path,
    *arguments: str,
    wait: int = 60,
    max_restarts: int = 3,
    disks: tuple[Path, ...] = (),
) -> Iterator[list[subprocess.Popen]]:
    """Two launchers with a process each; what is left of them is killed at the end. `disks`: of their runs."""
    place = ["--machines", "2", "--master-addr", "127.0.0.1", "--master-port", free_port(), "--wait-seconds", str(wait)]
    launch = [sys.executable, "-m", "src.utils.launch", *place, "--max-restarts", str(max_restarts)]
    started = [
        subprocess.Popen(
            [*launch, "--machine", str(machine), str(program), *arguments],
            env=commands.environment | ({"TEMP_DATA_DIR": str(disks[machine])} if disks else {}),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for machine in range(2)
    ]
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                kill_machine(process)
            process.communicate()


def kill_machine(launcher: subprocess.Popen) -> None:
    """The launcher and its processes, as a power cut would."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True, check=False
    )
    for pid in [launcher.pid, *map(int, found.stdout.split())]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


def ends(launchers: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    words = [process.communicate(timeout=120)[1] for process in launchers]
    return list(zip([process.returncode for process in launchers], words, strict=True))


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_steps(commands: Commands, run: str, steps: int, launchers: list[subprocess.Popen]) -> None:
    log, deadline = commands.temp_data / "runs" / run / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"train"') >= steps):
        assert all(process.poll() is None for process in launchers)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def failing(folder: Path, fault: str) -> Path:
    program = folder / "pretrain.py"
    program.write_text(FAILING_RUN.format(root=str(ROOT), fault=fault))
    return program


@pytest.fixture
def settings(data: str) -> list[str]:  # noqa: F811 (the fixture)
    return ["debug", "--run-name", "far", "--data.dir", data, "--checkpoint.every-steps", "10", *SETTINGS]


def test_a_process_killed_on_one_machine_starts_all_again(commands: Commands, settings: list[str], tmp_path: Path):
    program = failing(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    with machines(commands, program, *settings, "--train.total-steps", "20") as launchers:
        first, second = ends(launchers)
    assert (first[0], second[0]) == (0, 0)
    assert "launch: process 1 was killed by SIGKILL; starting again, 1 of 3 times" in second[1]
    assert "resume: from step_0000010 of 20 steps" in first[1]
    assert len(losses(commands, "far")) == 20
    reference = ["--run-name", "near", "--train.total-steps", "20"]
    assert commands.pretrain(*settings, *reference, processes=2).returncode == 0
    assert losses(commands, "far") == losses(commands, "near")


def test_a_final_end_on_one_machine_is_final_on_all(commands: Commands, settings: list[str], tmp_path: Path):
    program = failing(tmp_path, "raise StorageError('the disk of process 1 is gone')")
    with machines(commands, program, *settings, "--train.total-steps", "100000") as launchers:
        first, second = ends(launchers)
    assert (first[0], second[0]) == (4, 4)
    assert "error (process 1): the disk of process 1 is gone" in second[1]
    assert "starting again, 2" not in first[1] + second[1]
    assert "resume" not in first[1]


@pytest.mark.parametrize("max_restarts", [0, 3])
def test_a_final_end_counts_where_its_machine_is_late_to_see_it(max_restarts: int, commands: Commands, tmp_path: Path):
    """The first machine sees its own process fail because of it, and would start again or end with 1."""
    ended = tmp_path / "ended"
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        f"ended = Path({str(ended)!r})\n"
        "ended.with_name('started' + os.environ['RANK']).touch()\n"
        "if os.environ['RANK'] == '1':\n"
        "    while not ended.with_name('paused').exists(): time.sleep(0.1)\n"
        "    Path(os.environ['EXIT_CODE_FILE']).write_text('4')\n"
        "    ended.touch()\n    sys.exit(4)\n"
        "while not ended.exists(): time.sleep(0.1)\n"
        "sys.exit(1)\n"
    )
    with machines(commands, program, max_restarts=max_restarts) as launchers:
        wait_until(lambda: all(ended.with_name(f"started{rank}").exists() for rank in range(2)))
        launchers[1].send_signal(signal.SIGSTOP)
        ended.with_name("paused").touch()
        wait_until(ended.exists)
        time.sleep(3)  # for the first machine to see what happened to its own process
        launchers[1].send_signal(signal.SIGCONT)
        found = ends(launchers)
    assert [code for code, _ in found] == [4, 4]


def test_a_failure_without_restarts_left_ends_all(commands: Commands, tmp_path: Path):
    """Here with a process on the other machine that would go on for ever."""
    program = tmp_path / "program.py"
    program.write_text("import os, sys, time\nsys.exit(1) if os.environ['RANK'] == '1' else time.sleep(600)\n")
    with machines(commands, program, max_restarts=0) as launchers:
        found = ends(launchers)
    assert [code for code, _ in found] == [1, 1]
    assert "launch: process 1 ended with exit code 1; giving up" in found[1][1]
    assert all("Traceback" not in words for _, words in found)


@pytest.mark.parametrize("machine", [0, 1])
def test_a_stop_on_one_machine_stops_and_saves_on_all(machine: int, commands: Commands, settings: list[str]):
    with machines(commands, ROOT / "pretrain.py", *settings, "--train.total-steps", "100000") as launchers:
        wait_for_steps(commands, "far", 5, launchers)
        launchers[machine].send_signal(signal.SIGTERM)
        found = ends(launchers)
    assert [code for code, _ in found] == [143, 143]
    assert all("Traceback" not in words and "closing signal" not in words for _, words in found)
    status = json.loads((commands.temp_data / "runs" / "far" / "status.json").read_text())
    assert status["state"] == "stopped"


@pytest.mark.parametrize(
    ("lost", "expected"),
    [(1, "1 of 2 machines are there after 3 s"), (0, "the first machine, 127.0.0.1:")],
)
def test_a_lost_machine_is_not_waited_for_for_long(lost: int, expected: str, commands: Commands, settings: list[str]):
    with machines(commands, ROOT / "pretrain.py", *settings, "--train.total-steps", "100000", wait=3) as launchers:
        wait_for_steps(commands, "far", 2, launchers)
        kill_machine(launchers[lost])
        started = time.monotonic()
        ((code, words),) = ends([launchers[1 - lost]])
    assert time.monotonic() - started < 60
    assert code == 1
    assert expected in words
    assert "start the same command on all of them again" in words


def test_processes_whose_launcher_is_killed_save_and_end(commands: Commands, settings: list[str]):
    """Else they would train on unseen, and keep the run from being started again."""
    with machines(commands, ROOT / "pretrain.py", *settings, "--train.total-steps", "100000") as launchers:
        wait_for_steps(commands, "far", 2, launchers)
        launchers[0].kill()
        assert ends([launchers[1]])[0][0] == 143
    status, deadline = commands.temp_data / "runs" / "far" / "status.json", time.monotonic() + 30
    while json.loads(status.read_text())["state"] != "stopped":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_directory_that_is_not_shared(commands: Commands, settings: list[str]):
    """Said; the run works and goes on with the same machine first, and with the other one first it is refused."""
    ours, others = commands.temp_data, commands.temp_data / "another disk"
    run = [*settings, "--train.total-steps", "100000"]
    with machines(commands, ROOT / "pretrain.py", *run, disks=(ours, others)) as launchers:
        wait_for_steps(commands, "far", 12, launchers)
        (ours / "runs" / "far" / "STOP").touch()
        (code, words), (_, silent) = ends(launchers)
    assert code == 143
    assert "cannot be seen from" in words
    assert "cannot be seen from" not in silent
    stopped_at = json.loads((ours / "runs" / "far" / "status.json").read_text())["step"]
    with machines(commands, ROOT / "pretrain.py", *run, disks=(others, ours)) as launchers:
        found = ends(launchers)
    assert [code for code, _ in found] == [2, 2]
    refusal = "".join(words for _, words in found)
    assert refusal.count(f"has checkpoints up to step {stopped_at} in {ours / 'runs' / 'far' / 'checkpoints'}") == 1
    with machines(commands, ROOT / "pretrain.py", *run, disks=(ours, others)) as launchers:
        wait_for_steps(commands, "far", stopped_at + 2, launchers)
        launchers[0].send_signal(signal.SIGTERM)
        (code, words), _ = ends(launchers)
    assert code == 143
    assert f"resume: from step_{stopped_at:07d} of 100000 steps" in words


def test_machines_with_other_settings_or_data_are_refused(commands: Commands, settings: list[str], tmp_path: Path):
    program = tmp_path / "pretrain.py"
    program.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import pretrain; from src.utils.errors import exit_with\n"
        "sys.argv += ['--train.seed', os.environ['RANK']]; exit_with(pretrain.main)\n"
    )
    with machines(commands, program, *settings) as launchers:
        found = ends(launchers)
    assert [code for code, _ in found] == [2, 2]
    assert "the processes of a run need the same settings and data" in found[1][1]
    assert "train.seed: 1, in process 0 0" in found[1][1]


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
