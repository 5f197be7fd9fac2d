"""Weights in fewer bytes, for a model that is only asked.

A token costs one pass over all weights: in bf16 half of float32's bytes, in int8 a quarter. How much of the time that
saves depends on the kernels (LOG.md). Shapes: I inputs and O outputs of a layer, V vocabulary, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from src.model import LLM

# Up to so many rows PyTorch's kernel for int8 weights is faster than making them bf16 for a common matmul: at 3,072 x
# 1,024 on one core 0.2 and 1.0 ms for one row, 3.0 and 3.3 for 32, 6.1 and 5.7 for 64.
FEW_ROWS = 32

WEIGHTS = ("auto", "float32", "bf16", "int8")


def store_weights(model: LLM, kind: str, precision: torch.dtype) -> torch.dtype:
    """Changes how `model` keeps its weights, for good; returns the dtype that it is to be called in from then on.

    "float32": as they are, called in `precision`. "bf16": all of them in bfloat16, on CPUs in the order in which oneDNN
    reads them fastest (the head then beside the embedding). "int8": those of matmuls in int8 with a scale for each
    output, the embedding and the rest in bfloat16. "auto": bf16 where `precision` is that. Such a model can't be
    trained, copied or moved to another device any more.
    """
    if kind == "float32" or (kind == "auto" and precision == torch.float32):
        return precision
    model.requires_grad_(False)
    model.bfloat16()
    if kind != "int8" and not can_pack(model.embedding.weight):
        return torch.bfloat16
    stored = Int8Linear if kind == "int8" else PackedLinear
    for part in list(model.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(part, name, stored(layer.weight, layer.bias))
    model.head = stored(model.embedding.weight, None)
    model.head_is_embedding = stored is PackedLinear
    return torch.bfloat16


def can_pack(weight: torch.Tensor) -> bool:
    """Whether PackedLinear can hold it: bfloat16 on a CPU whose instructions oneDNN has bf16 kernels for."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Module):
    """x W^T + b in bfloat16, W in oneDNN's own order, which F.linear would bring it into again for every product.

    For one row of 3,072 x 1,024 on one core 0.28 ms instead of 0.46, 0.35 instead of 0.65 for 4, as long for 32. The
    results are F.linear's to the bit.
    """

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight_OI", torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach()))
        self.register_buffer("bias_O", bias_O)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight_OI, self.bias_O, "none", [], "")


class Int8Linear(nn.Module):
    """x W^T + b with W in int8, each row scaled so that its largest value is 127: symmetric, rounded to nearest."""

    weight_OI: torch.Tensor
    scale_O: torch.Tensor
    bias_O: torch.Tensor | None

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        scale_O = weight_OI.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight_OI", (weight_OI.float() / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale_O", scale_O.to(weight_OI.dtype))
        self.register_buffer("bias_O", bias_O)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and len(x_NI) <= FEW_ROWS:
            y_NO = torch._weight_int8pack_mm(x_NI, self.weight_OI, self.scale_O)
        else:
            y_NO = F.linear(x_NI, self.weight_OI.to(x.dtype)) * self.scale_O
        if self.bias_O is not None:
            y_NO = y_NO + self.bias_O
        return y_NO.view(*x.shape[:-1], -1)
