import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src.data_processing.shards import read_manifest
from src.data_processing.training_data_loader import WindowDataset
from src.model import LLM
from src.model_assessment.validation import BLOCKS, standard_error, unigram_entropy, validate
from src.params import ModelConfig
from src.utils.handle_ddp import Processes


@pytest.fixture
def windows(dataset: Callable[..., Path], tiny_config: ModelConfig) -> WindowDataset:
    folder = dataset(train_tokens=[400], val_tokens=330, n_vocab=tiny_config.n_vocab)
    return WindowDataset(folder, read_manifest(folder).validation, tiny_config.n_ctx, tiny_config.n_vocab, at_least=2)


def test_loss_is_the_mean_over_the_first_windows(windows: WindowDataset, tiny_config: ModelConfig):
    model = LLM(tiny_config).eval()
    result = validate(model, windows, n_windows=7, batch_size=3, bytes_per_token=4.0)
    tokens = torch.tensor(np.load(windows.paths[0])[: 7 * 16 + 1].astype("int64"))
    with torch.no_grad():
        losses = [
            F.cross_entropy(model.eval()(tokens[None, i : i + 16])[0], tokens[i + 1 : i + 17], reduction="sum").item()
            for i in range(0, 7 * 16, 16)
        ]
    expected = sum(losses) / (7 * 16)
    assert result.tokens == 7 * 16
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / 4.0, rel=1e-5)


def test_the_standard_error_does_not_depend_on_the_batch(windows: WindowDataset, tiny_config: ModelConfig):
    model = LLM(tiny_config).eval()
    batches = torch.from_numpy(np.stack([windows[i] for i in range(8)]).astype("int64")).split(1)
    with torch.no_grad():
        means = [model(batch[:, :-1], batch[:, 1:]).item() for batch in batches]
    for batch_size in (3, 8):  # which does not matter
        collected: list[float] = []
        result = validate(
            model, windows, n_windows=8, batch_size=batch_size, bytes_per_token=4.0, window_losses=collected
        )
        assert collected == pytest.approx(means, rel=1e-5)
        assert result.stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(8), rel=1e-3)  # fewer than BLOCKS
    assert validate(model, windows, n_windows=1, batch_size=2, bytes_per_token=4.0).stderr is None


def test_neighbours_that_are_alike_count_once():
    documents = np.random.default_rng(0).normal(3.0, 0.5, BLOCKS)
    alike = np.repeat(documents, 5)  # five windows of each document, with equal losses
    assert standard_error(alike.tolist()) == pytest.approx(np.std(documents, ddof=1) / math.sqrt(BLOCKS))


@pytest.mark.parametrize("world_size", [2, 9])
def test_any_number_of_processes_measures_the_same_tokens(windows: WindowDataset, tiny_config, world_size: int):
    model = LLM(tiny_config).eval()
    alone = validate(model, windows, n_windows=7, batch_size=3, bytes_per_token=4.0)
    parts: list[list[float]] = []

    class Part(Processes):
        def sum(self, values: Sequence[float]) -> list[float]:
            parts.append(list(values))
            return [1.0] * len(values)  # one process may have no tokens to divide by

    for rank in range(world_size):
        procs = Part(rank, rank, world_size, torch.device("cpu"))
        validate(model, windows, n_windows=7, batch_size=3, bytes_per_token=4.0, procs=procs)
    nats, tokens, *losses = map(sum, zip(*parts, strict=True))
    assert tokens == alone.tokens
    assert nats / tokens == pytest.approx(alone.loss, rel=1e-6)
    assert standard_error(losses) == pytest.approx(alone.stderr, rel=1e-3)


def test_unigram_entropy_is_the_best_loss_without_context(windows: WindowDataset):
    counts = Counter(np.load(windows.paths[0])[1 : 7 * 16 + 1].tolist())
    total = sum(counts.values())
    expected = -sum(c / total * math.log(c / total) for c in counts.values())
    assert unigram_entropy(windows, 7) == pytest.approx(expected, rel=1e-12)
