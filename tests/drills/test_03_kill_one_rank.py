"""Drill 3: SIGKILL one of two ranks; the launcher restarts the run."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.pair import fork_pair, program, run_pair
from tests.drills.small_run import LONGER, arguments, assert_same_run

KILL = """
import signal
def kill(run):
    if not os.path.exists(os.path.join(folder, "moment")):  # once
        moment()
        os.kill(os.getpid(), signal.SIGKILL)
at_step(6, 1, kill)
"""


def test_the_launcher_restarts_the_run_to_the_same_bits(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    """In a copy of the launcher next to a pretrain.py that kills itself once."""
    data, copy = dataset(train_tokens=[700, 900], n_vocab=300), tmp_path / "copy"
    copy.mkdir()
    for name in ("src", "requirements.txt"):
        (copy / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "run_pre_training_e2e.sh", copy)  # a link would lead it back
    (copy / "pretrain.py").write_text(program(tmp_path, KILL))
    commands.environment |= {"PYTHON": sys.executable, "NPROC": "2", "DEBUG_MODE": "True"}
    sampled = ("--model.n-vocab", "50257")  # the launcher's last stages write a text
    started = subprocess.run(
        ["bash", str(copy / "run_pre_training_e2e.sh"), *arguments(data, *LONGER, *sampled)[1:]],
        env=commands.environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert started.returncode == 0, started.stderr
    assert "process 1 died of SIGKILL" in started.stderr
    assert "restart 1 of 3" in started.stderr
    assert "resume: from step_0000004 of 12 steps" in started.stderr
    (resumed,) = [event["time"] for event in commands.metrics("drill", "event") if event["name"] == "resume"]
    assert resumed - float((tmp_path / "moment").read_text()) < 45  # torchrun had ended both, and started two others
    assert fork_pair(commands, tmp_path, "", data, *LONGER, *sampled, "--run-name", "whole").code == 0
    runs = commands.temp_data / "runs"
    assert_same_run(runs / "whole", runs / "drill", steps=12)


def test_one_that_dies_while_the_other_waits_for_it_to_build_the_model(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    lines = "if os.environ['RANK'] == '1':\n"
    lines += "    pretrain.DistributedDataParallel = lambda *_, **__: os.kill(os.getpid(), 9)\n"
    ended = run_pair(commands, tmp_path, lines, dataset(train_tokens=[700, 900], n_vocab=300))
    assert ended.code == 1
    assert "Cannot finish preparing model and optimizer: another process ended or hangs" in ended.stderr
    assert "process 1 died of SIGKILL" in ended.stderr
    assert "Traceback" not in ended.stderr
