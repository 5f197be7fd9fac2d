"""HellaSwag: the share of items for which the model finds the right ending, of four, the likeliest.

The task is Zellers et al. 2019, https://arxiv.org/abs/1905.07830; guessing gives 25%. There are two protocols. Their
figures cannot be compared with each other:

reference   The raw `ctx`, then an ending after a single space. The choice is the ending whose tokens have the highest
            mean log-probability. Runs record this one.
lm-eval     The task `hellaswag` of lm-evaluation-harness 0.4.13, which most published figures come from
            (https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks/hellaswag). `acc` chooses the
            ending with the highest log-probability, `acc_norm` with the highest log-probability per character.

Shapes: B rows of a batch, T positions, D width, V vocabulary, N scored tokens of a batch.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.lm_loss import linear_losses
from src.model import LLM
from src.model_assessment.hellaswag_items import Item, fetch_items, held_out_items, load_items
from src.model_configs.arguments import Parser, whole
from src.model_utils.load_model import load_model
from src.params import MAX_COUNT
from src.utils.errors import UserError, exit_with, now_and_then, print_result, say
from src.utils.handle_ddp import ALONE, Processes
from src.utils.hardware import attention_for_any_shape

# Recorded with every result, so that nobody takes the last one for the first.
HELLASWAG_PROTOCOL = (
    "hellaswag-ctx-mean-logprob (HellaSwag: raw ctx, ending of the highest mean log-probability a token)"
)
LM_EVAL_PROTOCOL = (
    "hellaswag-lm-eval (HellaSwag as lm-evaluation-harness asks it, without examples: activity and cleaned texts; acc: "
    "ending of the highest log-probability, acc_norm: of the highest log-probability a character)"
)
HELD_OUT_PROTOCOL = "held-out-ctx-mean-logprob (not HellaSwag: a stand-in from held-out text, scored the same way)"

# Tokens in a batch, and positions whose logits exist at once. On a CPU small numbers stay in the caches: with 512
# positions the head of width 256 takes 2.7 times as long.
CPU_SIZES = (1_024, 128)
GPU_SIZES = (32_768, 4_096)

Encode = Callable[[str], list[int]]
Texts = tuple[str, list[str]]
"""A context and its endings."""
Question = tuple[list[int], list[list[int]]]
"""The same as token ids, at least one in each."""


def choose_items(
    data: str, limit: int | None, validation_shard: Path | None, tokenizer: Tokenizer
) -> tuple[str, list[Item]]:
    """The text of the reference's protocol and the first `limit` items of `data`.

    "auto" fetches HellaSwag. "held-out" makes a stand-in from the documents of `validation_shard`, always the same.
    Anything else is a file. Raises UserError.
    """
    if limit is not None and not 1 <= limit <= MAX_COUNT:
        raise UserError(f"Cannot use {limit} items. Set --limit to between 1 and {MAX_COUNT:,}.")
    if data == "held-out":
        assert validation_shard is not None, "held-out items need held-out text"
        tokens = np.load(validation_shard, mmap_mode="r", allow_pickle=False)
        return HELD_OUT_PROTOCOL, held_out_items(tokens, tokenizer, limit or len(tokens), seed=0)
    return HELLASWAG_PROTOCOL, (fetch_items(limit) if data == "auto" else load_items(Path(data), limit))


def measure(model: LLM, items: Sequence[Item], tokenizer: Tokenizer, protocol: str) -> dict[str, dict[str, Any]]:
    """The results as "reference" and, if the items have all of HellaSwag's fields, "lm_eval".

    `protocol` comes from `choose_items`. The caller sets autocast. Raises UserError if the model has fewer tokens.
    """
    if model.config.n_vocab < tokenizer.n_vocab:
        raise UserError(f"Cannot score text of {tokenizer.name}: the model has fewer tokens. Choose another model.")
    say_progress = now_and_then()
    options = {"between_batches": lambda done, total: say_progress(f"multiple choice: {done:,} of {total:,} endings")}
    results = {"reference": evaluate(model, items, tokenizer.encode, protocol, **options)}
    if not any(None in (item.activity_label, item.ctx_a, item.ctx_b) for item in items):
        results["lm_eval"] = evaluate_lm_eval(model, items, tokenizer.encode, **options)
    elif protocol == HELLASWAG_PROTOCOL:
        say("note: without lm-eval's protocol, because items lack activity_label, ctx_a or ctx_b")
    return results


def evaluate(model: LLM, items: Sequence[Item], encode: Encode, protocol: str, **scoring: Any) -> dict[str, Any]:
    """The accuracy on `items` by the reference's protocol, equal in every process.

    `acc_norm` is the field's name for accuracy by length-normalized log-probability, `stderr` its binomial standard
    error. `protocol` says where the items come from; `scoring` has the options of `score_endings`.
    """
    started = time.perf_counter()
    tokenized = questions(items, reference_texts, encode)
    means = [
        [log_prob / min(len(ending), model.config.n_ctx) for log_prob, ending in zip(log_probs, endings, strict=True)]
        for log_probs, (_, endings) in zip(score_endings(model, tokenized, **scoring), tokenized, strict=True)
    ]
    correct, total = _count_right(items, means), len(items)
    share = correct / total
    figures = {"acc_norm": share, "correct": correct, "total": total, "stderr": math.sqrt(share * (1 - share) / total)}
    return {**figures, "protocol": protocol, "seconds": time.perf_counter() - started}


def evaluate_lm_eval(model: LLM, items: Sequence[Item], encode: Encode, **scoring: Any) -> dict[str, Any]:
    """`acc` and `acc_norm` by lm-eval's protocol, for items with all fields. Arguments as for `evaluate`.

    As in lm-eval, standard errors come from the sample variance: sqrt(p (1 - p) / (total - 1)).
    """
    started = time.perf_counter()
    sums = score_endings(model, questions(items, lm_eval_texts, encode), **scoring)
    per_character = [
        [log_prob / max(1, len(ending)) for log_prob, ending in zip(log_probs, lm_eval_endings(item), strict=True)]
        for log_probs, item in zip(sums, items, strict=True)
    ]
    result: dict[str, Any] = {}
    for name, values in (("acc", sums), ("acc_norm", per_character)):
        result[name] = share = _count_right(items, values) / len(items)
        result[f"{name}_stderr"] = math.sqrt(share * (1 - share) / max(1, len(items) - 1))
    return {**result, "total": len(items), "protocol": LM_EVAL_PROTOCOL, "seconds": time.perf_counter() - started}


def reference_texts(item: Item) -> Texts:
    """The raw context, and each ending after a single space."""
    return item.ctx, [" " + ending for ending in item.endings]


def lm_eval_texts(item: Item) -> Texts:
    """The activity and the cleaned context, and the cleaned endings.

    lm-eval encodes context and ending together and splits the ids at the length of the context's own. Moving whitespace
    from the context's end to the endings gives the same ids: after other text it always begins a piece of r50k_base.
    """
    assert item.ctx_b is not None
    query = _clean(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
    context = query.rstrip()
    return context, [f"{query[len(context) :]} {ending}" for ending in lm_eval_endings(item)]


def lm_eval_endings(item: Item) -> list[str]:
    """The cleaned endings, whose characters acc_norm counts."""
    return [_clean(ending) for ending in item.endings]


def _clean(text: str) -> str:
    """`text` without WikiHow's markup: [title], [step] and the like."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _count_right(items: Sequence[Item], values: list[list[float]]) -> int:
    # A model that returns NaN or infinity should score 0, not 25% by the order of endings.
    return sum(
        math.isfinite(sum(endings)) and endings.index(max(endings)) == item.label
        for item, endings in zip(items, values, strict=True)
    )


def questions(items: Sequence[Item], texts: Callable[[Item], Texts], encode: Encode) -> list[Question]:
    """The items' `texts` by one protocol as token ids, each text encoded separately."""
    return [(encode(context), [encode(ending) for ending in endings]) for context, endings in map(texts, items)]


@torch.no_grad()
def score_endings(
    model: LLM,
    questions: Sequence[Question],
    *,
    procs: Processes = ALONE,
    between_batches: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[float]]:
    """The log-probability of each ending of each question, summed over its tokens, in nats; equal in every process.

    If context and ending exceed the model's context, their beginning is cut. `between_batches` gets the number of
    endings done and the total. Every process calls it equally often, and it may raise to give up. The model must be in
    eval mode; the caller sets autocast.
    """
    n_ctx = model.config.n_ctx
    batch_tokens, logit_positions = CPU_SIZES if model.embedding.weight.device.type == "cpu" else GPU_SIZES
    rows = [([*context, *ending][-n_ctx - 1 :], len(ending)) for context, endings in questions for ending in endings]
    # All processes form the same batches and divide them, because rounding depends on the rows in a batch.
    batches = _batches([len(tokens) - 1 for tokens, _ in rows], batch_tokens)
    log_probs, done = [0.0] * len(rows), 0
    for first in range(0, len(batches), procs.world_size):
        between_batches(done, len(rows))
        dealt = batches[first : first + procs.world_size]
        for batch in dealt[procs.rank : procs.rank + 1]:
            for i, log_prob in zip(batch, _score(model, [rows[i] for i in batch], logit_positions), strict=True):
                log_probs[i] = log_prob
        done += sum(map(len, dealt))
    sums = iter(procs.sum(log_probs))  # exact: an ending is 0 in all processes but one
    return [[next(sums) for _ in endings] for _, endings in questions]


def _batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Row indices by batch. The longest come first, so that a batch that does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, first = [], 0
    while first < len(order):
        batches.append(order[first : first + max(1, batch_tokens // lengths[order[first]])])
        first += len(batches[-1])
    return batches


def _score(model: LLM, rows: Sequence[tuple[list[int], int]], logit_positions: int) -> list[float]:
    """The log-probability of each row's ending. A row is its tokens and the length of its ending."""
    device = model.embedding.weight.device
    # Padded on the right: attention is causal, so that no scored position sees the padding.
    tokens_BT = pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True)
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    ends_B1 = torch.tensor([[len(tokens) - 1] for tokens, _ in rows])
    starts_B1 = (ends_B1 - torch.tensor([[length] for _, length in rows])).clamp(min=0)
    position_T = torch.arange(inputs_BT.shape[1])
    scored_BT = (starts_B1 <= position_T) & (position_T < ends_B1)

    with attention_for_any_shape():
        hidden_BTD = model.hidden(inputs_BT.to(device))
    hidden_ND = hidden_BTD[scored_BT.to(device)]  # before the head, by far the largest matmul of a small model
    losses_N = linear_losses(hidden_ND, model.embedding.weight, targets_BT[scored_BT].to(device), logit_positions)
    log_probs_N = -losses_N.cpu().double()
    return [part.sum().item() for part in log_probs_N.split((ends_B1 - starts_B1).flatten().tolist())]


def main() -> int:
    parser = Parser(
        prog="python -m src.model_assessment.hellaswag",
        description="Measure a trained model on HellaSwag. Prints one JSON object as the last line (not on a "
        "terminal): the figures of the reference's protocol and, if the items have the fields it needs, those of "
        "lm-evaluation-harness as lm_eval.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run (folder or name), a step_* folder or an export")
    add("--data", default="auto", help="HellaSwag as .jsonl or .jsonl.gz (default: fetch it from the hub)")
    add("--limit", type=whole, help="use the first N items (default: all)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    if args.data == "held-out":
        raise UserError("Cannot make held-out items here. Use src.model_assessment.evaluate --hellaswag held-out.")
    loaded, tokenizer = load_model(args.checkpoint, args.device), load_tokenizer()
    protocol, items = choose_items(args.data, args.limit, None, tokenizer)
    say(f"{len(items):,} items on {loaded.device}")
    with loaded.autocast():
        results = measure(loaded.model, items, tokenizer, protocol)
    reference, lm_eval = results["reference"], results.get("lm_eval")
    text = f"{loaded.path}, {reference['total']:,} items\nreference's protocol: acc_norm "
    text += f"{reference['acc_norm']:.2%} +- {reference['stderr']:.2%}"
    if lm_eval:
        text += f"\nlm-evaluation-harness's: acc {lm_eval['acc']:.2%} +- {lm_eval['acc_stderr']:.2%}, acc_norm "
        text += f"{lm_eval['acc_norm']:.2%} +- {lm_eval['acc_norm_stderr']:.2%}"
    results.pop("reference")
    print_result({"checkpoint": str(loaded.path), "step": loaded.step, **reference, **results}, text)
    return 0


if __name__ == "__main__":
    exit_with(main)
