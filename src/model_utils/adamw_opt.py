"""The optimizers' parameter groups and the learning-rate schedule."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from src.model_utils.muon import Muon
from src.params import OptimConfig

# Row blocks of a projection that computes several things at once. Muon treats each block as a separate matrix.
_BLOCKS_OF_ROWS = {"qkv_proj": 3, "in_proj": 2}


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW, and Muon if configured. Every parameter belongs to exactly one of their groups.

    Weight decay applies to matrices and the embedding, not to vectors (biases and norm gains). A group stores its peak
    rate as "max_lr"; its rate is 0 until the caller sets it for a step.
    """
    hidden = {}
    if config.optimizer == "muon":
        for name, parameter in model.named_parameters():
            if is_hidden_matrix(name):
                hidden[parameter] = _BLOCKS_OF_ROWS.get(name.split(".")[-2], 1)
    others = [parameter for parameter in model.parameters() if parameter not in hidden]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    # AdamW (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101). fused: one kernel for all parameters, several
    # times as fast as a kernel for each.
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if hidden:
        optimizers.append(Muon(hidden, config.momentum, config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            is_embedding = optimizer is adamw and hidden and config.embedding_lr
            group["max_lr"] = config.embedding_lr if is_embedding else config.max_lr
    return optimizers


def is_hidden_matrix(name: str) -> bool:
    """Return True for the name of a parameter that Muon updates: a matrix in a block."""
    return name.startswith("blocks.") and name.endswith("_proj.weight")


def learning_rate(step: int, total_steps: int, warmup_steps: int, config: OptimConfig, max_lr: float = 0.0) -> float:
    """Return the rate for the step after `step` completed ones, 0 <= step < total_steps, with the peak `max_lr`.

    Linear warm-up, max_lr * (step + 1) / warmup_steps, then constant. Over the last `decay_ratio` of the steps after
    warm-up, half a cosine (Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983) or a line down to
    min_lr_ratio * max_lr. Without `max_lr` the peak is the configured one.
    """
    max_lr = max_lr or config.max_lr
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if config.decay_ratio < 1:
        progress = max(0.0, 1 - (1 - progress) / config.decay_ratio) if config.decay_ratio else 0.0
    min_lr = max_lr * config.min_lr_ratio
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return min_lr + share * (max_lr - min_lr)


def set_learning_rate(
    optimizers: Sequence[torch.optim.Optimizer], step: int, total_steps: int, warmup_steps: int, config: OptimConfig
) -> float:
    """Set the rates of all groups for the step after `step` completed ones. Return the rate of the hidden matrices."""
    rate = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["lr"] = learning_rate(step, total_steps, warmup_steps, config, group["max_lr"])
    return rate


def optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Return the optimizers' state under names such as "exp_avg.blocks.0..."; empty before the first step."""
    return {
        f"{kind}.{name}": tensor
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        if parameter in optimizer.state  # reading a missing one would create it
        for kind, tensor in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned, on the parameters' devices. Raises KeyError and ValueError."""
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        if tensor.shape != (() if kind == "step" else parameter.shape):
            raise ValueError(f"{key} has the shape {tuple(tensor.shape)}, {name} {tuple(parameter.shape)}")
        # Cloned, because a tensor loaded on a CPU is mapped from its file, which may be pruned or changed.
        owner[parameter].state[parameter][kind] = tensor.clone().to(parameter.device)
