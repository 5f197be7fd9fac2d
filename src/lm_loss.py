"""The language-model loss without full float32 logits.

Logits over 50,257 tokens are by far the largest tensor of a small model. Three things keep them small here:

- Logits of at most LOGIT_POSITIONS positions exist at once, in the dtype of the matmul.
- The float32 softmax runs over a few rows at a time, while these are in the CPU's cache, or as one compiled kernel.
- The forward pass overwrites the logits with their own gradient, and computes the gradients of both inputs from it.

Shapes: N positions, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# 8,192 x 50,257 x 2 bytes = 0.8 GB of logits in bf16, enough to keep any device's matmuls at full rate. All 32,768
# positions of the full-size micro-batch at once would be the peak of a step's memory.
LOGIT_POSITIONS = 8_192

# Rows of float32 logits at once in the uncompiled softmax. On a CPU 16 x 50,257 x 4 bytes = 3 MB fit into a core's
# cache. 2,048 positions of width 256 took 299 ms with 16 rows and 338 with 64; torch's cross_entropy took 721, compiled
# 307 (two cores, LOG.md). A GPU wants few, large kernels.
ROWS_CPU = 16
ROWS_GPU = 4096

# A GPU's matrix units want rows that begin at multiples of 16 bytes, and 50,257 is odd. So logits on a GPU get extra
# columns, which belong to no token; the weight that is trained and saved has none.
VOCAB_MULTIPLE = {"cuda": 64}

Softmax = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, compiled_softmax: Softmax | None = None
) -> torch.Tensor:
    """Mean over N of -log softmax(hidden @ weight^T)[target], a float32 scalar equal to `F.cross_entropy`'s.

    The matmuls run in the autocast dtype under autocast, the softmax and the sum in float32. `compiled_softmax`, from
    `compile_softmax`, replaces the softmax by rows.
    """
    softmax, dtype = compiled_softmax or _softmax_by_rows_, _matmul_dtype(hidden_ND)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, dtype, torch.is_grad_enabled(), softmax)


def linear_losses(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, positions: int = LOGIT_POSITIONS
) -> torch.Tensor:
    """The loss of each position, (N,) float32, without gradients; logits of `positions` exist at once."""
    dtype, softmax = _matmul_dtype(hidden_ND), _softmax_by_rows_
    return _losses_and_gradients(hidden_ND, weight_VD, targets_N, dtype, False, softmax, positions)[0]


def compile_softmax(compiled: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> Softmax:
    """Returns `softmax_` as one kernel made by `compiled`, which is torch.compile with some options."""
    kernel = compiled(_softmax_kernel_)

    def softmax(logits_NV: torch.Tensor, targets_N: torch.Tensor, with_gradients: bool) -> torch.Tensor:
        # Gathered outside the kernel: PyTorch 2.11 would read it after the in-place change, a wrong loss (LOG.md).
        return kernel(logits_NV, targets_N[:, None], logits_NV.gather(1, targets_N[:, None]), with_gradients)

    return softmax


def _softmax_kernel_(
    logits_NV: torch.Tensor, targets_N1: torch.Tensor, target_logits_N1: torch.Tensor, with_gradients: bool
) -> torch.Tensor:
    logits = logits_NV.float()
    highest_N1 = logits.amax(dim=-1, keepdim=True)
    log_sum_N1 = (logits - highest_N1).exp().sum(dim=-1, keepdim=True).log()
    if with_gradients:
        is_target = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N1
        logits_NV.copy_((logits - highest_N1 - log_sum_N1).exp() - is_target.float())
    return -(target_logits_N1.float() - highest_N1 - log_sum_N1).squeeze(1)


def softmax_(logits_NV: torch.Tensor, targets_N: torch.Tensor, with_gradients: bool) -> torch.Tensor:
    """Returns each row's -log softmax(logits)[target], (N,) float32.

    With gradients, overwrites `logits_NV` with the gradient of the sum of these: softmax - one hot of the target.
    """
    targets_N1 = targets_N[:, None]
    log_probs = torch.log_softmax(logits_NV.float(), dim=-1)
    losses_N = -log_probs.gather(1, targets_N1).squeeze(1)
    if with_gradients:
        gradient = log_probs.exp_()
        gradient.scatter_add_(1, targets_N1, torch.full_like(targets_N1, -1, dtype=torch.float32))
        logits_NV.copy_(gradient)
    return losses_N


def _softmax_by_rows_(logits_NV: torch.Tensor, targets_N: torch.Tensor, with_gradients: bool) -> torch.Tensor:
    rows = ROWS_CPU if logits_NV.device.type == "cpu" else ROWS_GPU
    pairs = zip(logits_NV.split(rows), targets_N.split(rows), strict=True)
    return torch.cat([softmax_(logits, targets, with_gradients) for logits, targets in pairs])


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, where the softmax exists. The backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, dtype, with_gradients, softmax):
        losses_N, *gradients = _losses_and_gradients(
            hidden_ND, weight_VD, targets_N, dtype, with_gradients, softmax, LOGIT_POSITIONS
        )
        if with_gradients:
            ctx.save_for_backward(*gradients)
            ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return losses_N.mean()

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_loss,) = grad_outputs
        grad_loss = grad_loss / len(ctx.saved_tensors[0])  # saved: gradients of the sum over N, not of the mean
        grads = (g.to(dtype) * grad_loss for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *grads, None, None, None, None


def _matmul_dtype(hidden_ND: torch.Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype


def _losses_and_gradients(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    dtype: torch.dtype,
    with_gradients: bool,
    softmax: Softmax,
    positions: int,
) -> tuple[torch.Tensor, ...]:
    """Return the losses, (N,), and with gradients also those of their sum: (N, D) and (V, D)."""
    n_vocab = len(weight_VD)
    hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
    if padding := -n_vocab % VOCAB_MULTIPLE.get(hidden.device.type, 1):
        weight = F.pad(weight, (0, 0, 0, padding))
    losses, grad_hidden, grad_weight = [], [], None
    with torch.autocast(hidden.device.type, enabled=False):
        for part, targets in zip(hidden.split(positions), targets_N.split(positions), strict=True):
            logits = part @ weight.T
            losses.append(softmax(logits[:, :n_vocab], targets, with_gradients))
            if with_gradients:  # from here on `logits` holds the gradient of the logits
                logits[:, n_vocab:] = 0
                grad_hidden.append(logits @ weight)
                grad = (logits.T @ part)[:n_vocab]
                # Parts add up in float32; a single one keeps the dtype of the matmul.
                grad_weight = grad if grad_weight is None else grad_weight.float().add_(grad)
            del logits  # frees them before the next part
    if grad_weight is None:
        return (torch.cat(losses),)
    return torch.cat(losses), torch.cat(grad_hidden), grad_weight
