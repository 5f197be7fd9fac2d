"""Compare our implementation of HellaSwag, by the reference's protocol, with the reference's.

python -m benchmarks.hellaswag PRESET --data FILE [--checkpoint DIR] [--items 100 --rounds 5]

The reference takes one item at a time. It pads the four rows to the longest, computes float32 logits of every position,
then their cross-entropy and a masked mean. Both implementations score the same items, spaced evenly over the file, with
the same token ids and precision. They take turns. Each figure is the median over the rounds, without the first. The
weights come from `--checkpoint` or are random.

The benchmark fails if the scores differ by more than rounding. `other_choices` counts the items with different choices.
`largest_gap` is the largest difference between the reference's scores of two such choices. It is tiny for ties.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import print_figures
from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment.hellaswag import Question, questions, reference_texts, score_endings
from src.model_assessment.hellaswag_items import load_items
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.load_model import load_model
from src.model_utils.weight_init import init_weights
from src.utils import hardware
from src.utils.errors import UserError, exit_with

Scores = list[list[float]]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # nats per token


def main() -> None:
    parser = Parser(
        prog="python -m benchmarks.hellaswag", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", required=True, type=Path, help="HellaSwag as .jsonl or .jsonl.gz")
    parser.add_argument(
        "--checkpoint", help="a run, a step_* folder or an export, in place of the preset's random model"
    )
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto")
    args = parser.parse_args()
    if min(args.items, args.rounds) < 1:
        raise UserError(f"Cannot measure: --items is {args.items} and --rounds {args.rounds}. Set both to at least 1.")
    device = hardware.choose_device("auto")
    precision = hardware.choose_precision(args.precision, device)
    items = load_items(args.data)
    items = items[:: max(1, len(items) // args.items)][: args.items]
    model = (load_model(args.checkpoint).model if args.checkpoint else random_model(args.preset)).to(device).eval()
    tokenized = questions(items, reference_texts, load_tokenizer().encode)
    with hardware.autocast(device, precision), torch.no_grad():
        seconds, scores = take_turns({"ours": ours, "reference": reference}, model, tokenized, args.rounds)
    differences = [abs(a - b) for pair in zip(*scores.values(), strict=True) for a, b in zip(*pair, strict=True)]
    if max(differences) > TOLERANCE[precision]:
        raise SystemExit(f"Cannot compare: scores differ by {max(differences):.2g} nats per token")
    gaps = [max(theirs) - theirs[choice(own)] for own, theirs in zip(*scores.values(), strict=True)]
    positive = [gap for gap in gaps if gap > 0]
    print_figures(
        {
            "preset": args.preset,
            "weights": args.checkpoint or "random",
            "precision": str(precision).removeprefix("torch."),
            "items": len(items),
            "rounds": args.rounds,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "times_as_fast": round(seconds["reference"] / seconds["ours"], 2),
            "other_choices": len(positive),
            "largest_gap": max(positive, default=0.0),
            "largest_score_difference": max(differences),
            "machine": hardware.describe_machine(device),
        }
    )


def take_turns(
    variants: dict[str, Callable[[LLM, Sequence[Question]], Scores]],
    model: LLM,
    tokenized: Sequence[Question],
    rounds: int,
) -> tuple[dict[str, float], dict[str, Scores]]:
    """Return each variant's median seconds for all questions, and its scores."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    scores: dict[str, Scores] = {}
    for _ in range(1 + rounds):
        for name, variant in variants.items():
            started = time.perf_counter()
            scores[name] = variant(model, tokenized)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}, scores


def ours(model: LLM, tokenized: Sequence[Question]) -> Scores:
    return [
        [log_prob / min(len(ending), model.config.n_ctx) for log_prob, ending in zip(log_probs, endings, strict=True)]
        for log_probs, (_, endings) in zip(score_endings(model, tokenized), tokenized, strict=True)
    ]


def reference(model: LLM, tokenized: Sequence[Question]) -> Scores:
    return [reference_scores(model, question) for question in tokenized]


def reference_scores(model: LLM, question: Question) -> list[float]:
    """Score an item as the reference does: four whole rows, without the last position's prediction."""
    context, endings = question
    rows = [[*context, *ending] for ending in endings]
    n_ctx = model.config.n_ctx
    tokens_BT = torch.zeros(len(rows), min(n_ctx + 1, max(map(len, rows))), dtype=torch.int64)
    scored_BT = torch.zeros_like(tokens_BT)
    for b, (row, ending) in enumerate(zip(rows, endings, strict=True)):
        row = row[-n_ctx - 1 :]
        tokens_BT[b, : len(row)] = torch.tensor(row)
        scored_BT[b, max(1, len(row) - len(ending)) : len(row)] = 1
    tokens_BT, scored_BT = (x.to(model.embedding.weight.device) for x in (tokens_BT, scored_BT))
    logits_BTV = model(tokens_BT[:, :n_ctx]).float()[:, : tokens_BT.shape[1] - 1]
    losses_N = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")
    losses_BT = losses_N.view(len(rows), -1) * scored_BT[:, 1:]
    return (-losses_BT.sum(dim=1) / scored_BT.sum(dim=1)).tolist()


def choice(scores: list[float]) -> int:
    return scores.index(max(scores))


def random_model(preset: str) -> LLM:
    config = PRESETS[preset]()
    model = LLM(config.model)
    init_weights(model, config.model, config.train.seed)
    return model


if __name__ == "__main__":
    exit_with(main)
