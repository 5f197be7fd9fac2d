"""The GPU path on a stand-in for a GPU: PyTorch's CUDA build on a CPU, whose kernels do nothing (stand_in.py).

    CUDA_PYTHON=VENV/bin/python ./run_tests.sh tests/gpu_stand_in

The interpreter needs requirements.txt with PyTorch's CUDA build, 5 GB. About ten minutes on two cores.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.model_configs.my_llm_config import PRESETS
from src.model_utils.memory_estimate import Step, estimate_memory
from src.utils.root import ROOT
from tests.conftest import write_dataset
from tests.gpu_stand_in.stand_in import build, environment

PYTHON = os.environ.get("CUDA_PYTHON", "")
Run = Callable[..., subprocess.CompletedProcess[str]]


def missing() -> str:
    """The reason why these tests cannot run, or ""."""
    if not PYTHON:
        return "CUDA_PYTHON does not name a Python with PyTorch's CUDA build"
    check = "import torch, sys; sys.exit(torch.version.cuda is None)"
    if not Path(PYTHON).exists() or subprocess.run([PYTHON, "-c", check], capture_output=True, check=False).returncode:
        return f"CUDA_PYTHON = {PYTHON} has no PyTorch built for CUDA"
    return ""


pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_in")
    build(PYTHON, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "random", [300_000], 10_000, 50_257)


@pytest.fixture(scope="module")
def run(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(*arguments, sm=..., memory_gb=..., devices=...): a Python program of the project."""
    temp_data = tmp_path_factory.mktemp("temp_data")

    def program(*arguments: str, **gpu: Any) -> subprocess.CompletedProcess[str]:
        variables = environment(libraries, **gpu) | {"TEMP_DATA_DIR": str(temp_data), "OMP_NUM_THREADS": "1"}
        command = [PYTHON, *arguments]
        return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)

    return program


def steps(run: Run, settings: dict[str, Any], **gpu: Any) -> dict[str, Any]:
    result = run("-m", "tests.gpu_stand_in.steps", json.dumps(settings), **gpu)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("preset", "launches", "triton_gb"),
    # Of a step of two micro-batches, and of one. The bytes count rotary positions twice (docs/performance.md).
    [("lf_llm_269m", 1_890, 118.5), ("lf_llm_269m_fast", 2_070, 107.0)],
)
@pytest.mark.parametrize(("sm", "attention"), [(80, "flash"), (90, "cudnn")])
def test_a_full_size_step(
    run: Run, data: Path, preset: str, launches: int, triton_gb: float, sm: int, attention: str
) -> None:
    """Waits once, takes the memory that the planner says, and no more launches and traffic than today."""
    config = PRESETS[preset]()
    numbers = steps(run, {"preset": preset, "data": str(data), "compile": "on"}, sm=sm)
    assert len(numbers["waits"]) == 1
    assert numbers["counts"]["copy D2H"] == 1
    assert numbers["attention"] == attention
    step = Step(config.model, 16, is_compiled=True, has_muon=config.optim.optimizer == "muon")
    assert numbers["peak_gb"] == pytest.approx(estimate_memory(step).total / 1e9, rel=0.02)
    assert numbers["launches"] <= launches
    assert 0 < numbers["triton_gb"] <= triton_gb


@pytest.mark.parametrize("compiled", ["on", "off"])
@pytest.mark.parametrize("preset", ["lf_llm_269m", "lf_llm_269m_fast"])
def test_a_deterministic_step(run: Run, data: Path, preset: str, compiled: str) -> None:
    """PyTorch raises an error for an operator without a deterministic form."""
    numbers = steps(run, {"preset": preset, "data": str(data), "compile": compiled, "deterministic": True}, sm=90)
    assert len(numbers["waits"]) == 1


@pytest.mark.parametrize("memory_gb", [25.3, 42.4, 85.1])
def test_the_largest_micro_batch_that_fits(run: Run, data: Path, memory_gb: float) -> None:
    settings = {"preset": "lf_llm_269m", "data": str(data), "compile": "off", "micro": "auto", "steps": 1}
    size = steps(run, settings, memory_gb=memory_gb)["micro_batch_size"]
    needed = [estimate_memory(Step(PRESETS["lf_llm_269m"]().model, n)).total / 1e9 for n in (size, 2 * size)]
    assert needed[0] < memory_gb < 1.05 * needed[1]


def test_two_processes_and_the_commands(run: Run, data: Path) -> None:
    settings = [
        "debug",
        "--run-name",
        "two",
        "--data.dir",
        str(data),
        "--train.total-steps",
        "4",
        "--train.compile",
        "on",
    ]
    settings += ["--checkpoint.every-steps", "2", "--eval.hellaswag-items", "0", "--train.batch-tokens", "8192"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain.py")
    result = run(*launcher, *settings, devices=2)
    assert result.returncode == 0, result.stderr
    assert "all 4 steps are done" in result.stderr
    for command in (
        ("-m", "src.model_assessment.sampling", "--prompt", "One", "--max-new-tokens", "5"),
        ("-m", "src.model_assessment.evaluate", "--data", str(data), "--hellaswag", "none"),
    ):
        result = run(*command, "--checkpoint", "two", "--device", "cuda")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])
