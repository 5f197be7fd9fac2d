"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

Dimension i of a head and dimension i + K/2 form a pair, which is rotated by an angle that grows with the position.
Shapes: B sequences, H heads, T positions, K head dimension.
"""

from collections.abc import Callable

import torch

from src.global_cache import cached


def rope_tables(n_ctx: int, head_dim: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position x frequency, each (n_ctx, head_dim / 2), float32, on `device`.

    Pair i turns by theta^(-2i / head_dim) radians per position.
    """

    def table(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        # In float64 on the CPU and rounded once, so that every device gets the same tables.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
        positions = torch.arange(n_ctx, dtype=torch.float64, device="cpu")
        return function(torch.outer(positions, theta**-exponents)).to(dtype=torch.float32, device=device)

    key = (n_ctx, head_dim, theta, torch.float32, device)
    return cached(("rope cos", *key), lambda: table(torch.cos)), cached(("rope sin", *key), lambda: table(torch.sin))


def apply_rope(x_BTHK: torch.Tensor, cos_T1K2: torch.Tensor, sin_T1K2: torch.Tensor) -> torch.Tensor:
    """Rotates each pair of `x_BTHK` by its position's angle. Computes in float32, returns x's dtype.

    The tables need only broadcast against half of x.
    """
    first, second = x_BTHK.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos_T1K2 - second * sin_T1K2, second * cos_T1K2 + first * sin_T1K2), dim=-1)
    return rotated.to(x_BTHK.dtype)
