"""AdamW's parameter groups and the learning-rate schedule."""

import math

import torch
from torch import nn

from src.params import OptimConfig


def build_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101) over every parameter exactly once.

    Matrices and the embedding decay, vectors (biases and norm gains) don't. The learning rate is 0
    until the caller sets it for a step.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # fused: one kernel for all parameters, several times as fast as one by one
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, total_steps: int, warmup_steps: int, config: OptimConfig) -> float:
    """The rate for the step after `step` completed ones, 0 <= step < total_steps.

    Linear warm-up, max_lr * (step + 1) / warmup_steps, then half a cosine from max_lr towards
    min_lr_ratio * max_lr (Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983).
    """
    if step < warmup_steps:
        return config.max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    min_lr = config.max_lr * config.min_lr_ratio
    return min_lr + 0.5 * (config.max_lr - min_lr) * (1 + math.cos(math.pi * progress))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as "exp_avg.blocks.0..." and so on, empty before the first step."""
    return {
        f"{kind}.{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Puts back what `optimizer_tensors` returned, on the parameters' devices."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        # cloned, because a tensor read from a file on a CPU is a mapping of it, which may be pruned or changed
        state.setdefault(ordered.index(name), {})[kind] = tensor.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
