"""What a training step needs of a device's memory, by part, counted from the model's code without running it.

What autograd keeps was read off attention.py, ffn.py, transformer_block.py and lm_loss.py as they run uncompiled, and
is compared with what it really keeps in tests/model_utils/test_planner.py. Compiled, a block keeps less: see LOG.md.
Shapes: N positions of a micro-batch, D width, F hidden size of the feed-forward network, H heads, V vocabulary.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import torch

from src.lm_loss import LOGIT_POSITIONS, ROWS_CPU, ROWS_GPU, VOCAB_MULTIPLE
from src.model import LLM
from src.model_utils.debugging import count_parameters
from src.params import ModelConfig

FLOAT32 = 4


@dataclass(frozen=True)
class Step:
    """How a step runs, as far as its memory depends on it."""

    model: ModelConfig
    micro_batch_size: int
    itemsize: int = 2
    """Bytes of a number in matmuls and attention: 2 for bf16 under autocast, 4 for float32."""
    kind: str = "cuda"
    """Of device. On a CPU dropout keeps numbers where a GPU keeps bytes, and RMSNorm one tensor more."""
    gradients_stay: bool = True
    """Whether gradients lie there during forward passes: with accumulation, and in the buckets of DDP."""
    beside_buckets: bool = False
    """Whether they lie beside DDP's buckets: those of passes that end without an exchange, so with accumulation."""
    logits: Literal["chunked", "full"] = "chunked"
    """chunked: as lm_loss.py has them. full: the plain way, float32 logits of all positions, as the reference did."""

    @property
    def positions(self) -> int:
        return self.micro_batch_size * self.model.n_ctx


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment of a step that needs most; `total` is their sum."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    weight_copies: int
    """bf16 copies of what autocast multiplies by, kept until the backward pass."""
    activations: int
    """What autograd keeps for the backward pass."""
    logits: int
    """Logits, their softmax, and the gradients that the loss computes at once."""
    backward: int
    """What the backward pass needs beyond that; 0 where the loss needs more."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(step: Step) -> Memory:
    """The parts of a step's memory. Left out: the CUDA context, NCCL's buffers, and what an allocator wastes."""
    parameters, in_layers = parameter_counts(step.model)
    embedding = step.model.n_vocab * step.model.n_embd * FLOAT32
    gradients, activations, loss = FLOAT32 * parameters, activation_bytes(step), _loss_bytes(step)
    # The embedding's gradient as the head's waits to the end of the backward pass for that of the look-up.
    at_the_loss = activations + max(loss, _loss_backward_bytes(step))
    in_last_block = activations + embedding + _block_backward_bytes(step)
    if step.gradients_stay:
        held, peak = gradients * (2 if step.beside_buckets else 1), max(at_the_loss, in_last_block, 2 * embedding)
    else:  # they come as the activations go
        peak = max(at_the_loss, in_last_block, gradients + embedding)
        held = min(gradients, max(0, peak - max(at_the_loss, in_last_block)))
        peak -= held
    return Memory(
        weights=FLOAT32 * parameters,
        gradients=held,
        optimizer=2 * FLOAT32 * parameters,
        weight_copies=in_layers * step.itemsize if step.itemsize != FLOAT32 else 0,
        activations=activations,
        logits=loss,
        backward=max(0, peak - activations - loss),
    )


@lru_cache(maxsize=16)
def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """All learned numbers, and those of the linear layers within blocks, which autocast copies."""
    with torch.device("meta"):
        model = LLM(config)
    in_layers = sum(parameter.numel() for name, parameter in model.blocks.named_parameters() if "_proj." in name)
    return count_parameters(model), in_layers


def activation_bytes(step: Step) -> int:
    """What autograd keeps of one micro-batch until its backward pass, without weights and their copies."""
    config, size, N = step.model, step.itemsize, step.positions
    D, F = config.n_embd, config.ffn_hidden
    mask_size = 1 if step.kind == "cuda" else size  # of dropout: bytes, or the numbers that were multiplied by
    # The residual stream and its root mean square; on a CPU, whose RMSNorm is made of simple steps, also the quotient.
    norm = N * (D + 1) * FLOAT32 + (N * D * FLOAT32 if step.kind != "cuda" else 0)
    attention = N * D * size  # normed input of the projection
    attention += N * 3 * D * size  # its output, of which only the values are needed: they are a view of it
    attention += N * 2 * D * size  # rotated queries and keys
    attention += N * 2 * D * size  # the result, and the same with the heads side by side
    attention += N * config.n_head * FLOAT32  # its log-sum-exp
    ffn = N * D * size  # normed input
    ffn += N * (2 * F + F + F) * size  # value and gate; silu(gate); their product, dropped out
    masks = N * D * mask_size * (config.residual_dropout > 0) + N * F * mask_size * (config.ffn_dropout > 0)
    rope = config.n_ctx * config.head_dim * FLOAT32
    ids = N * 8
    return config.n_layer * (2 * norm + attention + ffn + masks) + norm + rope + ids


def _loss_bytes(step: Step) -> int:
    """The most that the head and the loss need at once in the forward pass."""
    config, size, N = step.model, step.itemsize, step.positions
    D, V = config.n_embd, config.n_vocab
    hidden = N * D * FLOAT32
    cast = (N * D + V * D) * size if size != FLOAT32 else 0
    if step.logits == "full":  # in the matmul's dtype, in float32 where that is another, and their log-softmax
        return hidden + cast + N * V * (size + FLOAT32 + (FLOAT32 if size != FLOAT32 else 0))
    rows, positions = min(N, ROWS_GPU if step.kind == "cuda" else ROWS_CPU), min(N, LOGIT_POSITIONS)
    columns = -(-V // VOCAB_MULTIPLE.get(step.kind, 1)) * VOCAB_MULTIPLE.get(step.kind, 1)
    padded = columns * D * size if columns != V else 0
    softmax = rows * V * FLOAT32 * (2 if size != FLOAT32 else 1)
    logits = positions * columns * size + softmax
    # That of the weight: one product at a time, added up in float32 where there are several.
    gradients = N * D * size + columns * D * size + (V * D * FLOAT32 if positions < N else 0)
    return hidden + cast + padded + logits + gradients


def _loss_backward_bytes(step: Step) -> int:
    """What turning the gradients that the loss computed into those of its inputs needs: both, and float32 copies."""
    hidden, weight = step.positions * step.model.n_embd, step.model.n_vocab * step.model.n_embd
    if step.logits == "full":  # the log-softmax and two gradients, of it and of the float32 logits
        casts = (hidden + weight) * step.itemsize if step.itemsize != FLOAT32 else hidden * FLOAT32
        return 3 * step.positions * step.model.n_vocab * FLOAT32 + casts
    weight_size = FLOAT32 if step.positions > LOGIT_POSITIONS else step.itemsize
    both = hidden * step.itemsize + weight * weight_size
    first = hidden * FLOAT32 * (1 if step.itemsize == FLOAT32 else 2)
    second = hidden * FLOAT32 + weight * FLOAT32 * (1 if weight_size == FLOAT32 else 2)
    return both + max(first, second)


def _block_backward_bytes(step: Step) -> int:
    """What the backward pass of the last block needs beside all that was kept.

    The gradients of the feed-forward network's product, before and after the dropout, and of the residual stream.
    """
    return step.positions * (2 * step.model.ffn_hidden * step.itemsize + 2 * step.model.n_embd * FLOAT32)
