"""Causal multi-head self-attention, and the keys and values it caches during sampling.

Shapes: B sequences, T new positions, S all positions including cached ones, D width, H heads, K head dimension.
"""

import torch
import torch.nn.functional as F
from torch import nn

from src.params import ModelConfig
from src.rope import apply_rope, rope_tables


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V over each position and those before it, with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        if config.qk_norm:  # Henry et al. 2020, https://arxiv.org/abs/2010.04245: keeps high learning rates stable
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        """Attends to the positions in `cache` and those of `x_BTD`, which are added to it. Returns (B, T, D)."""
        B, T, D = x_BTD.shape
        q, k, v = self.qkv_proj(x_BTD).view(B, T, 3, self.config.n_head, self.config.head_dim).unbind(2)
        if self.config.qk_norm:
            # In the gain's dtype (float32 in training), because other dtypes miss the fused kernel.
            dtype = self.q_norm.weight.dtype
            q, k = self.q_norm(q.to(dtype)).to(v.dtype), self.k_norm(k.to(dtype)).to(v.dtype)
        past = cache.length if cache else 0
        cos, sin = rope_tables(self.config.n_ctx, self.config.head_dim, self.config.rope_theta, x_BTD.device)
        cos_T1K2, sin_T1K2 = cos[past : past + T, None], sin[past : past + T, None]  # the same for all heads
        q, k = apply_rope(q, cos_T1K2, sin_T1K2), apply_rope(k, cos_T1K2, sin_T1K2)
        # Only now, so that q, k and v and their gradients share the projection's memory layout: on a GPU the compiled
        # backward pass then writes the gradient of qkv_proj's output in one go.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache:
            k, v = cache.append(k, v)  # from here on k and v have S positions
        # PyTorch's is_causal aligns the triangle top left, so it is wrong after a prefix. A single new position sees
        # everything; several need a mask that also shows them the whole prefix.
        mask_TS = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past) if past and T > 1 else None
        y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, is_causal=not past)
        return self.out_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class KVCache:
    """Keys and values of the positions that one attention layer has seen, at most `n_ctx`."""

    def __init__(self, config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch_size, config.n_head, config.n_ctx, config.head_dim)
        self.keys_BHSK = torch.empty(shape, dtype=dtype, device=device)
        self.values_BHSK = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys_BHTK: torch.Tensor, values_BHTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new positions. Returns views of the keys and values of all positions so far."""
        end = self.length + keys_BHTK.shape[2]
        assert end <= self.keys_BHSK.shape[2], "the caller keeps sequences within n_ctx"
        self.keys_BHSK[:, :, self.length : end] = keys_BHTK
        self.values_BHSK[:, :, self.length : end] = values_BHTK
        self.length = end
        return self.keys_BHSK[:, :, :end], self.values_BHSK[:, :, :end]
