"""The shell launchers, in the circumstances people start them in."""

import json
import os
import re
import shlex
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
    names = (
        "DEBUG_MODE PRESET RUN_NAME DATA_SOURCE DATA_PATH DATA_DIR DATA_DATASET DATA_MAX_TOKENS NPROC TEMP_DATA_DIR "
    )
    names += "NNODES NODE_RANK MASTER_ADDR MASTER_PORT MAX_RESTARTS DATA_WAIT LAUNCH_ID"
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


def test_debug_from_another_folder_through_a_link_in_an_odd_environment(elsewhere: Path, tmp_path: Path):
    for folder in (tmp_path / "working", tmp_path / "decoy"):  # other packages named src, where Python looks first
        (folder / "src").mkdir(parents=True)
        (folder / "src" / "__init__.py").write_text("raise SystemExit('the wrong src')")
    script = tmp_path / "link"
    script.symlink_to(elsewhere / "run_pre_training_e2e_debug.sh")
    variables = {"PYTHONPATH": str(tmp_path / "decoy"), "PYTHONSAFEPATH": "1", "CDPATH": str(tmp_path)}
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


@pytest.fixture
def started(tmp_path: Path):
    """Starts a launcher in a new session: started(arguments, **variables); its stderr is kept in a file.

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


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, "1"), (signal.SIGTERM, "2")])
def test_a_stop_of_all_processes_saves_and_is_quiet(number: int, processes: str, texts: Path, tmp_path: Path, started):
    """And SIGTERM again during the save, which changes nothing. The same command then resumes."""
    variables = {
        "PRESET": "laptop",
        "DATA_PATH": "my texts",  # relative to where it is started
        "DATA_DIR": "mine",
        "RUN_NAME": "first",
        "TEMP_DATA_DIR": str(tmp_path / "big disk"),
        "NPROC": processes,
        "PYTHONPATH": str(tmp_path / "hook"),
    }
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(SLOW_SAVES.format(saving=str(tmp_path / "saving")))
    settings = [*SMALL, "--train.micro-batch-size", "4", "--checkpoint.every-steps", "100000"]
    run = tmp_path / "big disk" / "runs" / "first"
    process = started("--train.total-steps", "40", *settings, **variables)
    wait_for_steps(process, run, 1)
    os.killpg(process.pid, number)
    wait_for(process, (tmp_path / "saving").exists)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    messages = (tmp_path / "stderr").read_text()
    assert re.search("stopping: finishing step [0-9]+, then saving, in about [0-9]+ s", messages)
    assert messages.splitlines()[-1] == (
        f"to resume: PRESET=laptop RUN_NAME=first TEMP_DATA_DIR='{tmp_path}/big disk' "
        f"PYTHON={shlex.quote(sys.executable)} NPROC={processes} DATA_PATH='my texts' DATA_DIR=mine "
        f"{shlex.quote(f'{ROOT}/run_pre_training_e2e.sh')} "
        f"--train.total-steps 40 {' '.join(settings)}"
    )
    assert logged_steps(run)  # the steps before the first regular line count too
    assert "stopped on request after step" in messages
    assert "Traceback" not in messages
    assert "SignalException" not in messages
    assert left_over(process.pid) == []
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert damage(run / "checkpoints" / f"step_{status['step']:07d}") is None
    assert (run / "report.html").is_file()
    if processes == "2":
        result = launch(
            ROOT / "run_pre_training_e2e.sh", "--train.total-steps", "40", *settings, cwd=tmp_path, **variables
        )
        assert result.returncode == 0, result.stderr
        assert f"resume: from step_{status['step']:07d} of 40 steps" in result.stderr


def test_a_second_ctrl_c_quits_without_saving(texts: Path, tmp_path: Path, started):
    """Here during the save that the first one requested; the next start ignores it."""
    variables = {"DATA_PATH": str(texts), "RUN_NAME": "first", "TEMP_DATA_DIR": str(tmp_path / "data"), "NPROC": "2"}
    (tmp_path / "hook").mkdir()
    slow = SLOW_SAVES.format(saving=str(tmp_path / "saving")).replace("sleep(2)", "sleep(60)")
    (tmp_path / "hook" / "sitecustomize.py").write_text(slow)
    settings = [*SMALL, "--train.micro-batch-size", "4", "--train.total-steps", "400"]
    run = tmp_path / "data" / "runs" / "first"
    process = started("laptop", *settings, **variables, PYTHONPATH=str(tmp_path / "hook"))
    wait_for_steps(process, run, 1)
    os.killpg(process.pid, signal.SIGINT)
    wait_for(process, (tmp_path / "saving").exists)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert left_over(process.pid) == []
    assert "quit at once\n\nto resume: " in (tmp_path / "stderr").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir() if ".tmp-" not in path.name] == []


# Stands in for Python where torch would be imported: training ends with the codes that the file `ends` lists.
STAND_IN = """#!/bin/bash
case "$*" in
    *src.launcher_settings* | -c* | "- "*) exec "{python}" "$@" ;;
    *src.preflight*) exit 0 ;;
    *pretrain.py*)
        echo "$LAUNCH_ID" >>"{folder}/starts"
        end=$(sed -n "$(wc -l <"{folder}/starts")p" "{folder}/ends")
        case "$end" in [0-9]*) exit "$end" ;; esac
        touch "{folder}/ready"
        eval "$end"
        ;;
    *src.model_assessment.report*) touch "{folder}/ready" && exec sleep 60 ;;
esac
exit 9
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """stand_in(*ends): variables for launchers with it; an end is an exit code or a shell command."""

    def make(*ends: str) -> dict[str, str]:
        python = tmp_path / "python"
        python.write_text(STAND_IN.format(python=sys.executable, folder=tmp_path))
        python.chmod(0o755)
        (tmp_path / "ends").write_text("\n".join(ends))
        (tmp_path / "starts").write_text("")
        return {"PYTHON": str(python), "PRESET": "debug", "TEMP_DATA_DIR": str(tmp_path)}

    return make


def starts(tmp_path: Path) -> list[str]:
    return (tmp_path / "starts").read_text().split()


@pytest.mark.parametrize(
    ("ends", "restarts", "code", "message"),
    [
        (["1", "kill -KILL $$", "3"], "3", 3, "training was killed by SIGKILL\nrestart 2 of 3\n"),
        (["1", "1", "1"], "1", 1, "restart 1 of 1\ngiving up after 1 restart(s)\n"),
        (["143", "0"], "3", 143, "skipped, because training ended with"),
    ],
)
def test_a_run_that_died_is_restarted_and_a_final_end_is_final(
    ends: list[str], restarts: str, code: int, message: str, stand_in, tmp_path: Path
):
    variables = stand_in(*ends) | {"MAX_RESTARTS": restarts}
    result = launch(ROOT / "run_pre_training_e2e.sh", "--data.dir", "x", cwd=tmp_path, **variables)
    assert result.returncode == code
    assert message in result.stderr
    assert "line " not in result.stderr  # bash's own report of a process that was killed
    ids = starts(tmp_path)
    assert len(ids) == min(len(ends), 1 + int(restarts)) if code in (1, 3) else len(ids) == 1
    assert len(set(ids)) == 1  # one launch


def test_a_signal_stops_the_restarts_and_the_code_of_training_counts(stand_in, tmp_path: Path, started):
    (tmp_path / "training").write_text("trap 'exit 1' TERM\nwhile :; do sleep 0.1; done")
    process = started("--data.dir", "x", **stand_in(f"source {tmp_path / 'training'}", "0"))
    wait_for(process, (tmp_path / "ready").exists)
    time.sleep(0.5)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 1
    assert len(starts(tmp_path)) == 1


def test_a_second_stop_during_the_report_still_names_the_command_that_resumes(stand_in, tmp_path: Path, started):
    variables = stand_in("143")
    (tmp_path / "runs" / "debug").mkdir(parents=True)
    (tmp_path / "runs" / "debug" / "metrics.jsonl").write_text("{}\n")
    process = started("--data.dir", "x", **variables)
    wait_for(process, (tmp_path / "ready").exists)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "stderr").read_text().splitlines()[-1].startswith("to resume: PRESET=debug")


@pytest.mark.parametrize("streams", [">/dev/full 2>&1", "<&- >&- 2>&-"])
def test_streams_that_take_nothing_change_no_exit_code(streams: str, stand_in, tmp_path: Path):
    command = f"'{ROOT / 'run_pre_training_e2e.sh'}' --data.dir x {streams}"
    result = subprocess.run(
        ["bash", "-c", command], env=environment(**stand_in("1", "3")), cwd=tmp_path, timeout=120, check=False
    )
    assert (result.returncode, len(starts(tmp_path))) == (3, 2)


def test_another_machine_waits_for_the_data_only_so_long(tmp_path: Path):
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "DATA_WAIT": "1", "PRESET": "debug"}
    script, batch = ROOT / "run_pre_training_e2e.sh", ("--train.micro-batch-size", "2")
    result = launch(script, *batch, cwd=tmp_path, TEMP_DATA_DIR=str(tmp_path), **variables)
    assert result.returncode == 2
    manifest = tmp_path / "datasets" / "pydocs" / "manifest.json"
    assert f"error: Cannot find {manifest} after 1 s. See node 0's messages" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["--train.total-stps", "5"], {}, "--train.total-steps"),
        ([], {"PRESET": "lf_llm_269m"}, "or set DATA_SOURCE to files or pydocs."),
        ([], {"PRESET": "foo"}, "run_pre_training_e2e.sh: error: PRESET is 'foo'; it must be one of debug"),
        ([], {"PYTHON": "/nowhere/python"}, "error: Cannot find Python 3.10 to 3.13: PYTHON is '/nowhere/python'."),
    ],
)
def test_a_mistake_is_found_before_data_is_prepared(
    arguments: list[str], variables: dict[str, str], expected: str, tmp_path: Path
):
    variables = {"TEMP_DATA_DIR": str(tmp_path / "data"), "PRESET": "debug", **variables}
    result = launch(ROOT / "run_pre_training_e2e.sh", *arguments, cwd=tmp_path, **variables)
    assert result.returncode == 2
    assert expected in " ".join(result.stderr.replace("│", " ").split())
    assert "2/5 data" not in result.stderr
    assert not (tmp_path / "data").exists()


def test_a_dry_run_checks_and_does_nothing(tmp_path: Path):
    script = ROOT / "run_pre_training_e2e_debug.sh"
    result = launch(script, "--dry-run", cwd=tmp_path, TEMP_DATA_DIR=str(tmp_path / "data"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["failed"] == []
    assert not (tmp_path / "data").exists()


# Stands in for Python, and prints what it is asked to run.
ECHO = """#!/bin/bash
case "$*" in "-c import sys; sys.exit"* | "- "*) exec "{python}" "$@" ;; esac
shift 3 # -c, the program that runs a module, and the project's folder
printf '%s|' "$@"
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("sample mine A B --seed 1", "model_assessment.sampling|--checkpoint=mine|--seed|1|--prompt=A|--prompt=B"),
        (
            "sample mine --seed 1 -- -A --b",
            "model_assessment.sampling|--checkpoint=mine|--seed|1|--prompt=-A|--prompt=--b",
        ),
        ("evaluate a b --limit 9", "model_assessment.evaluate|--checkpoint|a|b|--limit|9"),
        ("report mine --compare b", "model_assessment.report|mine|--compare|b"),
        ("export mine out --dtype bf16", "model_utils.hf_export|--checkpoint|mine|--dtype|bf16|--out|out"),
        ("export mine --out=out", "model_utils.hf_export|--checkpoint|mine|--out=out"),
        ("export ./x/mine --format gguf", "model_utils.hf_export|--checkpoint|./x/mine|--format|gguf"),
        ("data a.txt b --workers 2", "data_processing.data_downloader|--source|files|--path|a.txt|b|--workers|2"),
        ("data pydocs", "data_processing.data_downloader|--source|pydocs"),
        ("data -- -a.txt", "data_processing.data_downloader|--source|files|--path|./-a.txt"),
        ("data --verify --out x", "data_processing.data_downloader|--verify|--out|x"),
        ("plan debug --sweep", "model_utils.planner|debug|--sweep"),
    ],
)
def test_the_front_command_hands_plain_arguments_on(arguments: str, expected: str, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(ECHO.format(python=sys.executable))
    python.chmod(0o755)
    result = launch(ROOT / "llm", *arguments.split(), cwd=tmp_path, PYTHON=str(python), TEMP_DATA_DIR="/data")
    assert (result.stdout, result.stderr) == (f"src.{expected}|", "")


def test_the_front_command_from_a_folder_with_another_src(tmp_path: Path):
    """With the processes that tokenise, which import the module again; and a command that does not exist."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text("raise SystemExit('the wrong src')")
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"a line of text {number}\n" * 60_000)
    result = launch(ROOT / "llm", "data", "0.txt", "1.txt", "2.txt", cwd=tmp_path, TEMP_DATA_DIR=str(tmp_path / "data"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["dataset"] == str(tmp_path / "data" / "datasets" / "0+1+2")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    nothing = launch(ROOT / "llm", "sample", cwd=tmp_path, TEMP_DATA_DIR=str(tmp_path))
    assert (nothing.returncode, nothing.stderr.endswith(f"The runs in {tmp_path}/runs: mine\n")) == (2, True)
    unknown = launch(ROOT / "llm", "trian", cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "error: Cannot find the command 'trian'. Choose train, preflight, sample," in unknown.stderr


def test_help_lists_the_variables(tmp_path: Path):
    result = launch(ROOT / "run_pre_training_e2e.sh", "--train.total-steps", "3", "--help", cwd=tmp_path)
    assert result.returncode == 0
    for name in ("PRESET", "RUN_NAME", "DATA_SOURCE", "NPROC", "NNODES", "MASTER_ADDR", "MAX_RESTARTS"):
        assert name in result.stdout
    assert "set -" not in result.stdout


@pytest.mark.parametrize(
    ("requirements", "missing"),
    [
        ("# comment\npytest==0.0.1  # too old\n\nno-such-package==1.0\n", "pytest==0.0.1 no-such-package==1.0"),
        (
            '-r base.txt\npytest==0.0.2; python_version < "3.10"\nanother==2; python_version >= "3.10"\n',
            "x==1 another==2",
        ),
        (f"-r {ROOT / 'requirements-dev.txt'}\n", ""),
    ],
)
def test_missing_packages_are_listed_by_name_and_version(requirements: str, missing: str, tmp_path: Path):
    (tmp_path / "base.txt").write_text("x==1\n")
    (tmp_path / "file.txt").write_text(requirements)
    script = f"ROOT='{tmp_path}'; . '{ROOT / 'src' / 'utils' / 'environment.sh'}'; _missing '{sys.executable}' file.txt"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout.strip(), result.returncode) == (missing, bool(missing))
