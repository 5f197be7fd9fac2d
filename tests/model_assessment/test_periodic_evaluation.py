"""What is measured while training, given up in the middle."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from src.data_processing.shards import read_manifest
from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment.hellaswag import Item
from src.model_assessment.periodic_evaluation import Assessment
from src.params import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from src.utils.errors import StoppedError


@pytest.fixture
def assessment(dataset: Callable[..., Path]) -> Assessment:
    folder = dataset(train_tokens=[900])
    config = Config(
        model=ModelConfig(n_ctx=64, n_embd=16, n_head=2, n_layer=1),
        data=DataConfig(dir=str(folder)),
        train=TrainConfig(batch_tokens=256, micro_batch_size=2),
        eval=EvalConfig(val_tokens=1_000, hellaswag_items=0, sample_prompts=("a", "a longer one"), sample_tokens=8),
    )
    made = Assessment(config, folder, read_manifest(folder), load_tokenizer())
    made.protocol = "a test's"
    made.items = [Item(i, f"{i} is" + " even" * 40, (" odd", " one", " two", " three"), 0) for i in range(300)]
    return made


@pytest.mark.parametrize("kind", ["validation", "hellaswag", "sample"])
def test_stops_soon_and_leaves_the_model_as_it_was(assessment: Assessment, kind: str, monkeypatch: pytest.MonkeyPatch):
    model = LLM(assessment.config.model).train()
    forward, passes = nn.Embedding.forward, []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        passes.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(nn.Embedding, "forward", counted)
    run = (kind, model, assessment.config.micro_batch_size, nullcontext(), 0, 1, list)
    assert assessment.run(*run, lambda: False)
    whole = len(passes)
    assert whole > 4
    passes.clear()
    with pytest.raises(StoppedError):
        assessment.run(*run, lambda: len(passes) >= 2)
    assert 2 <= len(passes) < whole
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", ["validation", "hellaswag"])
def test_all_processes_ask_equally_often(assessment: Assessment, kind: str):
    """Or they would wait for each other for ever."""
    asked = []
    for rank in range(3):
        sums: list[Sequence[float]] = []

        def add_up(values: Sequence[float], sums: list[Sequence[float]] = sums) -> Sequence[float]:
            sums.append(values)
            return values

        model = LLM(assessment.config.model)
        try:
            assessment.run(
                kind, model, assessment.config.micro_batch_size, nullcontext(), rank, 3, add_up, lambda: False
            )
        except AssertionError:  # this process alone has not scored all items
            assert kind == "hellaswag"
        asked.append(len(sums))
    assert len(set(asked)) == 1
    assert asked[0] > 2
