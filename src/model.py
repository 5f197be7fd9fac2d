"""The language model: a decoder-only transformer whose head shares the embedding's weight.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

import torch
from torch import nn

from src.attention import KVCache
from src.lm_loss import linear_cross_entropy
from src.params import ConfigError, ModelConfig
from src.transformer_block import TransformerBlock


class LLM(nn.Module):
    """Embedding, blocks, final norm and head. Raises ConfigError for an impossible shape.

    `dict(model.named_parameters())` are the weights to save or compare: it lists the shared one once, as
    `embedding.weight`. `state_dict()` lists it twice.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ConfigError(problems)
        self.config = config
        # nn.Embedding's own normal_ imports PyTorch's compiler on the meta device, which costs commands a second.
        weight_VD = torch.empty(config.n_vocab, config.n_embd).uniform_(-1, 1)
        self.embedding = nn.Embedding(config.n_vocab, config.n_embd, _weight=weight_VD)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        # On the meta device: its own weight is replaced at once, so it needs no memory.
        self.head = nn.Linear(config.n_embd, config.n_vocab, bias=False, device="meta")
        self.head.weight = self.embedding.weight

    def forward(
        self, ids_BT: torch.Tensor, targets_BT: torch.Tensor | None = None, caches: list[KVCache] | None = None
    ) -> torch.Tensor:
        """Logits (B, T, V) of the token after each position. With int64 targets, the mean loss in nats (float32).

        `caches`, one per block, hold the keys and values of earlier positions and receive those of `ids_BT`.
        """
        x_BTD = self.hidden(ids_BT, caches)
        if targets_BT is None:
            return self.head(x_BTD)
        # The loss includes the head, because the logits of a whole batch would be the peak of memory.
        return linear_cross_entropy(x_BTD.flatten(0, 1), self.head.weight, targets_BT.flatten())

    def hidden(self, ids_BT: torch.Tensor, caches: list[KVCache] | None = None) -> torch.Tensor:
        """The head's input, (B, T, D), for callers that need the logits of a few positions or per-position losses."""
        x_BTD = self.embedding(ids_BT)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, caches[i] if caches else None)
        return self.norm(x_BTD)

    def new_caches(self, batch_size: int, dtype: torch.dtype) -> list[KVCache]:
        """An empty cache for each block, on the model's device."""
        device = self.embedding.weight.device
        return [KVCache(self.config, batch_size, dtype, device) for _ in self.blocks]
