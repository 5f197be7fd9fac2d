"""A file's content, a way to save it, and where the runs go."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain
import src.params
from src.utils import root
from tests.model_utils.reference_files.files import Content, HParams, adamw, file_content, reference_parameters


@pytest.fixture
def content() -> Content:
    """Of a file after three steps."""
    parameters = reference_parameters()
    optimizer = adamw(parameters)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return file_content(parameters, optimizer, step=3)


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Writes a file as the reference does, where its class has the name that it has there."""

    def write(content: Any) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(src.params, "HParams", HParams, raising=False)
            torch.save(content, tmp_path / "model.pth")
        return tmp_path / "model.pth"

    return write


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(root, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(pretrain, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"
