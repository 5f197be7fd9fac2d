"""Drill 36: variables of the environment that break shells, imports and connections; a machine without loopback."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.utils.root import ROOT
from tests.conftest import Commands, write_dataset
from tests.drills.small_run import arguments, module
from tests.drills.trained import trained, trained_once  # noqa: F401 (fixtures)


@pytest.mark.parametrize(
    ("variable", "value", "cause"),
    [
        ("ALL_PROXY", "socks5h://127.0.0.1:9", "Run pip install socksio, or unset ALL_PROXY"),
        ("http_proxy", "http://me:secret@127.0.0.1:9", "http_proxy is '127.0.0.1:9'. Check that this proxy works"),
        ("SSL_CERT_FILE", "/no/such/file", "SSL_CERT_FILE is '/no/such/file': No such file or directory. Unset it"),
        ("REQUESTS_CA_BUNDLE", "/etc/hostname", "REQUESTS_CA_BUNDLE is '/etc/hostname': "),
    ],
)
def test_a_hub_out_of_reach_names_the_variable(
    commands: Commands,
    trained: Path,  # noqa: F811
    variable: str,
    value: str,
    cause: str,
):
    commands.environment[variable] = value
    hub = ("--hub", "owner/name", "checkpoint.pth", "--run-name", "imported")
    for name, options in (
        ("src.model_assessment.hellaswag", ("--checkpoint", str(trained))),
        ("src.model_utils.reference_import", hub),
    ):
        result = module(commands, name, *options)
        assert result.returncode == 2, result.stderr
        assert cause in result.stderr
        assert "Traceback" not in result.stderr
        assert "secret" not in result.stderr


def test_a_shell_and_an_interpreter_with_settings(commands: Commands, tmp_path: Path):
    data = write_dataset(tmp_path / "datasets" / "random", [700, 900], 2_000, 300)
    commands.environment |= {"PYTHON": sys.executable, "DEBUG_MODE": "True", "PYTHONSAFEPATH": "1"}
    commands.environment |= {"CDPATH": f"{ROOT.parent}:/", "PYTHONOPTIMIZE": "2"}
    launcher = f"{ROOT.name}/run_pre_training_e2e.sh"
    result = commands.run([launcher, *arguments(data)[1:], "--dry-run"], cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    result = commands.pretrain(*arguments(data), "--dry-run")
    assert result.returncode == 0, result.stderr


def test_no_loopback(commands: Commands, tmp_path: Path):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("this machine gives users no private namespaces")
    data = write_dataset(tmp_path / "datasets" / "random", [700, 900], 2_000, 300)
    commands.environment |= {"PYTHON": sys.executable, "DEBUG_MODE": "True", "NPROC": "2"}
    result = commands.run(["unshare", "-rn", str(ROOT / "run_pre_training_e2e.sh"), *arguments(data)[1:]])
    assert result.returncode == 2, result.stderr
    assert "127.0.0.1: Network is unreachable. Run ip link set lo up, or set NPROC=1." in result.stderr
    assert not (commands.temp_data / "runs").exists()
