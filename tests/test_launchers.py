"""The shell launchers, in the circumstances people start them in."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from src.model_utils.checkpoint_utils import damage
from src.utils.check_environment import missing
from src.utils.root import ROOT

SMALL = [
    *("--model.n-embd", "32", "--model.n-head", "2", "--model.n-layer", "1", "--model.n-ctx", "64"),
    *("--train.batch-tokens", "512", "--train.micro-batch-size", "8", "--train.log-every-steps", "2"),
    *("--train.compile", "off"),
    *("--eval.val-tokens", "1024", "--eval.hellaswag-items", "8", "--eval.sample-tokens", "4"),
]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A copy of the project under another name with a space in it."""
    copy = tmp_path / "another name"
    ignored = shutil.ignore_patterns(".git", ".venv", "temp_data", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def environment(**variables: str) -> dict[str, str]:
    names = "DEBUG_MODE PRESET RUN_NAME DATA_SOURCE DATA_PATH DATA_DIR NPROC TEMP_DATA_DIR "
    names += "NNODES NODE_RANK MASTER_ADDR MASTER_PORT MAX_RESTARTS DATA_WAIT"
    kept = {name: value for name, value in os.environ.items() if name not in names.split()}
    return {**kept, "PYTHON": sys.executable, "HF_ENDPOINT": "http://127.0.0.1:9", "NPROC": "1", **variables}


def launch(script: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
        env=environment(**variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_debug_from_another_folder_with_a_misleading_pythonpath(elsewhere: Path, tmp_path: Path):
    for folder in (tmp_path / "working", tmp_path / "decoy"):  # other packages named src, where Python looks first
        (folder / "src").mkdir(parents=True)
        (folder / "src" / "__init__.py").write_text("raise SystemExit('the wrong src')")
    script = elsewhere / "run_pre_training_e2e_debug.sh"
    variables = {"PYTHONPATH": str(tmp_path / "decoy")}
    result = launch(script, "--train.total-steps", "4", *SMALL, cwd=tmp_path / "working", **variables)
    assert result.returncode == 0, result.stderr
    stages = [line for line in result.stderr.splitlines() if line.startswith("== ")]
    assert [line[3:6] for line in stages] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    run = elsewhere / "temp_data" / "runs" / "debug"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert (run / "report.html").is_file()
    manifest = json.loads((elsewhere / "temp_data" / "datasets" / "pydocs" / "manifest.json").read_text())
    assert manifest["counts"]["tokens"] > 300_000
    assert manifest["sources"][0]["packages"]["python"]

    before = (run / "metrics.jsonl").read_bytes()
    again = launch(script, "--train.total-steps", "4", *SMALL, cwd=tmp_path / "working", **variables)
    assert again.returncode == 0, again.stderr
    assert "already prepared" in again.stderr
    assert "all 4 steps are done" in again.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """200 documents that differ, in a folder with a space."""
    folder = tmp_path / "my texts"
    folder.mkdir()
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
    for i in range(200):
        sentence = " ".join(words[(i * j + j) % 12] for j in range(1, 120))
        (folder / f"{i:03d}.txt").write_text(f"Document {i}. {sentence}.")
    return folder


def test_files_of_ones_own_stopped_by_a_signal_and_started_again(texts: Path, tmp_path: Path):
    script = ROOT / "run_pre_training_e2e.sh"
    variables = {
        "PRESET": "laptop",
        "DATA_SOURCE": "files",
        "DATA_PATH": "my texts",  # relative to where it was started
        "DATA_DIR": "mine",
        "RUN_NAME": "first",
        "TEMP_DATA_DIR": str(tmp_path / "big disk"),
    }
    arguments = ["--train.total-steps", "100", "--checkpoint.every-steps", "1000", *SMALL]
    run = tmp_path / "big disk" / "runs" / "first"
    with subprocess.Popen(
        [str(script), *arguments], env=environment(**variables), cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not ((run / "metrics.jsonl").exists() and '"train"' in (run / "metrics.jsonl").read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # to the launcher alone, as a scheduler does
        assert process.wait(timeout=60) == 143
    stopped_at = json.loads((run / "status.json").read_text())["step"]
    assert 0 < stopped_at < 100
    assert (run / "report.html").is_file()
    result = launch(script, *arguments, cwd=tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert f"resume: from step_{stopped_at:07d} of 100 steps" in result.stderr


@pytest.fixture
def started(tmp_path: Path):
    """Starts a launcher in a session of its own: started(arguments, **variables); its stderr is kept in a file.

    `under`: the command that starts it.
    """
    running = []

    def start(*arguments: str, under: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / "stderr", "wb") as words:
            command = [*under, str(ROOT / "run_pre_training_e2e.sh"), *arguments]
            process = subprocess.Popen(
                command, env=environment(**variables), cwd=tmp_path, stderr=words, start_new_session=True
            )
        running.append(process)
        return process

    yield start
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged_steps(run: Path) -> int:
    """How many training lines the run in that folder has written."""
    log = run / "metrics.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


def wait_for_steps(process: subprocess.Popen[bytes], run: Path, lines: int) -> None:
    wait_for(process, lambda: logged_steps(run) >= lines)


def left_over(session: int) -> list[str]:
    """Processes of that session that are not yet dead."""
    states = subprocess.run(
        ["ps", "-o", "stat=,args=", "-s", str(session)], capture_output=True, text=True, check=False
    )
    return [line for line in states.stdout.splitlines() if not line.startswith("Z")]


def test_a_stop_during_preparation_reaches_it_and_leaves_nothing_behind(texts: Path, tmp_path: Path, started):
    for i in range(40):
        (texts / f"more {i}.txt").write_text(f"{i} " + "some words that take their time " * 20_000)
    data = tmp_path / "data"
    process = started(PRESET="laptop", DATA_PATH=str(texts), TEMP_DATA_DIR=str(data))
    wait_for(process, lambda: (data / "datasets").exists())
    process.send_signal(signal.SIGTERM)  # to the launcher alone
    assert process.wait(timeout=30) == 143
    deadline = time.monotonic() + 10  # for processes that only have to notice
    while left := left_over(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert "3/5" not in (tmp_path / "stderr").read_text()


# Python's own hook for what is done before every program: here it makes each save take two seconds more.
SLOW_SAVES = """
import os, time

rename = os.rename

def slow_rename(source, target, **options):
    if ".tmp-" in str(source):
        open({saving!r}, "w").close()
        time.sleep(2)
    rename(source, target, **options)

os.rename = slow_rename
"""


@pytest.mark.parametrize(("number", "restarts"), [(signal.SIGINT, "0"), (signal.SIGINT, "3"), (signal.SIGHUP, "3")])
def test_a_stop_reaches_all_and_is_quiet(number: int, restarts: str, texts: Path, tmp_path: Path, started):
    """Ctrl-C, and again during the save, and a terminal that is closed: both reach every process."""
    variables = {"PRESET": "laptop", "DATA_PATH": str(texts), "TEMP_DATA_DIR": str(tmp_path / "data")}
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(SLOW_SAVES.format(saving=str(tmp_path / "saving")))
    variables |= {"PYTHONPATH": str(tmp_path / "hook"), "MAX_RESTARTS": restarts}
    run = tmp_path / "data" / "runs" / "laptop"
    process = started("--train.total-steps", "100000", *SMALL, **variables)
    wait_for_steps(process, run, 1)
    os.killpg(process.pid, number)
    wait_for(process, (tmp_path / "saving").exists)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 143
    words = (tmp_path / "stderr").read_text()
    assert "stopped on request after step" in words
    assert "Traceback" not in words
    assert "SignalException" not in words
    assert left_over(process.pid) == []
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert damage(run / "checkpoints" / f"step_{status['step']:07d}") is None


def test_a_closed_terminal_is_not_heeded_under_nohup(texts: Path, tmp_path: Path, started):
    variables = {"PRESET": "laptop", "DATA_PATH": str(texts), "TEMP_DATA_DIR": str(tmp_path / "data")}
    run = tmp_path / "data" / "runs" / "laptop"
    process = started("--train.total-steps", "100000", *SMALL, under=("nohup",), **variables)
    wait_for_steps(process, run, 1)
    os.killpg(process.pid, signal.SIGHUP)
    wait_for_steps(process, run, logged_steps(run) + 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    (event,) = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"event"' in line]
    assert json.loads(event)["detail"] == "asked for by SIGTERM"


def test_another_machine_waits_for_the_data_only_so_long(tmp_path: Path):
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "DATA_WAIT": "1", "PRESET": "debug"}
    script, batch = ROOT / "run_pre_training_e2e.sh", ("--train.micro-batch-size", "8")
    result = launch(script, *batch, cwd=tmp_path, TEMP_DATA_DIR=str(tmp_path), **variables)
    assert result.returncode == 2
    manifest = tmp_path / "datasets" / "pydocs" / "manifest.json"
    assert f"waiting for {manifest}, at most 1 s" in result.stderr
    assert f"error: no {manifest} after 1 s; see what node 0 says" in result.stderr


def test_a_complete_run_is_left_alone(tmp_path: Path):
    """Here with training that finds nothing to do, and so leaves status.json as it is."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in -c* | *check_environment*) exec "{sys.executable}" "$@" ;; *src.preflight* | *pretrain.py*) exit 0 ;; esac
exit 9
"""
    )
    python.chmod(0o755)
    run = tmp_path / "runs" / "debug"
    run.mkdir(parents=True)
    (run / "status.json").write_text("{}")
    variables = {"PYTHON": str(python), "PRESET": "debug", "MAX_RESTARTS": "0", "TEMP_DATA_DIR": str(tmp_path)}
    script = ROOT / "run_pre_training_e2e.sh"
    assert launch(script, "--data.dir", "x", cwd=tmp_path, **variables).returncode == 9  # no report yet
    (run / "report.html").touch()
    result = launch(script, "--data.dir", "x", cwd=tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == f"the run is complete; its report is {run / 'report.html'}"
    assert "4/5" not in result.stderr


def test_a_python_that_is_asked_for_is_taken_or_nothing(tmp_path: Path):
    result = launch(ROOT / "run_pre_training_e2e_debug.sh", cwd=tmp_path, PYTHON="/nowhere/python")
    assert result.returncode == 2
    assert "error: PYTHON is '/nowhere/python', which is no Python 3.10 to 3.13; give" in result.stderr


def test_two_processes_through_the_launcher(texts: Path, tmp_path: Path):
    variables = {"PRESET": "laptop", "DATA_PATH": str(texts), "NPROC": "2", "TEMP_DATA_DIR": str(tmp_path / "data")}
    arguments = ["--run-name", "pair", "--train.total-steps", "2", "--train.device", "cpu", *SMALL]
    arguments += ["--train.micro-batch-size", "4"]
    result = launch(ROOT / "run_pre_training_e2e.sh", *arguments, cwd=tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "data" / "runs" / "pair" / "config.json").read_text())
    assert config["derived"]["world_size"] == 2
    assert (tmp_path / "data" / "runs" / "pair" / "report.html").is_file()


def test_a_mistake_keeps_its_exit_code_through_torchrun(texts: Path, tmp_path: Path):
    variables = {"PRESET": "laptop", "DATA_PATH": str(texts), "NPROC": "2", "TEMP_DATA_DIR": str(tmp_path / "data")}
    result = launch(ROOT / "run_pre_training_e2e.sh", "--train.total-step", "2", cwd=tmp_path, **variables)
    assert result.returncode == 2
    assert "--train.total-steps" in result.stderr


def test_small_presets_take_one_process_however_many_gpus_there_are(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\necho called >> '{tmp_path / 'called'}'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NPROC": "", "TEMP_DATA_DIR": str(tmp_path)}
    script = ROOT / "run_pre_training_e2e_debug.sh"
    result = launch(script, "--data.dir", "nowhere", cwd=tmp_path, **variables)
    assert "ok    processes:    1, " in result.stderr
    assert not (tmp_path / "called").exists()
    assert "no dataset at" in result.stderr


@pytest.mark.parametrize("value", ["False", "0", ""])
def test_debug_mode_off_means_the_full_size(value: str, tmp_path: Path):
    """Which is refused here, because the hub cannot be reached: with the sources that work."""
    result = launch(
        ROOT / "run_pre_training_e2e.sh", cwd=tmp_path, DEBUG_MODE=value, TEMP_DATA_DIR=str(tmp_path / "data")
    )
    assert result.returncode == 2
    assert "fineweb-edu-sample-10BT, to be prepared from fineweb-edu, but http://127.0.0.1:9 does not" in result.stderr
    assert "set DATA_SOURCE to files or pydocs" in result.stderr
    assert "FAIL  HellaSwag:    cannot fetch HellaSwag: http://127.0.0.1:9 does not answer" in result.stderr
    assert "2/5 data" not in result.stderr


def test_debug_mode_on_and_misspelt(tmp_path: Path):
    script = ROOT / "run_pre_training_e2e.sh"
    result = launch(script, "--model.n-embd", "30", cwd=tmp_path, DEBUG_MODE="True", TEMP_DATA_DIR=str(tmp_path))
    assert "not divisible by model.n_head = 4" in result.stderr  # the debug preset's heads
    assert result.returncode == 2
    result = launch(script, cwd=tmp_path, DEBUG_MODE="yes please")
    assert result.returncode == 2
    assert "DEBUG_MODE is 'yes please'; use True or False" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["--train.total-stps", "5"], {}, "--train.total-steps"),
        ([], {"PRESET": "foo"}, "PRESET is 'foo'; use debug, laptop or lf_llm_269m"),
        (["--train.micro-batch-size", "3"], {}, "cannot share evenly"),
        ([], {"NPROC": "0"}, "NPROC is '0'; it must be a number of processes"),
        ([], {"NPROC": "x"}, "NPROC is 'x'; it must be a number of processes"),
        ([], {"NNODES": "0"}, "NNODES is '0'; it must be a number of machines"),
        ([], {"NODE_RANK": "a"}, "NODE_RANK is 'a'; it must be this machine's number, from 0 to NNODES - 1"),
        ([], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK is '2'; it must be this machine's number, from 0 to 1"),
        ([], {"NNODES": "2"}, "MASTER_ADDR is not set; with NNODES=2 it must name the machine of NODE_RANK=0"),
        ([], {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ([], {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS is '-1'; it must be how many times"),
        ([], {"DATA_SOURCE": "pydoc"}, "DATA_SOURCE is 'pydoc'; use pydocs, files or fineweb-edu"),
        ([], {"PRESET": "laptop"}, "DATA_PATH is not set"),
    ],
)
def test_a_mistake_is_found_before_data_is_prepared(
    arguments: list[str], variables: dict[str, str], expected: str, tmp_path: Path
):
    variables = {"TEMP_DATA_DIR": str(tmp_path / "data"), **variables}
    result = launch(ROOT / "run_pre_training_e2e.sh", *arguments, cwd=tmp_path, **variables)
    assert result.returncode == 2
    assert expected in " ".join(result.stderr.replace("│", " ").split())
    assert "2/5 data" not in result.stderr
    assert not (tmp_path / "data").exists()


def test_help_lists_the_variables(tmp_path: Path):
    result = launch(ROOT / "run_pre_training_e2e.sh", "--help", cwd=tmp_path)
    assert result.returncode == 0
    for name in (
        "PRESET",
        "RUN_NAME",
        "DATA_SOURCE",
        "NPROC",
        "NNODES",
        "MASTER_ADDR",
        "MAX_RESTARTS",
        "TEMP_DATA_DIR",
    ):
        assert name in result.stdout
    assert "set -" not in result.stdout


def test_missing_packages_are_found_by_name_and_version(tmp_path: Path):
    (tmp_path / "base.txt").write_text("# comment\npytest==0.0.1  # too old\n\nno-such-package==1.0\n")
    (tmp_path / "more.txt").write_text("-r base.txt\nanother-missing==2\n")
    assert missing(tmp_path / "more.txt") == ["pytest==0.0.1", "no-such-package==1.0", "another-missing==2"]
    old, new = 'pytest==0.0.2; python_version < "3.10"', 'pytest==0.0.3; python_version >= "3.10"'
    (tmp_path / "some.txt").write_text(f"{old}  # no such Python is supported\n{new}\n")
    assert missing(tmp_path / "some.txt") == ["pytest==0.0.3"]
    assert missing(ROOT / "requirements-dev.txt") == []
