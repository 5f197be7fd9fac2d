"""Checkpoint files as the reference writes them, made here, and what an import of a bad one says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from src.model_configs.my_llm_config import lf_llm_269m
from src.model_utils.reference_import import import_reference
from src.params import Config, ModelConfig
from src.utils.errors import UserError

Content = dict[str, Any]


class HParams:
    """As the reference's class is pickled: a class of this name and module, with attributes."""

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


HParams.__module__, HParams.__qualname__ = "src.params", "HParams"
SHAPE = ModelConfig(n_vocab=300, n_ctx=16, n_embd=16, n_head=2, n_layer=2, residual_dropout=0.0, ffn_dropout=0.0)


def hparams(**changes: object) -> HParams:
    values = {"n_vocab": 300, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
    return HParams(**{**values, "ffn_act_pdrop": 0.0, "attn_res_pdrop": 0.0, **changes})


def reference_parameters() -> dict[str, nn.Parameter]:
    """Of a model of SHAPE, in the reference's order and under its names."""
    shapes: dict[str, tuple[int, ...]] = {"embd.weight": (300, 16)}
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        for name, out, into in (("attn.qkv_proj", 48, 16), ("attn.out_proj", 16, 16)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        for name, out, into in (("ffn.net.0", 128, 16), ("ffn.net.3", 16, 64)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        shapes |= {f"{block}.norm1.weight": (16,), f"{block}.norm2.weight": (16,)}
    shapes["norm.weight"] = (16,)
    return {name: nn.Parameter(0.1 * torch.randn(shape)) for name, shape in shapes.items()}


def adamw(parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """As the reference makes it."""
    decayed = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    others = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


def file_content(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> Content:
    state = {name: parameter.detach() for name, parameter in parameters.items()}
    return {
        "model_state_dict": {**state, "out_proj.weight": state["embd.weight"]},
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": None,
        "step": step,
        "hParams": hparams(),
        "random_state": torch.get_rng_state(),
    }


def recipe(run_name: str = "imported") -> Config:
    return replace(lf_llm_269m(), run_name=run_name)


def refusal(path: Path, runs: Path, config: Config | None = None, to_train: bool = False) -> str:
    """What an import that must fail says, in one line, leaving nothing behind."""
    with pytest.raises(UserError) as caught:
        import_reference(path, config or recipe(), to_train)
    assert not runs.exists() or not list(runs.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)
