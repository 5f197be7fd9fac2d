"""Validation loss on the same tokens every time, for any number of processes.

Shapes: B sequences, T positions.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from src.data_processing.training_data_loader import WindowDataset
from src.utils.handle_ddp import ALONE, Processes


@dataclass(frozen=True)
class ValidationResult:
    loss: float
    """Mean negative log-likelihood per token, nats."""
    perplexity: float
    bits_per_byte: float
    """Bits per byte of the text: comparable between tokenizers."""
    tokens: int
    """Predicted tokens."""
    stderr: float | None
    """Standard error of `loss`, from the spread of the batches; None for a single batch."""
    seconds: float


@torch.no_grad()
def validate(
    model: nn.Module,
    dataset: WindowDataset,
    *,
    n_windows: int,
    batch_size: int,
    bytes_per_token: float,
    procs: Processes = ALONE,
    between_batches: Callable[[], object] = lambda: None,
    batch_losses: list[float] | None = None,
) -> ValidationResult:
    """The loss of `model`, in eval mode, over the first `n_windows` windows; equal in every process.

    `model(inputs_BT, targets_BT)` returns the mean loss in nats. Every process calls `between_batches` equally often,
    and it may raise to give up. `batch_losses` collects this process's losses.
    """
    device = next(model.parameters()).device
    started = time.perf_counter()
    sums = np.zeros(4)  # of nats, of squared losses weighted by tokens, of tokens, of batches
    local, most = range(procs.rank, n_windows, procs.world_size), len(range(0, n_windows, procs.world_size))
    for first in range(0, most, batch_size):
        between_batches()
        numbers = local[first : first + batch_size]
        if not numbers:
            continue  # other processes have one window more
        batch_BT = torch.from_numpy(np.stack([dataset[number] for number in numbers]).astype(np.int64)).to(device)
        loss, n_tokens = model(batch_BT[:, :-1], batch_BT[:, 1:]).item(), batch_BT[:, 1:].numel()
        sums += [loss * n_tokens, loss**2 * n_tokens, n_tokens, 1]
        if batch_losses is not None:
            batch_losses.append(loss)
    nats, squares, tokens, batches = procs.sum(sums.tolist())
    loss = nats / tokens
    variance = max(0.0, squares / tokens - loss**2)  # of the batches' means
    return ValidationResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows a float beyond 709
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        tokens=int(tokens),
        stderr=math.sqrt(variance / (batches - 1)) if batches > 1 else None,
        seconds=time.perf_counter() - started,
    )


def unigram_entropy(dataset: WindowDataset, n_windows: int) -> float:
    """Entropy, in nats per token, of the frequencies of the tokens that `validate` predicts.

    A model that ignores the context cannot have a lower loss on them.
    """
    targets = np.concatenate([dataset[number][1:] for number in range(n_windows)])
    counts = np.bincount(targets)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
