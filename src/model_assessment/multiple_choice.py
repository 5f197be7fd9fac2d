"""The log-probabilities that a model gives to several endings of one context, for many questions at a time.

Each ending is a row of a batch, after its context. Rows of similar length make a batch, padded on the right, and logits
exist only where the next token belongs to an ending.

Shapes: B rows of a batch, T places in a row, S the places that each of them sees, D width, V vocabulary, N tokens of
endings in a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from src.model import LLM

# Tokens of a batch, padding included. A CPU is fastest while activations stay near its caches; a GPU wants large
# kernels.
TOKENS_CPU = 1_024
TOKENS_GPU = 32_768
# Positions whose logits exist at once, and on a CPU the logits themselves: 8 MB in float32 stay near its cores. With
# those of all 50,257 words of 128 positions at once, the head took twice as long at width 256, 1.7 times at 1,024.
POSITIONS = 1_024
LOGITS_CPU = 2**21


@dataclass(frozen=True)
class Question:
    """Token ids, at least one in each text."""

    context: Sequence[int]
    endings: Sequence[Sequence[int]]


class EndingScore(NamedTuple):
    log_prob: float
    """Sum over the ending's tokens, in nats."""
    tokens: int
    """How many those are: fewer than the ending has, where it is longer than the model's context."""


@torch.no_grad()
def score_endings(
    model: LLM,
    questions: Sequence[Question],
    *,
    rank: int = 0,
    world_size: int = 1,
    token_budget: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[int, list[EndingScore]]:
    """The endings' scores of each of this process's questions, by the question's index.

    A batch holds at most `token_budget` tokens, padding included, and at least one question; None suits the device.
    Rounding depends on which questions share a batch, so that must not depend on `world_size`: all processes form
    the same batches, and deal out whole ones. Where context and ending are longer than the model's context, the
    beginning is cut. Autocast is the caller's. `on_progress` gets the number of questions this process has done.
    `between_batches` is called equally often in every process, and may raise to give up.
    """
    device = model.embedding.weight.device
    token_budget = token_budget or (TOKENS_CPU if device.type == "cpu" else TOKENS_GPU)
    rows = [_rows(question, model.config.n_ctx) for question in questions]
    scores: dict[int, list[EndingScore]] = {}
    was_training = model.training
    model.eval()
    try:
        batches = _batches(rows, token_budget)
        for first in range(0, len(batches), world_size):
            between_batches()
            if first + rank >= len(batches):
                continue  # other processes have one batch more
            batch = batches[first + rank]
            found = iter(_score(model, [row for i in batch for row in rows[i]], device))
            for i in batch:
                by_number = {number: next(found) for row in rows[i] for number in row.numbers}
                scores[i] = [by_number[number] for number in range(len(by_number))]
            if on_progress:
                on_progress(len(scores))
    finally:
        model.train(was_training)
    return scores


@dataclass(frozen=True)
class _Row:
    context: Sequence[int]
    endings: list[Sequence[int]]
    numbers: list[int]
    """Which of the question's endings they are."""

    @property
    def length(self) -> int:
        """Places it takes: an ending's last token is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def _rows(question: Question, n_ctx: int) -> list[_Row]:
    """One row for each ending, with as much of the end of the context as fits before it."""
    rows = []
    for number, ending in enumerate(question.endings):
        tokens = [*question.context, *ending][-n_ctx - 1 :]
        scored = min(len(ending), n_ctx)
        rows.append(_Row(tuple(tokens[:-scored]), [tokens[-scored:]], [number]))
    return rows


def _batches(rows: list[list[_Row]], token_budget: int) -> list[list[int]]:
    """Indices of questions, batch by batch; those of similar length together, the longest first.

    A question's rows stay together. The longest first, so that what does not fit fails at once.
    """
    longest = [max(row.length for row in question_rows) for question_rows in rows]
    batches: list[list[int]] = []
    rows_left = 0
    for i in sorted(range(len(rows)), key=lambda i: -longest[i]):
        if rows_left < len(rows[i]):
            batches.append([])
            rows_left = token_budget // longest[i]
        batches[-1].append(i)
        rows_left -= len(rows[i])
    return batches


def _score(model: LLM, rows: list[_Row], device: torch.device) -> list[EndingScore]:
    """The score of each ending of each row, in order."""
    B, T = len(rows), max(row.length for row in rows)
    # Padded on the right: attention is causal, so nothing before the padding sees it.
    ids_BT = torch.zeros(B, T, dtype=torch.int64)
    before_N: list[int] = []  # the place in the batch from which each token of an ending is predicted
    for b, row in enumerate(rows):
        tokens = [*row.context, *row.endings[0][:-1]]
        ids_BT[b, : len(tokens)] = torch.tensor(tokens)
        before_N += range(b * T + len(row.context) - 1, b * T + len(tokens))
    targets_N = [token for row in rows for ending in row.endings for token in ending]

    x_BTD = model.embedding(ids_BT.to(device))
    for block in model.blocks:
        x_BTD = block(x_BTD)
    hidden_ND = model.norm(x_BTD.flatten(0, 1)[torch.tensor(before_N, device=device)])
    log_probs_N = _log_probs(model, hidden_ND, torch.tensor(targets_N, device=device)).cpu().double()
    sizes = [len(ending) for row in rows for ending in row.endings]
    return [EndingScore(part.sum().item(), len(part)) for part in log_probs_N.split(sizes)]


def _log_probs(model: LLM, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """log softmax(head(hidden))[target], (N,) float32, with few of the logits at once."""
    in_parts = hidden_ND.device.type == "cpu"
    log_probs = _log_probs_by_vocabulary_part if in_parts else _log_probs_of_all
    parts = zip(hidden_ND.split(POSITIONS), targets_N.split(POSITIONS), strict=True)
    return torch.cat([log_probs(model, hidden, targets) for hidden, targets in parts])


def _log_probs_of_all(model: LLM, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(model.head(hidden_ND).float(), targets_N, reduction="none")


def _log_probs_by_vocabulary_part(model: LLM, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The target's logit, less the logarithm of the sum over the vocabulary, which is added up part by part."""
    log_sums, target_logits_N = [], torch.zeros(len(targets_N))
    n_ids = LOGITS_CPU // len(hidden_ND)
    for first in range(0, model.config.n_vocab, n_ids):
        weight_VD = model.embedding.weight[first : first + n_ids]
        logits_NV = F.linear(hidden_ND, weight_VD).float()
        here_N = (targets_N >= first) & (targets_N < first + len(weight_VD))
        column_N = (targets_N - first).clamp(0, len(weight_VD) - 1)
        target_logits_N = torch.where(here_N, logits_NV.gather(1, column_N[:, None]).squeeze(1), target_logits_N)
        highest_N1 = logits_NV.amax(dim=-1, keepdim=True)
        sums_N1 = logits_NV.sub_(highest_N1).exp_().sum(dim=-1, keepdim=True)
        log_sums.append((highest_N1 + sums_N1.log()).squeeze(1))
    return target_logits_N - torch.stack(log_sums).logsumexp(dim=0)
