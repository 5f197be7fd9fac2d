"""HellaSwag: how often does the model find the right one of four endings the likeliest?

The task is Zellers et al. 2019, https://arxiv.org/abs/1905.07830; guessing gives 25%. Two protocols, whose numbers
cannot be compared with each other, are measured side by side (hellaswag_protocols.py has their texts):

reference   the raw `ctx`, then an ending after a single space; the choice is the ending whose tokens have the highest
            mean log-probability. What a run's own records hold.
lm-eval     lm-evaluation-harness's: `acc` chooses the ending of the highest log-probability, `acc_norm` that of the
            highest log-probability a character.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from src.data_processing.shards import check_shard, read_manifest
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.model import LLM
from src.model_assessment.held_out_items import held_out_items
from src.model_assessment.hellaswag_cache import cached_encode
from src.model_assessment.hellaswag_items import Item, fetch_items, load_items
from src.model_assessment.hellaswag_protocols import (
    HELD_OUT_PROTOCOL,
    HELLASWAG_PROTOCOL,
    LM_EVAL_PROTOCOL,
    lm_eval_choices,
    lm_eval_lacks,
    lm_eval_texts,
    reference_texts,
)
from src.model_assessment.multiple_choice import Question, score_endings
from src.model_utils.load_model import LoadedModel, load_model
from src.utils.errors import UserError, exit_with, now_and_then, say
from src.utils.root import dataset_dir

REFERENCE, LM_EVAL, BOTH = "reference", "lm-eval", "both"
Texts = Callable[[Item], tuple[str, list[str]]]
"""An item's context and endings, as a protocol asks."""


@dataclass(frozen=True)
class HellaSwagResult:
    """By the reference's protocol."""

    acc_norm: float
    """correct / total; the field's name for accuracy by length-normalized log-probability."""
    correct: int
    total: int
    stderr: float
    """Standard error of acc_norm as a binomial share: sqrt(p (1 - p) / total)."""
    protocol: str
    seconds: float
    """Wall time, with the encoding of what was not encoded before."""


@dataclass(frozen=True)
class LmEvalResult:
    """By lm-eval's protocol."""

    acc: float
    acc_stderr: float
    """As lm-eval has it, by the sample's variance: sqrt(p (1 - p) / (total - 1))."""
    acc_norm: float
    acc_norm_stderr: float
    total: int
    protocol: str
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What was asked for; None what was not, or could not be measured."""

    reference: HellaSwagResult | None
    lm_eval: LmEvalResult | None
    note: str = ""
    """Why lm-eval's protocol is left out, in words, where nobody asked for that."""


def choose_items(
    data: str, limit: int | None, validation_shard: Path | None, tokenizer: Tokenizer
) -> tuple[str, list[Item]]:
    """The text of the reference's protocol and the first `limit` items of `data`.

    "auto" fetches HellaSwag, "held-out" makes a stand-in from the documents of `validation_shard`, the same one
    every time, and anything else is a file. Raises UserError.
    """
    if data == "held-out":
        assert validation_shard is not None, "held-out items need held-out text"
        tokens = np.load(validation_shard, mmap_mode="r", allow_pickle=False)
        return HELD_OUT_PROTOCOL, held_out_items(tokens, tokenizer, limit or len(tokens), seed=0)
    return HELLASWAG_PROTOCOL, fetch_items(limit) if data == "auto" else load_items(Path(data), limit)


def measure(
    model: LLM,
    items: Sequence[Item],
    tokenizer: Tokenizer,
    *,
    protocol: str = HELLASWAG_PROTOCOL,
    asked: str | None = None,
    on_progress: Callable[[str, int], None] = lambda protocol, done: None,
) -> Measured:
    """The accuracies of `model` on `items`, by the protocols that are `asked`; None: by all that these items allow.

    `protocol` is the text that `choose_items` gave with the items. `on_progress` gets a protocol's text and the number
    of items done by it. Autocast is the caller's. Raises UserError where lm-eval's protocol is asked for and cannot be,
    and for a model of a smaller vocabulary than the tokenizer's.
    """
    if model.config.n_vocab < tokenizer.n_vocab:
        raise UserError(
            f"the model knows the tokens below {model.config.n_vocab}, and {tokenizer.name} has {tokenizer.n_vocab}; "
            "choose a model that was trained with this tokenizer"
        )
    lacks = check_protocol(items, protocol, asked)
    reference, lm_eval = None, None
    if asked != LM_EVAL:
        encode = encoder(items, reference_texts, tokenizer, REFERENCE)
        progress = partial(on_progress, protocol)
        reference = evaluate(model, items, encode, protocol=protocol, on_progress=progress)
    if asked != REFERENCE and not lacks:
        encode = encoder(items, lm_eval_texts, tokenizer, LM_EVAL)
        lm_eval = evaluate_lm_eval(model, items, encode, on_progress=partial(on_progress, LM_EVAL_PROTOCOL))
    note = f"without lm-eval's protocol: {lacks}" if lacks and asked is None and protocol != HELD_OUT_PROTOCOL else ""
    return Measured(reference, lm_eval, note)


def check_protocol(items: Sequence[Item], protocol: str, asked: str | None) -> str:
    """Why lm-eval's protocol cannot be asked of `items`, empty where it can; raises UserError if it is `asked`."""
    lacks = lm_eval_lacks(items) if protocol != HELD_OUT_PROTOCOL else "these items are not HellaSwag"
    if lacks and asked in (LM_EVAL, BOTH):
        raise UserError(
            f"lm-eval's protocol is for HellaSwag in its original format: {lacks}; use --protocol reference"
        )
    return lacks


def evaluate(
    model: LLM,
    items: Sequence[Item],
    encode: Callable[[str], list[int]],
    *,
    protocol: str,
    sum_over_ranks: Callable[[Sequence[float]], Sequence[float]] = list,
    **scoring: Any,
) -> HellaSwagResult:
    """The accuracy of `model` on `items` by the reference's protocol; the processes share the items out between them.

    `protocol` says what the items are; `sum_over_ranks` adds up each value over all processes. The result is
    the same for any number of them. `scoring`: the options of `score_endings`.
    """
    started = time.perf_counter()
    scores = score_endings(model, questions(items, reference_texts, encode), **scoring)
    means = {i: [log_prob / tokens for log_prob, tokens in found] for i, found in scores.items()}
    (correct,) = _count_right(items, [means], sum_over_ranks)
    share = correct / len(items)
    stderr = math.sqrt(share * (1 - share) / len(items))
    return HellaSwagResult(share, correct, len(items), stderr, protocol, time.perf_counter() - started)


def evaluate_lm_eval(
    model: LLM,
    items: Sequence[Item],
    encode: Callable[[str], list[int]],
    *,
    sum_over_ranks: Callable[[Sequence[float]], Sequence[float]] = list,
    **scoring: Any,
) -> LmEvalResult:
    """The accuracies by lm-eval's protocol, on items of which `lm_eval_lacks` nothing; otherwise as `evaluate`."""
    started = time.perf_counter()
    scores = score_endings(model, questions(items, lm_eval_texts, encode), **scoring)
    sums = {i: [log_prob for log_prob, _ in found] for i, found in scores.items()}
    a_character = {
        i: [value / len(choice) for value, choice in zip(found, lm_eval_choices(items[i]), strict=True)]
        for i, found in sums.items()
    }
    shares = [right / len(items) for right in _count_right(items, [sums, a_character], sum_over_ranks)]
    acc, acc_norm = ((share, math.sqrt(share * (1 - share) / max(1, len(items) - 1))) for share in shares)
    return LmEvalResult(*acc, *acc_norm, len(items), LM_EVAL_PROTOCOL, time.perf_counter() - started)


def questions(items: Sequence[Item], texts: Texts, encode: Callable[[str], list[int]]) -> list[Question]:
    """The items as token ids, context and endings encoded one by one."""
    asked = map(texts, items)
    return [Question(encode(context), [encode(ending) for ending in endings]) for context, endings in asked]


def encoder(items: Sequence[Item], texts: Texts, tokenizer: Tokenizer, name: str) -> Callable[[str], list[int]]:
    """`tokenizer.encode` that has the items' texts at hand; `name` is the protocol's, for the file that keeps them."""
    return cached_encode([text for c, endings in map(texts, items) for text in (c, *endings)], tokenizer, name)


def items_done(total: int) -> Callable[[str, int], None]:
    """For `on_progress`: says now and then how many of all items are done."""
    progress = now_and_then()
    return lambda protocol, done: progress(f"{protocol.partition(' ')[0]}: {done:,} of {total:,} items")


def _count_right(
    items: Sequence[Item],
    rules: Sequence[dict[int, list[float]]],
    sum_over_ranks: Callable[[Sequence[float]], Sequence[float]],
) -> list[int]:
    """By each rule's values of the endings of this process's items, how many of all items the processes get right."""
    assert items, "an accuracy needs items"
    right = [sum(_is_right(values, items[i].label) for i, values in rule.items()) for rule in rules]
    total, *correct = (int(value) for value in sum_over_ranks([len(rules[0]), *right]))
    assert total == len(items), f"{total} items were scored of {len(items)}"
    return correct


def _is_right(values: list[float], label: int) -> bool:
    """A model that gives NaN or infinity knows nothing, and must not score 25% by the order of endings."""
    return math.isfinite(sum(values)) and values.index(max(values)) == label


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.model_assessment.hellaswag",
        description="Measure a trained model on HellaSwag. Prints one JSON object as the last line: the figures of the "
        "reference's protocol, and as lm_eval those of lm-evaluation-harness's.",
    )
    parser.add_argument("--checkpoint", required=True, help="a run (folder or name), a step_* folder or an export")
    parser.add_argument(
        "--data",
        help="HellaSwag as .jsonl or .jsonl.gz, or 'held-out' for a stand-in from the validation text the model was "
        "trained beside (default: fetch HellaSwag from the Hugging Face hub)",
    )
    parser.add_argument(
        "--limit", type=int, help="take the first so many items (default: all; held-out: as in training)"
    )
    parser.add_argument(
        "--protocol",
        choices=(REFERENCE, LM_EVAL, BOTH),
        help="reference: raw ctx, mean log-probability a token; lm-eval: lm-evaluation-harness's texts, acc and "
        "acc_norm (default: both, or reference alone where the items lack what lm-eval asks by)",
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
    say(f"{len(items):,} items on {loaded.device}")
    with loaded.autocast():
        measured = measure(
            loaded.model,
            items,
            tokenizer,
            protocol=protocol,
            asked=args.protocol,
            on_progress=items_done(len(items)),
        )
    if measured.note:
        say(f"note: {measured.note}")
    reference = asdict(measured.reference) if measured.reference else {}
    lm_eval = {"lm_eval": asdict(measured.lm_eval)} if measured.lm_eval else {}
    print(json.dumps({"checkpoint": str(loaded.path), "step": loaded.step, **reference, **lm_eval}))
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


if __name__ == "__main__":
    exit_with(main)
