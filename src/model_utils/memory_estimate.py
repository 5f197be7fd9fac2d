"""Memory of a training step by part, derived from the model's code without running it.

tests/model_utils/test_memory_estimate.py compares it with the tensors that autograd keeps and PyTorch's allocator.
Shapes: N positions of a micro-batch, D width, F hidden size of the feed-forward network, V vocabulary.
"""

from dataclasses import asdict, dataclass, replace
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
    """The properties of a training step that determine its memory."""

    model: ModelConfig
    micro_batch_size: int
    itemsize: int = 2
    """Bytes of a number in matmuls: 2 for bf16 autocast, 4 for float32."""
    kind: str = "cuda"
    """Type of device."""
    kept_gradients: int = 1
    """Copies of all gradients during forward passes: one with accumulation or DDP, two with both, because only the last
    pass fills DDP's buckets."""
    is_compiled: bool = False
    has_muon: bool = False
    logits: Literal["chunked", "full"] = "chunked"
    """chunked: like lm_loss.py. full: float32 logits of all positions, like the reference."""

    @property
    def positions(self) -> int:
        return self.micro_batch_size * self.model.n_ctx


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments, Muon's one."""
    weight_copies: int
    """bf16 copies that autocast makes of the blocks' matrices and biases."""
    activations: int
    """Tensors that autograd keeps for the backward pass."""
    logits: int
    """Logits, softmax and the gradients that the loss computes in its forward pass."""
    backward: int
    """Additional memory of the backward pass; 0 if the loss needs more."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate_memory(step: Step) -> Memory:
    """The parts of a step's memory, without the CUDA context, NCCL's buffers and fragmentation."""
    parameters, in_layers = parameter_counts(step.model)
    embedding = step.model.n_vocab * step.model.n_embd * FLOAT32
    gradients, activations, loss = FLOAT32 * parameters, activation_bytes(step), _loss_bytes(step)
    at_the_loss = activations + max(loss, _loss_backward_bytes(step))
    # Gradients in the last block's backward pass: the embedding's from the head, which waits for the one from its
    # lookup; the feed-forward product's, before and after dropout; and the residual stream's, twice.
    in_last_block = activations + embedding
    in_last_block += step.positions * (2 * step.model.ffn_hidden * step.itemsize + 2 * step.model.n_embd * FLOAT32)
    if step.kept_gradients:
        held, peak = gradients * step.kept_gradients, max(at_the_loss, in_last_block, 2 * embedding)
    else:  # gradients appear while activations disappear, so they count only if both together exceed the peak
        peak = max(at_the_loss, in_last_block, gradients + embedding)
        held = min(gradients, max(0, peak - max(at_the_loss, in_last_block)))
        peak -= held
    copies = in_layers * step.itemsize if step.itemsize != FLOAT32 else 0
    backward = max(0, peak - activations - loss)
    moments = FLOAT32 * (2 * parameters - (in_layers if step.has_muon else 0))
    return Memory(FLOAT32 * parameters, held, moments, copies, activations, loss, backward)


@lru_cache(maxsize=16)
def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """All parameters, and those of the linear layers inside blocks."""
    with torch.device("meta"):
        model = LLM(replace(config, n_layer=1))  # one block represents all, so that depth takes no time
    block, others = count_parameters(model.blocks), count_parameters(model) - count_parameters(model.blocks)
    in_layers = sum(parameter.numel() for name, parameter in model.blocks.named_parameters() if "_proj." in name)
    return others + config.n_layer * block, config.n_layer * in_layers


def activation_bytes(step: Step) -> int:
    """Bytes that autograd keeps for a micro-batch, without weights and their copies; derived from the model's code."""
    config, size, N, on_gpu = step.model, step.itemsize, step.positions, step.kind == "cuda"
    D, F = config.n_embd, config.ffn_hidden
    norm = N * (D + 1) * FLOAT32 + (0 if on_gpu else N * D * FLOAT32)  # input and root mean square; a CPU's quotient
    attention = N * (D + 3 * D + 2 * D) * size  # input, its projection, rotated queries and keys
    attention += N * D * size + N * config.n_head * FLOAT32  # result, log-sum-exp
    if config.qk_norm:  # root mean squares by head; if needed, float32 copies of queries and keys; a CPU's quotients
        attention += N * 2 * config.n_head * FLOAT32 + (0 if on_gpu else N * 2 * D * FLOAT32)
        attention += N * 2 * D * FLOAT32 if size != FLOAT32 and not step.is_compiled else 0
    hidden = 2 * F if config.ffn == "relu2" else 4 * F  # relu(up) and its square; value, gate, silu(gate) and product
    ffn = N * (D + hidden) * size
    if step.is_compiled:
        # The backward pass recomputes two things: silu(gate), and the second norm's input from out_proj's result.
        ffn -= N * F * size if config.ffn == "swiglu" else 0
        attention -= N * D * (FLOAT32 - size)
    mask = 1 if on_gpu else size  # on a CPU, dropout keeps the factors themselves
    masks = N * D * mask * (config.residual_dropout > 0) + N * F * mask * (config.ffn_dropout > 0)
    rope_and_ids = config.n_ctx * config.head_dim * FLOAT32 + N * 8
    return config.n_layer * (2 * norm + attention + ffn + masks) + norm + rope_and_ids


def _loss_bytes(step: Step) -> int:
    """The peak of head and loss in the forward pass, which also computes their gradients: see lm_loss.py."""
    config, size, N = step.model, step.itemsize, step.positions
    D, V, is_cast = config.n_embd, config.n_vocab, size != FLOAT32
    hidden = N * D * (FLOAT32 + is_cast * size)
    if step.logits == "full":  # in the matmul's dtype, in float32, and their log-softmax
        return hidden + is_cast * V * D * size + N * V * (FLOAT32 + is_cast * (size + FLOAT32))
    rows, piece = min(N, ROWS_GPU if step.kind == "cuda" else ROWS_CPU), min(N, LOGIT_POSITIONS)
    columns = -(-V // VOCAB_MULTIPLE.get(step.kind, 1)) * VOCAB_MULTIPLE.get(step.kind, 1)
    weight = columns * D * size if is_cast or columns != V else 0
    # With several pieces, the weight's gradients are summed in float32, and the previous piece's still exists.
    summed = V * D * FLOAT32 + columns * D * size if piece < N else 0
    softmax = 0 if step.is_compiled else rows * V * FLOAT32 * (1 + is_cast)
    copies = 2 if is_cast and step.kind == "cpu" else 1  # oneDNN's bf16 product writes a copy of its result
    gradients = N * D * size + columns * D * size * copies
    return hidden + weight + piece * columns * size + summed + max(softmax + (N - piece) * D * size, gradients)


def _loss_backward_bytes(step: Step) -> int:
    """The peak while the loss's gradients are scaled and cast: the stored gradients and float32 copies."""
    hidden, weight = step.positions * step.model.n_embd, step.model.n_vocab * step.model.n_embd
    is_cast = step.itemsize != FLOAT32
    if step.logits == "full":  # the log-softmax, its gradient and that of the float32 logits
        logits = 3 * step.positions * step.model.n_vocab * FLOAT32
        return logits + ((hidden + weight) * step.itemsize if is_cast else hidden * FLOAT32)
    weight_size = FLOAT32 if step.positions > LOGIT_POSITIONS else step.itemsize
    scaled_hidden = hidden * FLOAT32 * (1 + is_cast)
    scaled_weight = hidden * FLOAT32 + weight * FLOAT32 * (1 + (weight_size != FLOAT32))
    return hidden * step.itemsize + weight * weight_size + max(scaled_hidden, scaled_weight)
