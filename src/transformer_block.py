"""One pre-norm transformer block."""

import torch
from torch import nn

from src.attention import Attention, KVCache
from src.ffn import FFN, ReluSquaredFFN
from src.params import ModelConfig


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward network. Each reads a normed copy and adds to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.ffn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.ffn = FFN(config) if config.ffn == "swiglu" else ReluSquaredFFN(config)

    def forward(self, x_BTD: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.attn(self.attn_norm(x_BTD), cache))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))
