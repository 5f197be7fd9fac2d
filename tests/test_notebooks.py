"""Every notebook runs from top to bottom, offline, on a small model made here."""

from pathlib import Path

import nbclient
import nbformat
import pytest

from src.utils.root import ROOT
from tests.model_utils.exports import make_run, small_model

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(notebook: Path, values: dict[str, str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """The notebook after a run with other values in its first code cell; raises where a cell fails."""
    content = nbformat.read(notebook, as_version=4)
    first = next(cell for cell in content.cells if cell.cell_type == "code")
    first.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(content, timeout=120, kernel_name="python3").execute(cwd=str(notebook.parent))
    return content


def printed(content: nbformat.NotebookNode) -> str:
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_sampling_from_a_run(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "runs" / "words", small_model())
    offline = {"TEMP_DATA_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    values = {"MODEL": "words", "WEIGHTS": weights, "PROMPT": "Once"}
    content = run(ROOT / "notebooks" / "hf_sampling.ipynb", values, offline, monkeypatch)
    parameters = sum(parameter.numel() for parameter in small_model().parameters())
    assert f"{parameters:,} parameters, step 40, context 64 tokens" in printed(content)
    assert "60 tokens" in printed(content)
    pictures = [o for c in content.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in picture.data for picture in pictures) == 2


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_saved_as_it_ran(notebook: Path):
    """With outputs, of cells that ran once in order, without errors, small, and with nothing of the machine."""
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert notebook.stat().st_size < 600_000
    assert str(ROOT.parent) not in notebook.read_text(encoding="utf-8")
