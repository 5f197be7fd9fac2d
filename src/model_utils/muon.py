"""Muon: momentum with orthogonalised updates (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

Shapes: N matrices of one shape, R rows, C columns, R <= C.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn

# Each triple is an odd polynomial a s + b s^3 + c s^5 of the singular values. Applied in turn, they bring values from
# 0.001 to 1 close to 1 (Polar Express, Amsel et al. 2025, https://arxiv.org/abs/2505.16932).
_POLYNOMIALS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_SAFETY = 1.02  # keeps bf16 rounding from lifting a singular value above 1, where the polynomials diverge


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. For hidden matrices only.

    An update is scaled by 0.2 sqrt(max(rows, columns)), so that its root mean square matches AdamW's and both can share
    learning rates (Liu et al. 2025, https://arxiv.org/abs/2502.16982). Each process orthogonalises its share of the
    matrices and receives the others. All processes call `step` together, with the same gradients.
    """

    def __init__(self, parameters: Mapping[nn.Parameter, int], momentum: float, weight_decay: float) -> None:
        """`parameters` maps each one to its number of equal row blocks, each of which is treated as a matrix.

        A projection that computes queries, keys and values together has three. Raises ValueError for a parameter that
        is not a matrix or is not divisible into its blocks.
        """
        for parameter, blocks in parameters.items():
            if parameter.dim() != 2 or len(parameter) % blocks:
                raise ValueError(f"Muon cannot train a parameter of shape {tuple(parameter.shape)} in {blocks} blocks.")
        super().__init__(list(parameters), {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})
        self._blocks = dict(parameters)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for shape, matrices in self._by_shape(group["params"], group["momentum"]).items():
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                updates_NRC = _orthogonal_updates([each[1:] for each in matrices], group["momentum"])
                for (weight, _, _), update in zip(matrices, updates_NRC, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def flops(self) -> int:
        """Return the floating-point operations of orthogonalising all matrices once, by the method for bf16."""
        total = 0
        for parameter, blocks in self._blocks.items():
            R, C = sorted((len(parameter) // blocks, parameter.shape[1]))
            total += blocks * len(_POLYNOMIALS) * (2 * R * C * R + 2 * R**3 + 2 * R * R * C)  # X X^T, A A, B X
        return total

    def _by_shape(
        self, parameters: list[nn.Parameter], momentum: float
    ) -> dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
        """Update the running means. Return weights, gradients and means: views with no more rows than columns."""
        by_shape = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - momentum)
            tensors = (parameter, parameter.grad, state["momentum"])
            for matrices in zip(*(self._matrices(tensor, parameter) for tensor in tensors), strict=True):
                by_shape[tuple(matrices[0].shape)].append(matrices)
        return by_shape

    def _matrices(self, tensor: torch.Tensor, parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        for block in tensor.chunk(self._blocks[parameter]):
            yield block if block.shape[0] <= block.shape[1] else block.T


def orthogonalize(updates_NRC: torch.Tensor) -> torch.Tensor:
    """Return approximately U V^T of each matrix U S V^T: singular values above 0.001 of the norm become 0.9 to 1.1.

    Computes in bf16 on CUDA, where it is fast, else in the given dtype. R <= C. A zero matrix stays zero.
    """
    X = updates_NRC.bfloat16() if updates_NRC.is_cuda else updates_NRC
    # The norm is at least the largest singular value. The minimum, far below any other norm, keeps a zero matrix zero.
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) * _SAFETY).clamp(min=1e-30)
    if X.shape[2] >= 2 * X.shape[1] and X.dtype != torch.bfloat16:  # bf16 would lose the squares of small values
        # Half the work for wide matrices: Q X for a symmetric Q that commutes with X X^T, so that only two products
        # have C columns.
        G = X @ X.mT
        Q = torch.eye(X.shape[1], dtype=X.dtype, device=X.device).expand_as(G)
        for a, b, c in _POLYNOMIALS:
            P = torch.baddbmm(G, G, G, beta=b, alpha=c)
            P.diagonal(dim1=-2, dim2=-1).add_(a)
            Q = P @ Q
            G = P @ G @ P
        return Q @ X
    for a, b, c in _POLYNOMIALS:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def _orthogonal_updates(gradients_and_means: list[tuple[torch.Tensor, torch.Tensor]], momentum: float) -> torch.Tensor:
    """Return the orthogonalised Nesterov updates (N, R, C). The processes of a group, if any, share the work."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    count = len(gradients_and_means)
    share = -(-count // world_size)
    # Each process computes only its share. The last ones may have fewer matrices and are padded with zeros.
    own_NRC = gradients_and_means[0][0].new_zeros(share, *gradients_and_means[0][0].shape)
    for own, (gradient, mean) in zip(own_NRC, gradients_and_means[rank * share :], strict=False):
        own.copy_(gradient.lerp(mean, momentum))
    own_NRC = orthogonalize(own_NRC)
    if world_size == 1:
        return own_NRC
    result = own_NRC.new_empty(share * world_size, *own_NRC.shape[1:])
    dist.all_gather_into_tensor(result, own_NRC)
    return result[:count]
