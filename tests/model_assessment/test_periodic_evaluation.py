"""Evaluations during training: when they are due, and interrupted in the middle."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
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
from src.utils.handle_ddp import Processes


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
    made.items = [Item(i, f"{i} is" + " even" * 40, (" odd", " one", " two", " three"), 0) for i in range(100)]
    return made


def test_due_by_each_kinds_interval(assessment: Assessment):
    settings = replace(assessment.config.eval, val_every_steps=2, hellaswag_every_steps=3, sample_every_steps=4)
    assessment.config = replace(assessment.config, eval=settings, train=replace(assessment.config.train, total_steps=7))
    everything = ["validation", "hellaswag", "sample"]
    expected = [everything, [], ["validation"], ["hellaswag"], ["validation", "sample"], [], everything[:2], everything]
    assert [assessment.missing(step, set()) for step in range(8)] == expected
    assert assessment.missing(7, {("validation", 7), ("sample", 0)}) == ["hellaswag", "sample"]
    assessment.items = []
    assert assessment.missing(3, set()) == []


@pytest.mark.parametrize("kind", ["validation", "hellaswag", "sample"])
def test_stops_soon_and_leaves_the_model_as_it_was(assessment: Assessment, kind: str, monkeypatch: pytest.MonkeyPatch):
    model = LLM(assessment.config.model).train()
    forward, passes = nn.Embedding.forward, []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        passes.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(nn.Embedding, "forward", counted)
    procs = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    run = (kind, model, assessment.config.micro_batch_size, nullcontext(), procs)
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
    """Otherwise they would wait for each other for ever."""
    asked = []
    for rank in range(3):
        procs = Counted(rank=rank, local_rank=rank, world_size=3, device=torch.device("cpu"))
        model = LLM(assessment.config.model)
        assessment.run(kind, model, assessment.config.micro_batch_size, nullcontext(), procs, lambda: False)
        asked.append(procs.asked)
    assert len(set(asked)) == 1
    assert asked[0] > 2


class Counted(Processes):
    """One of several processes, whose others add nothing."""

    asked = 0

    def sum(self, values: Sequence[float]) -> list[float]:
        self.asked += 1
        return list(values)
