"""Drill 35: the user's settings of matplotlib, no home, no name; and a report that fails after a run that is done."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.utils.root import ROOT
from tests.conftest import Commands, write_dataset
from tests.drills.small_run import arguments
from tests.drills.trained import trained, trained_once  # noqa: F401 (fixtures)

REPORT = [sys.executable, "-m", "src.model_assessment.report", "drill"]


def pictures(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "plots").iterdir()}


def test_the_pictures_are_the_same(commands: Commands, trained: Path, tmp_path: Path):  # noqa: F811
    assert commands.run(REPORT).returncode == 0
    expected = pictures(trained)
    assert expected
    settings = tmp_path / "matplotlibrc"
    settings.write_bytes(b"text.usetex: True\nfont.size: 40\nbackend: module://nowhere\nnot a setting\n\xff\xfe\n")
    plain = commands.environment
    for odd in (
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "nonsense"},
        {"MATPLOTLIBRC": str(settings)},
    ):
        commands.environment = plain | odd
        result = commands.run(REPORT)
        assert result.returncode == 0, (odd, result.stderr)
        assert pictures(trained) == expected, odd


def test_no_home_and_no_name(commands: Commands, trained: Path):  # noqa: F811
    nobody = ["unshare", "-U", "--map-user=54321"]
    if not shutil.which("unshare") or subprocess.run([*nobody, "true"], check=False).returncode:
        pytest.skip("this machine gives users no private namespaces")
    for name in ("HOME", "USER", "LOGNAME"):
        commands.environment.pop(name, None)
    result = commands.run([*nobody, *REPORT])
    assert result.returncode == 0, result.stderr
    assert pictures(trained)
    assert "Traceback" not in result.stderr


def test_a_run_stays_done_where_its_report_fails(commands: Commands, tmp_path: Path):
    data = write_dataset(tmp_path / "datasets" / "random", [700, 900], 2_000, 300)
    run = commands.temp_data / "runs" / "drill"
    (run / "report.html" / "in the way").mkdir(parents=True)
    commands.environment |= {"PYTHON": sys.executable, "DEBUG_MODE": "True"}
    result = commands.run([str(ROOT / "run_pre_training_e2e.sh"), *arguments(data)[1:]])
    assert result.returncode == 0, result.stderr
    assert f"Cannot write {run / 'report.html'}: Is a directory." in result.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "done"
