"""The next tokens of sequences, one at a time, with a key-value cache.

The model sees at most n_ctx tokens. When a sequence grows past that, its older half is forgotten and
the rest is read anew, so the window moves in strides of n_ctx / 2 and the cache stays useful between
them. Which tokens a position sees depends on its length alone, so the cache changes nothing.

Sequences of unequal length share a batch, padded on the left; a mask hides the padding.
Shapes: B sequences, T positions, S positions including those that were cached, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from src.attention import KVCache
from src.model import LLM
from src.utils.errors import UserError

# Sorting all of a vocabulary takes longer than a small model needs for a token; the likeliest of this many nearly
# always hold the probability that top_p asks for.
LIKELIEST = 1_024


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. Raises UserError for values that cannot work.

    In this order: the penalty, the temperature, then top_k, top_p and min_p, each of what the one before has left.
    """

    max_new_tokens: int = 50
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability (nucleus sampling, arXiv:1904.09751)."""
    seed: int = 0
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest one (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Makes tokens that are in the text already less likely: divides their logits where positive, else multiplies them
    (arXiv:1909.05858); 1 changes nothing."""
    stop: tuple[str, ...] = ()
    """Texts at whose first appearance a continuation ends, without them."""

    def __post_init__(self) -> None:
        wrong = []
        if self.max_new_tokens < 1:
            wrong.append(f"max_new_tokens = {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            wrong.append(f"temperature = {self.temperature} must be 0 or above")
        if self.top_k < 0:
            wrong.append(f"top_k = {self.top_k} must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p = {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            wrong.append(f"min_p = {self.min_p} must be between 0 and 1")
        if not 0 < self.repetition_penalty < float("inf"):
            wrong.append(f"repetition_penalty = {self.repetition_penalty} must be above 0; 1 turns it off")
        if not 0 <= self.seed < 2**63:
            wrong.append(f"seed = {self.seed} must be between 0 and 2^63 - 1")
        if not all(self.stop):
            wrong.append("stop holds an empty text, which is everywhere")
        if wrong:
            raise UserError("; ".join(wrong))


@torch.inference_mode()
def generate(
    model: LLM,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    samples: Sequence[int],
    ended: set[int],
    n_tokens: int | None = None,
) -> Iterator[tuple[list[int], list[float]]]:
    """Each row's next token and the log-probability that the model gave it, in nats, config.max_new_tokens times.

    prompts: token ids, at least one in each row. samples: which sample of its prompt each row is, for its random
    numbers. ended: rows whose tokens are of no interest any more; the caller adds to them, and once it holds all,
    nothing more comes. n_tokens: ids from there on are no tokens, though the model may have logits for them, and are
    never chosen. The log-probability is the model's own, whatever the settings leave of it.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    rows = [list(prompt) for prompt in prompts]
    generators = [_generator(config.seed, i) for i in samples]
    caches, start = model.new_caches(len(rows), _cache_dtype(model)), -1
    try:
        for _ in range(config.max_new_tokens):
            new = 1
            if start != (start := _window_start(len(rows[0]), model.config.n_ctx)):
                for cache in caches:
                    cache.length = 0
                new = len(rows[0]) - start
            ids_BT = torch.tensor([row[-new:] for row in rows], device=device)
            logits_BV = _last_logits(model, ids_BT, caches)[:, :n_tokens].float().cpu()
            log_norms_B = logits_BV.logsumexp(dim=-1)
            draws_B = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
            next_B = _choose(_penalized(logits_BV, rows, config.repetition_penalty), draws_B, config)
            log_probs_B = logits_BV.gather(1, next_B[:, None]).squeeze(1) - log_norms_B
            for row, token in zip(rows, next_B.tolist(), strict=True):
                row.append(token)
            yield next_B.tolist(), log_probs_B.tolist()
            if len(ended) == len(rows):
                break
    finally:
        model.train(was_training)


def _last_logits(model: LLM, ids_BT: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
    """(B, V), as model(ids_BT, caches=caches) gives them at the last position, without those of the others."""
    x_BTD = model.embedding(ids_BT)
    for block, cache in zip(model.blocks, caches, strict=True):
        x_BTD = block(x_BTD, cache)
    return model.head(model.norm(x_BTD[:, -1]))


def _penalized(logits_BV: torch.Tensor, rows: list[list[int]], penalty: float) -> torch.Tensor:
    if penalty == 1:
        return logits_BV
    logits_BV = logits_BV.clone()
    for logits_V, row in zip(logits_BV, rows, strict=True):
        there = torch.tensor(sorted(set(row)))
        found = logits_V[there]
        logits_V[there] = torch.where(found > 0, found / penalty, found * penalty)
    return logits_BV


def _choose(logits_BV: torch.Tensor, draws_B: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The next token of each row, (B,) int64: the one at which the cumulated probability passes the row's draw."""
    if config.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = torch.softmax(logits_BV.double() / config.temperature, dim=-1)
    probs_BK, order_BK = probs_BV, None
    if config.top_k or config.top_p < 1:
        probs_BK, order_BK = _likeliest(probs_BV, config)
    probs_BK[probs_BK < config.min_p * probs_BK.amax(dim=-1, keepdim=True)] = 0
    cumulated_BK = probs_BK.cumsum(dim=-1)
    targets_B1 = draws_B[:, None] * cumulated_BK[:, -1:]
    place_B1 = torch.searchsorted(cumulated_BK, targets_B1, right=True).clamp(max=probs_BK.shape[1] - 1)
    return (place_B1 if order_BK is None else order_BK.gather(1, place_B1)).squeeze(1)


def _likeliest(probs_BV: torch.Tensor, config: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and ids of the tokens that top_k and top_p keep, the likeliest first; others have probability 0."""
    n_vocab = probs_BV.shape[1]
    probs_BK, order_BK = probs_BV.topk(min(config.top_k or LIKELIEST, n_vocab), dim=-1)
    if config.top_k:
        probs_BK /= probs_BK.sum(dim=-1, keepdim=True)
    elif (short_B := probs_BK.sum(dim=-1) < config.top_p).any():  # row by row: no row's choice depends on the others
        rest = n_vocab - probs_BK.shape[1]
        probs_BK, order_BK = F.pad(probs_BK, (0, rest)), F.pad(order_BK, (0, rest))
        probs_BK[short_B], order_BK[short_B] = probs_BV[short_B].sort(dim=-1, descending=True)
    before_BK = probs_BK.cumsum(dim=-1) - probs_BK
    probs_BK[before_BK >= config.top_p] = 0  # never the first: nothing comes before it
    return probs_BK, order_BK


def _window_start(length: int, n_ctx: int) -> int:
    """The first token that the model sees of a sequence of `length` tokens."""
    stride = max(1, n_ctx // 2)
    return max(0, -(-(length - n_ctx) // stride) * stride)


def _generator(seed: int, sample: int) -> torch.Generator:
    """Random numbers on the CPU, so that every device draws the same."""
    mixed = np.random.SeedSequence((seed, sample)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def _cache_dtype(model: LLM) -> torch.dtype:
    """What the attention's projections come in: the autocast dtype, or the weights' own."""
    device = model.embedding.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.embedding.weight.dtype
