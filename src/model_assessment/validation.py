"""Validation loss on the same tokens every time, for any number of processes.

Shapes: B sequences, T positions.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from src.data_processing.training_data_loader import WindowDataset
from src.lm_loss import linear_losses
from src.model import LLM
from src.utils.handle_ddp import ALONE, Processes

BLOCKS = 32  # gives the standard error to about 12%


@dataclass(frozen=True)
class ValidationResult:
    loss: float
    """Mean negative log-likelihood per token, nats."""
    perplexity: float
    bits_per_byte: float
    """Loss in bits per byte of text, which is comparable between tokenizers."""
    tokens: int
    """Predicted tokens."""
    stderr: float | None
    """Standard error of `loss`, see `standard_error`."""
    seconds: float


@torch.no_grad()
def validate(
    model: LLM,
    dataset: WindowDataset,
    *,
    n_windows: int,
    batch_size: int,
    bytes_per_token: float,
    procs: Processes = ALONE,
    between_batches: Callable[[int], object] = lambda done: None,
    window_losses: list[float] | None = None,
) -> ValidationResult:
    """The loss of `model`, in eval mode, over the first `n_windows` windows; equal in every process.

    Every process calls `between_batches` equally often, with the number of windows done, and it may raise to give up.
    `window_losses` collects the mean loss of each window.
    """
    device = next(model.parameters()).device
    started = time.perf_counter()
    nats, tokens, losses = 0.0, 0.0, np.zeros(n_windows)
    local, most = range(procs.rank, n_windows, procs.world_size), len(range(0, n_windows, procs.world_size))
    for first in range(0, most, batch_size):
        between_batches(first * procs.world_size)
        numbers = local[first : first + batch_size]
        if not numbers:
            continue  # other processes have one more window
        batch_BT = torch.from_numpy(np.stack([dataset[number] for number in numbers]).astype(np.int64)).to(device)
        targets_N = batch_BT[:, 1:].flatten()
        losses_N = linear_losses(model.hidden(batch_BT[:, :-1]).flatten(0, 1), model.head.weight, targets_N)
        nats, tokens = nats + losses_N.mean().item() * len(targets_N), tokens + len(targets_N)
        losses[list(numbers)] = losses_N.cpu().double().unflatten(0, (len(numbers), -1)).mean(dim=1).numpy()
    nats, tokens, *means = procs.sum([nats, tokens, *losses.tolist()])
    if window_losses is not None:
        window_losses += means
    loss = nats / tokens
    return ValidationResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows a float beyond 709
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        tokens=int(tokens),
        stderr=standard_error(means),
        seconds=time.perf_counter() - started,
    )


def standard_error(window_losses: Sequence[float]) -> float | None:
    """Standard error, nats, of the mean loss of successive windows, or of the mean difference of two models' losses.

    It is computed from the means of at most BLOCKS blocks of neighbouring windows, because neighbours come from the
    same documents and have similar losses. Single windows would give half the error (LOG.md). None for one window.
    """
    blocks = [part.mean() for part in np.array_split(window_losses, min(BLOCKS, len(window_losses)))]
    return float(np.std(blocks, ddof=1) / math.sqrt(len(blocks))) if len(blocks) > 1 else None


def unigram_entropy(dataset: WindowDataset, n_windows: int) -> float:
    """Entropy, in nats per token, of the frequencies of the tokens that `validate` predicts.

    A model that ignores the context cannot reach a lower loss on them.
    """
    targets = np.concatenate([dataset[number][1:] for number in range(n_windows)])
    counts = np.bincount(targets)
    shares = counts[counts > 0] / counts.sum()
    return float(abs((shares * np.log(shares)).sum()))  # not -0.0
