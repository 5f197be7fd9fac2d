"""What the tests of exports share: a run directory of a small model, and hard texts."""

import json
from pathlib import Path
from typing import Any

import torch

from src.model import LLM
from src.model_utils.checkpoint_utils import save_checkpoint
from src.model_utils.weight_init import init_weights
from src.params import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig, to_dict

DATASET_SHA256 = "ab" * 32
SHAPE = ModelConfig(n_ctx=64, n_embd=64, n_head=2, n_layer=2, rope_theta=5_000.0, residual_dropout=0.0, ffn_dropout=0.0)
HARD_TEXTS = [
    *("", " ", "a", "\n", "\r\n\t\v\f", "  \n\n   x \n", " " * 3_000, "\n " * 500, "a" * 3_000, "=" * 700),
    *("".join(map(chr, range(256))), "\ufeffx\ufffe\uffff\U0010ffff", "\u3000\u2028\u200b\u00ad\u0301e\u0301"),
    *("😀👨‍👩‍👧‍👦🏳️‍🌈 it's we'LL 'tis don\u2019t", "漢字かな交じり文 العربية ไทย हिन्दी", "12 345,67 ⅷ²½ 1e-5 ١٢٣"),
    *("<|endoftext", "<|endoftext |>", "[CLS]<s></s><unk><pad>", "def f(x):\n        return x  # tab\there"),
]


def small_model(shape: ModelConfig = SHAPE) -> LLM:
    """Random weights, biases and gains, such that the likeliest token changes from position to position."""
    model = LLM(shape).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if name == "embedding.weight" else 0.4)
    return model


def trained_model(ids: list[int], steps: int, shape: ModelConfig = SHAPE) -> LLM:
    """A model that has nearly learned the first 4 x n_ctx of `ids` by heart."""
    model = LLM(shape)
    init_weights(model, shape, seed=0)
    tokens = torch.tensor(ids[: 4 * SHAPE.n_ctx + 1])
    inputs_BT, targets_BT = tokens[:-1].view(4, -1), tokens[1:].view(4, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs_BT, targets_BT).backward()
        optimizer.step()
    return model.eval()


def make_run(
    folder: Path,
    model: LLM,
    records: list[dict[str, Any]] | None = None,
    step: int = 40,
    dataset_sha256: str = DATASET_SHA256,
) -> Path:
    """A run directory with one checkpoint, and these lines in its metrics.jsonl."""
    config = Config(
        run_name=folder.name,
        model=model.config,
        data=DataConfig(dir="/home/somebody/texts/novels"),
        train=TrainConfig(batch_tokens=4 * model.config.n_ctx, total_steps=50, precision="float32"),
        eval=EvalConfig(hellaswag_data="/home/somebody/items.jsonl"),
    )
    state = {"config": to_dict(config), "dataset_sha256": dataset_sha256}
    save_checkpoint(folder / "checkpoints", step, {"model": dict(model.named_parameters())}, state)
    sources = [
        {"name": "pydocs", "documents": 1_500, "tokens": 2_358_597, "share": 0.75},
        {"name": "files", "path": "/home/somebody/texts", "documents": 7, "tokens": 786_199, "share": 0.25},
    ]
    settings = {"config": to_dict(config), "dataset": {"sources": sources, "manifest_sha256": DATASET_SHA256}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records or []))
    return folder
