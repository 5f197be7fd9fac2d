"""The reference's small model under our names."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from src.model import LLM
from src.model_utils.load_model import load_weights
from src.params import ModelConfig

CONFIG = ModelConfig(n_vocab=512, n_ctx=64, n_embd=48, n_head=4, n_layer=3, residual_dropout=0.0, ffn_dropout=0.0)

_OURS = {
    "embd.weight": "embedding.weight",
    "transformer_blocks": "blocks",
    "ffn.net.0": "ffn.in_proj",
    "ffn.net.3": "ffn.out_proj",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
}


class _ReferenceConfig:
    """Stands in for the class the file was pickled with, so that its own code never runs."""


def reference_model(folder: Path) -> LLM:
    """Our model with the weights of reference_checkpoint.pth."""
    _ReferenceConfig.__module__, _ReferenceConfig.__qualname__ = "src.params", "HParams"
    with torch.serialization.safe_globals([(_ReferenceConfig, "src.params.HParams")]):
        state = torch.load(folder / "reference_checkpoint.pth", weights_only=True)["model_state_dict"]
    model = LLM(CONFIG)
    load_weights(model, {ours(n): tensor for n, tensor in state.items() if n != "out_proj.weight"}, "the reference")
    return model


def reference_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "reference_tensors.safetensors")


def ours(name: str) -> str:
    """Our name of one of the reference's parameters."""
    for theirs, our in _OURS.items():
        name = name.replace(theirs, our)
    return name
