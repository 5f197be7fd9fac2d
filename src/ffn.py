"""The feed-forward networks of a block.

Shapes: B sequences, T positions, D width, F hidden width (config.ffn_hidden).
"""

import torch
import torch.nn.functional as F
from torch import nn

from src.params import ModelConfig


class FFN(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): out(dropout(value * silu(gate))).

    One projection computes value and gate together.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.n_embd, 2 * config.ffn_hidden, bias=config.bias)
        self.out_proj = nn.Linear(config.ffn_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        value_BTF, gate_BTF = self.in_proj(x_BTD).chunk(2, dim=-1)
        return self.out_proj(self.dropout(value_BTF * F.silu(gate_BTF)))


class ReluSquaredFFN(nn.Module):
    """ReLU^2 (So et al. 2021, https://arxiv.org/abs/2109.08668): out(dropout(relu(up(x))^2))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, config.ffn_hidden, bias=config.bias)
        self.out_proj = nn.Linear(config.ffn_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(F.relu(self.up_proj(x_BTD)).square()))
