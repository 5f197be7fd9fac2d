"""Linear layers for sampling in bf16 on CPUs, with weights in oneDNN's order. O outputs, I inputs of a layer."""

import torch
from torch import nn


class PackedLinear(nn.Module):
    """F.linear to the bit, for inference only. F.linear reorders a bf16 weight every time, 40% of a token's time."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight_OI", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()))
        self.register_buffer("bias_O", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight_OI, self.bias_O, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replaces every nn.Linear in `model` by a PackedLinear where oneDNN can: bfloat16 on a CPU with bf16 kernels.

    A weight shared with an embedding is then kept twice. The model can no longer be trained, saved or moved.
    """
    weight = next(model.parameters())
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    if not (on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for part in list(model.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(part, name, PackedLinear(layer))
