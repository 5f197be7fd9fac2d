"""A small run for whole runs in one process, and what they must not leave behind."""

from collections.abc import Callable
from pathlib import Path

import pytest

import pretrain
from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from tests.whole_runs.records import STEPS


@pytest.fixture
def config(dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Config:
    """A run of 12 steps of a tiny model with dropout, checkpoints at 5 and 10, validation at 0, 4, 8 and 12."""
    monkeypatch.setattr(pretrain, "RUNS", tmp_path / "runs")
    return Config(
        run_name="whole",
        model=ModelConfig(n_vocab=300, n_ctx=16, n_embd=16, n_head=2, n_layer=2),
        data=DataConfig(dir=str(dataset(train_tokens=[700, 900], n_vocab=300))),
        optim=OptimConfig(max_lr=5e-3, warmup_steps=3),
        train=TrainConfig(
            total_steps=STEPS,
            batch_tokens=8 * 16,
            micro_batch_size=4,
            precision="float32",
            device="cpu",
            log_every_steps=3,
        ),
        eval=EvalConfig(val_every_steps=4, val_tokens=160, hellaswag_items=0),
        checkpoint=CheckpointConfig(every_steps=5),
    )


@pytest.fixture(autouse=True)
def restore_train_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrain, "train_step", pretrain.train_step)
