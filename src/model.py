"""The language model: embedding, blocks, final norm, and a head that shares the embedding's weight.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from src.attention import KVCache
from src.lm_loss import linear_cross_entropy
from src.params import ConfigError, ModelConfig
from src.transformer_block import TransformerBlock


class LLM(nn.Module):
    """A decoder-only transformer. Raises ConfigError for a shape that cannot work."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ConfigError(problems)
        self.config = config
        self.embedding = nn.Embedding(config.n_vocab, config.n_embd)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)

    def forward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V) of the token after each position; with int64 targets, the mean loss in nats (float32)."""
        hidden_BTD = self.hidden(inputs_BT)
        if targets_BT is None:
            return self.logits(hidden_BTD)
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), self.embedding.weight, targets_BT.flatten())

    def hidden(self, inputs_BT: torch.Tensor, caches: list[KVCache] | None = None) -> torch.Tensor:
        """The normed output of the last block, (B, T, D); `caches`, one a block, hold and take earlier positions."""
        x_BTD = self.embedding(inputs_BT)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, caches[i] if caches else None)
        return self.norm(x_BTD)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The head: (..., D) to (..., V), in the autocast dtype where autocast is on."""
        return F.linear(hidden_BTD, self.embedding.weight)

    def new_caches(self, batch_size: int, dtype: torch.dtype) -> list[KVCache]:
        """An empty cache for each block, on the model's device."""
        device = self.embedding.weight.device
        return [KVCache(self.config, batch_size, dtype, device) for _ in self.blocks]
