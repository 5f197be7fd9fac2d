"""Causal multi-head self-attention, and the keys and values it remembers while sampling.

Shapes: B sequences, T positions, S positions including those that were cached, D width, H heads, K head dimension.
"""

import torch
import torch.nn.functional as F
from torch import nn

from src.params import ModelConfig
from src.rope import apply_rope, rope_tables


class KVCache:
    """Keys and values of the positions one attention layer has seen, for up to `n_ctx` of them."""

    def __init__(self, config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch_size, config.n_head, config.n_ctx, config.head_dim)
        self.keys_BHTK = torch.empty(shape, dtype=dtype, device=device)
        self.values_BHTK = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys_BHTK: torch.Tensor, values_BHTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new positions; returns keys and values of all positions so far, each (B, H, length, K)."""
        end = self.length + keys_BHTK.shape[2]
        assert end <= self.keys_BHTK.shape[2], "the caller keeps sequences within n_ctx"
        self.keys_BHTK[:, :, self.length : end] = keys_BHTK
        self.values_BHTK[:, :, self.length : end] = values_BHTK
        self.length = end
        return self.keys_BHTK[:, :, :end], self.values_BHTK[:, :, :end]


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V over the positions up to each one, with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cache: KVCache | None = None,
        positions_BT: torch.Tensor | None = None,
        mask_BTS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over what `cache` holds and `x_BTD`, which it then holds too: (B, T, D).

        `positions_BT`: int64, by which RoPE turns (B may be 1); None: those that follow the cached ones.
        `mask_BTS`: bool, what each position sees (B may be 1); None: everything up to itself.
        """
        B, T, D = x_BTD.shape
        q, k, v = (
            part.view(B, T, self.config.n_head, self.config.head_dim).transpose(1, 2)
            for part in self.qkv_proj(x_BTD).split(D, dim=-1)
        )
        start = cache.length if cache else 0
        cos, sin = rope_tables(self.config.n_ctx, self.config.head_dim, self.config.rope_theta, x_BTD.device)
        if positions_BT is None:
            cos, sin = cos[start : start + T], sin[start : start + T]
        else:
            cos, sin = cos[positions_BT][:, None], sin[positions_BT][:, None]  # the same for all heads
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache:
            k, v = cache.append(k, v)
        # A single new position sees everything before it; several after a prefix need their own mask.
        mask = None if mask_BTS is None else mask_BTS[:, None]
        if mask is None and start and T > 1:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x_BTD.device).tril(start)
        is_causal = mask is None and start == 0 and T > 1
        y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.out_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))
