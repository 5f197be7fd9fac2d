"""The feed-forward network of a block: SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

import torch
import torch.nn.functional as F
from torch import nn

from src.params import ModelConfig


class FFN(nn.Module):
    """out(dropout(value * silu(gate))). One projection computes value and gate together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.n_embd, 2 * config.ffn_hidden, bias=config.bias)
        self.out_proj = nn.Linear(config.ffn_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        value, gate = self.in_proj(x_BTD).chunk(2, dim=-1)
        return self.out_proj(self.dropout(value * F.silu(gate)))
