"""HellaSwag: how often does the model find the right one of four endings the likeliest?

The task is Zellers et al. 2019, https://arxiv.org/abs/1905.07830. Protocol: the raw `ctx`, then each ending
after a single space, the two encoded separately; the choice is the ending whose tokens have the highest
mean log-probability. An item is correct if that is its `label`; guessing gives 25%.

Rows, a context with one of its endings, are scored many at a time. Shapes: B rows of a batch, T positions,
D width, V vocabulary, N positions of a batch whose next token belongs to an ending.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from src.data_processing.shards import check_shard, read_manifest
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.model import LLM
from src.model_assessment.held_out_items import held_out_items
from src.model_assessment.hellaswag_items import Item, fetch_items, load_items
from src.model_utils.load_model import LoadedModel, load_model
from src.utils.errors import UserError, exit_with
from src.utils.root import dataset_dir

# What a result says about itself. The second is never to be read as the first.
HELLASWAG_PROTOCOL = (
    "hellaswag-ctx-mean-logprob (HellaSwag: raw ctx, ending of the highest mean log-probability a token)"
)
HELD_OUT_PROTOCOL = "held-out-ctx-mean-logprob (not HellaSwag: a stand-in from held-out text, scored the same way)"

# Tokens of a batch, padding included. A CPU is fastest while activations stay near its caches: 4,096 beat 16,384 by
# a quarter at width 256. A GPU wants large kernels.
TOKENS_CPU = 4_096
TOKENS_GPU = 32_768
# Positions whose logits exist at once, 50,257 x 4 bytes each in float32.
LOGIT_ROWS_CPU = 128
LOGIT_ROWS_GPU = 2_048


@dataclass(frozen=True)
class HellaSwagResult:
    acc_norm: float
    """correct / total; the field's name for accuracy by length-normalized log-probability."""
    correct: int
    total: int
    stderr: float
    """Standard error of acc_norm as a binomial share: sqrt(p (1 - p) / total)."""
    protocol: str
    seconds: float
    """Wall time, encoding included."""


def choose_items(
    data: str, limit: int | None, validation_shard: Path | None, tokenizer: Tokenizer
) -> tuple[str, list[Item]]:
    """The protocol's text and the first `limit` items of `data`.

    "auto" fetches HellaSwag, "held-out" makes a stand-in from the documents of `validation_shard`, the same one
    every time, and anything else is a file. Raises UserError.
    """
    if data == "held-out":
        assert validation_shard is not None, "held-out items need held-out text"
        tokens = np.load(validation_shard, mmap_mode="r", allow_pickle=False)
        return HELD_OUT_PROTOCOL, held_out_items(tokens, tokenizer, limit or len(tokens), seed=0)
    return HELLASWAG_PROTOCOL, fetch_items(limit) if data == "auto" else load_items(Path(data), limit)


def evaluate(
    model: LLM,
    items: Sequence[Item],
    encode: Callable[[str], list[int]],
    *,
    protocol: str,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[Sequence[float]], Sequence[float]] = list,
    token_budget: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> HellaSwagResult:
    """The accuracy of `model` on `items`, which the processes share out between them.

    `protocol` says what the items are; `sum_over_ranks` adds up each value over all processes. The result is
    the same for any `world_size`. The rest is as for `item_scores`.
    """
    assert items, "an accuracy needs items"
    started = time.perf_counter()
    scores = item_scores(
        model,
        items,
        encode,
        rank=rank,
        world_size=world_size,
        token_budget=token_budget,
        on_progress=on_progress,
        between_batches=between_batches,
    )
    hits = sum(_is_correct(values, items[i].label) for i, values in scores.items())
    correct, total = (int(value) for value in sum_over_ranks([hits, len(scores)]))
    assert total == len(items), f"{total} items were scored of {len(items)}"
    share = correct / total
    stderr = math.sqrt(share * (1 - share) / total)
    return HellaSwagResult(share, correct, total, stderr, protocol, time.perf_counter() - started)


@torch.no_grad()
def item_scores(
    model: LLM,
    items: Sequence[Item],
    encode: Callable[[str], list[int]],
    *,
    rank: int = 0,
    world_size: int = 1,
    token_budget: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[int, list[float]]:
    """For each of this process's items, by index: its endings' mean log-probabilities a token, in nats.

    A batch holds at most `token_budget` tokens, padding included, and at least one item; None suits the device.
    Rounding depends on which items share a batch, so that must not depend on `world_size`: all processes form
    the same batches, and deal out whole ones. A row longer than the model's context loses its beginning.
    Autocast is the caller's. `on_progress` gets the number of items this process has done. `between_batches` is
    called equally often in every process, and may raise to give up.
    """
    device = model.embedding.weight.device
    token_budget = token_budget or (TOKENS_CPU if device.type == "cpu" else TOKENS_GPU)
    rows = [_rows(item, encode, model.config.n_ctx) for item in items]
    scores: dict[int, list[float]] = {}
    was_training = model.training
    model.eval()
    try:
        batches = _batches(rows, token_budget)
        for first in range(0, len(batches), world_size):
            between_batches()
            if first + rank >= len(batches):
                continue  # other processes have one batch more
            batch = batches[first + rank]
            means = iter(_mean_log_probs(model, [row for i in batch for row in rows[i]], device))
            for i in batch:
                scores[i] = list(islice(means, len(rows[i])))
            if on_progress:
                on_progress(len(scores))
    finally:
        model.train(was_training)
    return scores


@dataclass(frozen=True)
class _Row:
    tokens: list[int]
    scored: int
    """How many tokens at the end are the ending's."""


def _rows(item: Item, encode: Callable[[str], list[int]], n_ctx: int) -> list[_Row]:
    """One row an ending. The last token is only predicted, so that n_ctx + 1 tokens fit."""
    context = encode(item.ctx)
    endings = [encode(" " + ending) for ending in item.endings]
    return [_Row((context + ending)[-n_ctx - 1 :], min(len(ending), n_ctx)) for ending in endings]


def _batches(rows: list[list[_Row]], token_budget: int) -> list[list[int]]:
    """Indices of items, batch by batch; items of similar length together, the longest first.

    The four rows of an item stay together. The longest first, so that what does not fit fails at once.
    """
    longest = [max(len(row.tokens) for row in item_rows) for item_rows in rows]
    batches: list[list[int]] = []
    rows_left = 0
    for i in sorted(range(len(rows)), key=lambda i: -longest[i]):
        if rows_left < len(rows[i]):
            batches.append([])
            rows_left = token_budget // longest[i]
        batches[-1].append(i)
        rows_left -= len(rows[i])
    return batches


def _mean_log_probs(model: LLM, rows: list[_Row], device: torch.device) -> list[float]:
    """For each row, the mean over its ending's tokens of their log-probability in nats."""
    inputs_BT = np.zeros((len(rows), max(len(row.tokens) for row in rows) - 1), dtype=np.int64)
    for b, row in enumerate(rows):  # padded on the right, which causal attention never looks at
        inputs_BT[b, : len(row.tokens) - 1] = row.tokens[:-1]
    hidden_BTD = model.hidden(torch.from_numpy(inputs_BT).to(device))

    ends = [len(row.tokens) - 1 for row in rows]  # position t predicts token t + 1
    row_N = np.repeat(np.arange(len(rows)), [row.scored for row in rows])
    position_N = np.concatenate([np.arange(end - row.scored, end) for row, end in zip(rows, ends, strict=True)])
    targets_N = np.concatenate([row.tokens[-row.scored :] for row in rows])
    scored = torch.from_numpy(np.stack([row_N, position_N, targets_N])).to(device)

    log_probs_N = _log_probs(model, hidden_BTD[scored[0], scored[1]], scored[2]).cpu().double()
    return [part.mean().item() for part in log_probs_N.split([row.scored for row in rows])]


def _log_probs(model: LLM, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """log softmax(head(hidden))[target], (N,) float32, with the logits of few positions at once."""
    size = LOGIT_ROWS_CPU if hidden_ND.device.type == "cpu" else LOGIT_ROWS_GPU
    parts = zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    return torch.cat([-F.cross_entropy(model.logits(h).float(), t, reduction="none") for h, t in parts])


def _is_correct(scores: list[float], label: int) -> bool:
    """A model that gives NaN or infinity knows nothing, and must not score 25% by the order of endings."""
    return math.isfinite(sum(scores)) and scores.index(max(scores)) == label


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.model_assessment.hellaswag",
        description="Measure a trained model on HellaSwag. Prints one JSON object as the last line.",
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run (folder or name) or a step_* folder")
    parser.add_argument(
        "--data",
        help="HellaSwag as .jsonl or .jsonl.gz, or 'held-out' for a stand-in from the validation text the model was "
        "trained beside (default: fetch HellaSwag from the Hugging Face hub)",
    )
    parser.add_argument(
        "--limit", type=int, help="take the first so many items (default: all; held-out: as in training)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; it must be at least 1")

    loaded, tokenizer = load_model(args.checkpoint, args.device), load_tokenizer()
    limit, validation_shard = args.limit, None
    if args.data == "held-out":
        validation_shard = _validation_shard(loaded)
        limit = limit or loaded.config.eval.hellaswag_items or 100  # 0 had turned it off while training
    protocol, items = choose_items(args.data or "auto", limit, validation_shard, tokenizer)
    print(f"{len(items)} items on {loaded.device}: {protocol}", file=sys.stderr)
    with loaded.autocast():
        result = evaluate(
            loaded.model, items, tokenizer.encode, protocol=protocol, on_progress=_progress_printer(len(items))
        )
    print(json.dumps({"checkpoint": str(loaded.path), "step": loaded.step, **asdict(result)}))
    return 0


def _validation_shard(loaded: LoadedModel) -> Path:
    """The held-out text of the dataset the model was trained on; raises UserError if another has its place now."""
    folder = dataset_dir(loaded.config.data.dir)
    manifest = read_manifest(folder)
    if manifest.sha256 != loaded.dataset_sha256:
        raise UserError(
            f"{folder} is not the dataset that {loaded.path} was trained on, so its validation text may have been "
            "trained on; put the dataset back, or give HellaSwag with --data FILE"
        )
    check_shard(folder, manifest.validation[0], loaded.config.model.n_vocab)
    return folder / manifest.validation[0].file


def _progress_printer(total: int, every_seconds: float = 10.0) -> Callable[[int], None]:
    last = time.monotonic()

    def print_progress(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            print(f"{done} of {total} items", file=sys.stderr)

    return print_progress


if __name__ == "__main__":
    exit_with(main)
