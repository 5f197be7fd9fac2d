"""Initial values of the parameters."""

import math

import torch
from torch import nn

from src.params import ModelConfig

MOST_OWN_LOGIT = 12.5  # reached at a width of 390; no wider model has been trained here


def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills the parameters in place, with the same values for a seed on every device and in every process.

    Embedding and input projections: N(0, 2 / (5 D)) ("small init", Nguyen & Salazar 2019,
    https://arxiv.org/abs/1910.05895). The two projections into the residual stream of each block:
    N(0, (1 / (sqrt(D) L))^2), so that the stream's variance doesn't grow with depth, or 0 with `zero_init`. Biases 0,
    gains 1.

    With `zero_init` the head, which is the embedding, at first gives the input token itself a logit of D * std. That is
    limited to MOST_OWN_LOGIT, or a wide model would begin with a loss of D * std: 20 nats for D = 1,024.
    """
    generator = torch.Generator().manual_seed(seed)
    std = math.sqrt(2 / (5 * config.n_embd))
    embedding_std = min(std, MOST_OWN_LOGIT / config.n_embd) if config.zero_init else std
    residual_std = 1 / (math.sqrt(config.n_embd) * config.n_layer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # those of queries and keys, too
                parameter.fill_(1.0)
            elif name.endswith("bias") or (config.zero_init and name.endswith("out_proj.weight")):
                parameter.zero_()
            else:
                by_name = {"embedding.weight": embedding_std, "out_proj.weight": residual_std}
                scale = next((by_name[end] for end in by_name if name.endswith(end)), std)
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))
