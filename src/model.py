"""The language model: embedding, blocks, final norm, and a head that shares the embedding's weight.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from src.attention import KVCache
from src.lm_loss import Softmax, compile_softmax, linear_cross_entropy
from src.params import ConfigError, ModelConfig
from src.rope import rope_tables
from src.transformer_block import TransformerBlock


@dataclass(frozen=True)
class _Compiled:
    """What runs in place of the model's own parts, for batches of one shape."""

    shape_BT: torch.Size
    blocks: list[Callable[..., torch.Tensor]]
    softmax: Softmax


class LLM(nn.Module):
    """A decoder-only transformer. Raises ConfigError for a shape that cannot work."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ConfigError(problems)
        self.config = config
        # Not nn.Embedding's own normal_, which on the meta device imports PyTorch's compiler: a second of a command.
        weight_VD = torch.empty(config.n_vocab, config.n_embd).uniform_(-1, 1)
        self.embedding = nn.Embedding(config.n_vocab, config.n_embd, _weight=weight_VD)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head: nn.Module | None = None
        """Gives the logits in place of the embedding's weight, where that is also kept in another form."""
        self.head_is_embedding = True
        """Whether a head of its own holds the very numbers of the embedding."""
        self._compiled: _Compiled | None = None

    def forward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V) of the token after each position; with int64 targets, the mean loss in nats (float32)."""
        if targets_BT is None:
            return self.logits(self.hidden(inputs_BT))
        if self.head and not self.head_is_embedding:
            return F.cross_entropy(self.logits(self.hidden(inputs_BT)).flatten(0, 1).float(), targets_BT.flatten())
        compiled = self._compiled if self._compiled and self._compiled.shape_BT == inputs_BT.shape else None
        hidden_ND = self.hidden(inputs_BT, blocks=compiled.blocks if compiled else None).flatten(0, 1)
        softmax = compiled.softmax if compiled else None
        return linear_cross_entropy(hidden_ND, self.embedding.weight, targets_BT.flatten(), softmax)

    def hidden(
        self,
        inputs_BT: torch.Tensor,
        caches: list[KVCache] | None = None,
        positions_BT: torch.Tensor | None = None,
        mask_BTS: torch.Tensor | None = None,
        blocks: Sequence[Callable[..., torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """The normed output of the last block, (B, T, D); `caches`, one a block, hold and take earlier positions.

        `positions_BT` and `mask_BTS` are for other orders than one after the other: see Attention. `blocks` run instead
        of the model's own.
        """
        x_BTD = self.embedding(inputs_BT)
        run: Iterable[Callable[..., torch.Tensor]] = blocks or self.blocks
        for i, block in enumerate(run):
            x_BTD = block(x_BTD, caches[i] if caches else None, positions_BT, mask_BTS)
        return self.norm(x_BTD)

    def compile_blocks(self, batch_size: int, backend: str | Callable[..., Any] = "inductor") -> None:
        """From now on, batches of (batch_size, n_ctx) with targets run compiled; others, and sampling, as before.

        One block is compiled and serves as all of them, which takes a fraction of the time of the whole model; nothing
        but this shape is ever compiled. The compiling itself happens when such a batch first comes.
        """
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        rope_tables(self.config.n_ctx, self.config.head_dim, self.config.rope_theta, self.embedding.weight.device)
        shape_BT = torch.Size((batch_size, self.config.n_ctx))
        self._compiled = _Compiled(shape_BT, [compiled(block) for block in self.blocks], compile_softmax(compiled))

    def compile_nothing(self) -> None:
        """Undoes `compile_blocks`."""
        self._compiled = None

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The head: (..., D) to (..., V), in the autocast dtype where autocast is on."""
        return self.head(hidden_BTD) if self.head else F.linear(hidden_BTD, self.embedding.weight)

    def new_caches(self, batch_size: int, dtype: torch.dtype) -> list[KVCache]:
        """An empty cache for each block, on the model's device."""
        device = self.embedding.weight.device
        return [KVCache(self.config, batch_size, dtype, device) for _ in self.blocks]
