"""Looking into a model: its size and its work."""

from torch import nn

from src.params import ModelConfig


def count_parameters(model: nn.Module) -> int:
    """Learned numbers in `model`, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: ModelConfig, n_parameters: int) -> int:
    """Floating-point operations to train on one token: 6 N + 12 L D T.

    N all parameters, each a multiply and an add forward and twice that backward; the embedding's look-up
    is free, but the same weight is the head's matmul, so it counts once. 12 L D T are the two attention
    matmuls over the full context, forward and backward, as in the PaLM paper's appendix B
    (https://arxiv.org/abs/2204.02311); causal masking would halve them, which nobody's MFU counts.
    """
    return 6 * n_parameters + 12 * config.n_layer * config.n_embd * config.n_ctx
