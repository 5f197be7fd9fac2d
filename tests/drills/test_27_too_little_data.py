"""Drill 27: less data than one batch, no validation data, no questions, or none that can be read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Commands
from tests.drills.small_run import refusal

ITEM = {"ind": 1, "ctx": "A cat sits", "endings": ["down.", "up.", "in.", "out."], "label": 0}


def test_less_than_one_batch(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=[60, 70], n_vocab=300)  # 3 + 4 windows; a batch takes 8 of 16 + 1 tokens
    message = refusal(commands, data)
    assert f"the train part of {data}: it holds 130 tokens, which is 7 windows of n_ctx + 1 = 17" in message
    assert "At least 8 are needed, or 129 tokens" in message
    assert not (commands.temp_data / "runs").exists()


def test_an_empty_validation_shard(commands: Commands, dataset: Callable[..., Path]):
    message = refusal(commands, dataset(train_tokens=[700], val_tokens=0, n_vocab=300))
    assert "holds 0 tokens, which is 0 windows" in message
    assert "At least 1 are needed, or 17 tokens" in message
    assert not (commands.temp_data / "runs").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", " is empty. Needed: ind (an integer), ctx (text), endings (four texts) and label (0 to 3)"),
        (json.dumps(ITEM) + "\n" + json.dumps({**ITEM, "endings": ["down."]}), ", line 2: missing or wrong: endings. "),
    ],
)
def test_multiple_choice_that_cannot_be_asked(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path, content: str, expected: str
):
    items = tmp_path / "items.jsonl"
    items.write_text(content)
    data = dataset(train_tokens=[700], val_tokens=500, n_vocab=300)
    message = refusal(commands, data, "--eval.hellaswag-items", "10", "--eval.hellaswag-data", str(items))
    assert f"{items}{expected}" in message
    assert not (commands.temp_data / "runs").exists()
