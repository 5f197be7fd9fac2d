"""The language-model loss without full float32 logits.

Logits over 50,257 words are by far the largest tensor of a small model. Here they exist once, in the
dtype of the matmul, and become their own gradient in place: the float32 softmax is done a few rows
at a time, while they are in cache, and the gradients of both inputs are computed in the forward pass,
where the softmax is at hand. Shapes: N positions, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F

# Rows of logits in float32 at once. On a CPU 16 x 50,257 x 4 bytes = 3 MB stay near a core's cache: 2,048 positions
# of width 256 took 299 ms so, 338 with 64 rows, 721 in torch's plain form and 307 in that compiled
# (benchmarks/lm_loss.py, two cores). A GPU wants few, large kernels.
ROWS_CPU = 16
ROWS_GPU = 4096


def linear_cross_entropy(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Mean over N of -log softmax(hidden @ weight^T)[target], a float32 scalar, as `F.cross_entropy` gives it.

    The matmuls run in the autocast dtype where autocast is on, the softmax and the sum in float32.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain form by itself
        return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N)
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, dtype, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, dtype, with_gradients):
        N = len(targets_N)
        rows = ROWS_CPU if hidden_ND.device.type == "cpu" else ROWS_GPU
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            logits_NV = hidden @ weight.T
            losses_N = torch.empty(N, dtype=torch.float32, device=hidden.device)
            for start in range(0, N, rows):
                part = slice(start, start + rows)
                targets = targets_N[part, None]
                log_probs = torch.log_softmax(logits_NV[part].float(), dim=-1)
                losses_N[part] = -log_probs.gather(1, targets).squeeze(1)
                if with_gradients:  # d loss / d logits = (softmax - one hot of the target) / N
                    gradient = log_probs.exp_()
                    gradient.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=torch.float32))
                    logits_NV[part] = gradient.div_(N)
            if with_gradients:
                ctx.save_for_backward(logits_NV @ weight, logits_NV.T @ hidden)
                ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return losses_N.mean()

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        (grad_loss,) = grad_outputs
        return grad_hidden.to(hidden_dtype) * grad_loss, grad_weight.to(weight_dtype) * grad_loss, None, None, None
