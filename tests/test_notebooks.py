"""Every notebook runs from top to bottom, offline, on a small model made here."""

import json
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from src.utils.root import ROOT
from tests.model_utils.exports import make_run, small_model

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(notebook: Path, values: dict[str, Any], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """Run a notebook with other values in its first code cell; raises if a cell fails."""
    content = nbformat.read(notebook, as_version=4)
    first = next(cell for cell in content.cells if cell.cell_type == "code")
    first.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(content, timeout=120, kernel_name="python3").execute(cwd=str(notebook.parent))
    return content


def offline(temp_data: Path) -> dict[str, str]:
    return {"TEMP_DATA_DIR": str(temp_data), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def pictures(content: nbformat.NotebookNode) -> int:
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.data for output in outputs if "data" in output)


def printed(content: nbformat.NotebookNode) -> str:
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("weights", ["auto", "bf16"])
def test_sampling_from_a_run(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "runs" / "words", small_model())
    values = {"MODEL": "words", "WEIGHTS": weights, "PROMPT": "Once"}
    content = run(ROOT / "notebooks" / "hf_sampling.ipynb", values, offline(tmp_path), monkeypatch)
    parameters = sum(parameter.numel() for parameter in small_model().parameters())
    assert f"{parameters:,} parameters, step 40, context 64 tokens" in printed(content)
    assert "60 tokens" in printed(content)
    assert pictures(content) == 2


def test_the_model_from_first_principles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The notebook's checks fail if it differs from our modules; this test counts them, on a trained run too."""
    make_run(tmp_path / "runs" / "words", small_model())
    content = run(ROOT / "notebooks" / "notes.ipynb", {"RUN": "words"}, offline(tmp_path), monkeypatch)
    assert printed(content).count("equal, shape") == 12
    assert "step 40: 2 blocks of 2 heads" in printed(content)
    assert pictures(content) == 7


def test_without_a_trained_model_the_notebooks_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = nbformat.read(ROOT / "notebooks" / "notes.ipynb", as_version=4)
    needed = ("RUN = ", "import ", "load_model(")
    content.cells = [cell for cell in content.cells if any(text in cell.source for text in needed)]
    nbformat.write(content, tmp_path / "last_part.ipynb")
    (tmp_path / "src").symlink_to(ROOT / "src")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"Train one in minutes with \./run_pre_training"):
        run(tmp_path / "last_part.ipynb", {"RUN": "gone"}, offline(tmp_path), monkeypatch)


@pytest.mark.parametrize("names", [["words", "gone"], []], ids=["a run", "the published one alone"])
def test_curves_of_runs(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train = [{"kind": "train", "step": n, "time": n, "loss": 9.0 - n, "tokens_seen": 512 * n} for n in range(1, 5)]
    validation = [{"kind": "validation", "step": 4, "time": 5, "loss": 4.5, "tokens": None}]
    metrics = tmp_path / "runs" / "words" / "metrics.jsonl"  # most fields are missing
    metrics.parent.mkdir(parents=True)
    metrics.write_text("".join(json.dumps(record) + "\n" for record in [*train, *validation]))
    content = run(ROOT / "notebooks" / "metric_graphs.ipynb", {"RUNS": names}, offline(tmp_path), monkeypatch)
    assert ("skipped gone: " in printed(content)) == ("gone" in names)
    assert "9,999,745,024     2.855      2.806       16.5     35.55%   308,837" in printed(content)
    assert ("2,048     5.000      4.500       90.0          -         -" in printed(content)) == ("words" in names)
    assert pictures(content) == 6


def test_parameters_are_counted_and_a_sweep_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = {"SWEEP_STEPS": 2, "SWEEP_RATES": (1e-3, 1e-2)}
    content = run(ROOT / "notebooks" / "parameters_tuning.ipynb", values, offline(tmp_path), monkeypatch)
    assert "1,089,152 parameters, 2 steps" in printed(content)
    assert "9.29e-06 at the first" in printed(content)  # the published log's first learning rate
    shown = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    tables = "".join(output.data.get("text/markdown", "") for output in shown if "data" in output)
    assert "| 16 x 1,024 (the reference) | 320,145,408 | 268,682,240 |" in tables
    assert all(f"| {model} |" in tables for model in ("GPT-3 350M", "OpenELM 270M", "Llama 3.2 1B", "MolmoE 1B"))
    assert pictures(content) == 5


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_saved_as_it_ran(notebook: Path):
    """Stored outputs come from one run in order, without errors, small, and name no path of this machine."""
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert notebook.stat().st_size < 600_000
    assert str(ROOT.parent) not in notebook.read_text(encoding="utf-8")
