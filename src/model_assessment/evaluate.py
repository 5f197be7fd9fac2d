"""Evaluate one or several models on the same text and questions: a table for people, and JSON.

The difference between two models' losses has a separate standard error. It is paired: both models are measured on the
same windows of text, so that a window that is hard for both does not count.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.data_processing.shards import Manifest, check_shard, read_manifest
from src.data_processing.tokenizer import load_tokenizer
from src.data_processing.training_data_loader import WindowDataset
from src.model_assessment import hellaswag
from src.model_assessment.validation import standard_error, validate
from src.model_configs.arguments import Parser, whole
from src.model_utils.debugging import count_parameters
from src.model_utils.load_model import WEIGHT_DTYPES, LoadedModel, load_model
from src.params import MAX_COUNT
from src.utils.errors import UserError, exit_with, now_and_then, print_result, say
from src.utils.hardware import choose_device, describe_machine
from src.utils.root import dataset_dir

BATCH_TOKENS = 2_048  # per validation batch
HELD_OUT_ITEMS = 500  # default for the stand-in, which can make any number of items
# Multiple choice: the protocol, its figure, and that figure's standard error.
CHOICE_FIGURES = (
    ("reference", "acc_norm", "stderr"),
    ("lm_eval", "acc", "acc_stderr"),
    ("lm_eval", "acc_norm", "acc_norm_stderr"),
)


def evaluate(
    loaded: LoadedModel, weights: str, folder: Path, manifest: Manifest, val_tokens: int, choice: dict[str, Any] | None
) -> dict[str, Any]:
    """The figures of a model on the first `val_tokens` of the held-out text in `folder`, and on multiple choice.

    `weights`: the dtype in which the weights were loaded. `choice`: the options of `hellaswag.measure`. Raises
    UserError if the text does not suit the model.
    """
    config, held_out, model = loaded.config.model, manifest.validation[0], loaded.model
    windows = WindowDataset(folder, manifest.validation, config.n_ctx, config.n_vocab, at_least=1)
    n_windows = min(max(1, val_tokens // config.n_ctx), windows.n_windows)
    batch_size = max(1, BATCH_TOKENS // config.n_ctx)
    losses: list[float] = []
    progress = now_and_then()
    with loaded.autocast():
        result = validate(
            model,
            windows,
            n_windows=n_windows,
            batch_size=batch_size,
            bytes_per_token=held_out.text_bytes / held_out.tokens,
            window_losses=losses,
            between_batches=lambda done: progress(f"validation: {done:,} of {n_windows:,} sequences"),
        )
        answers = hellaswag.measure(model, **choice) if choice else {}
    return {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "weights": weights,
        "matmuls": str(loaded.precision).removeprefix("torch."),
        "n_ctx": config.n_ctx,
        "parameters": count_parameters(model),
        "validation": asdict(result),
        "multiple_choice": answers,
        "window_losses": losses,
    }


def less(result: dict[str, Any], first: dict[str, Any]) -> dict[str, Any] | None:
    """The loss in `result` minus that in `first`, nats per token, with its standard error over pairs of windows.

    None for the first itself and for models whose contexts, and so windows, differ. A single window has no error.
    """
    if result is first or result["n_ctx"] != first["n_ctx"]:
        return None
    changes = [a - b for a, b in zip(result["window_losses"], first["window_losses"], strict=True)]
    difference = result["validation"]["loss"] - first["validation"]["loss"]
    return {"difference": difference, "stderr": standard_error(changes)}


def text_for(checkpoints: Sequence[str], data: str | None) -> tuple[Path, Manifest]:
    """The dataset `data`, or else the first model's. Raises UserError if it does not suit every model."""
    models = [(m.path, m.config, m.dataset_sha256) for m in (load_model(name, "cpu") for name in checkpoints)]
    path, config, trained_on = models[0]
    if data is None and not trained_on:
        raise UserError(f"The dataset of {path} is not recorded. Name one to measure on with --data.")
    folder = dataset_dir(data or config.data.dir)
    manifest = read_manifest(folder)
    for path, config, trained_on in models:
        if manifest.n_vocab > config.model.n_vocab:
            raise UserError(
                f"Cannot measure {path} on {folder}: its tokenizer ({manifest.tokenizer}) has {manifest.n_vocab} ids, "
                f"the model {config.model.n_vocab}. Use --data to name a dataset with the model's tokenizer."
            )
        if trained_on != manifest.sha256:
            known = "was trained on another dataset than" if trained_on else "does not record its dataset;"
            say(f"note: {path} {known} {folder}, and may have seen its text")
    return folder, manifest


def table(results: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown tables, one row per model."""
    figures, choices = [], []
    for result in results:
        path, values, change = Path(result["checkpoint"]), result["validation"], result["loss_less_first"]
        computed = " (computed in bf16)" if (result["weights"], result["matmuls"]) == ("float32", "bfloat16") else ""
        model = {
            "model": path.parent.parent.name if path.parent.name == "checkpoints" else path.name,  # or an export's
            "step": f"{result['step']:,}",
            "weights": result["weights"] + computed,
        }
        losses = {
            "parameters": f"{result['parameters']:,}",
            "loss": with_error(values["loss"], values["stderr"], ".4f"),
            "perplexity": f"{values['perplexity']:.2f}",
            "bits per byte": f"{values['bits_per_byte']:.4f}",
            "loss minus the first": "" if result is results[0] else f"context is {result['n_ctx']:,}",
        }
        if change:
            losses["loss minus the first"] = with_error(change["difference"], change["stderr"], "+.4f")
        figures.append(model | losses)
        for key, share, stderr in CHOICE_FIGURES:
            if choice := result["multiple_choice"].get(key):
                model.setdefault("items", f"{choice['total']:,}")
                column = f"{choice['protocol'].split(' ')[0]} {share}"
                model[column] = with_error(choice[share], choice[stderr], ".2%")
        choices.append(model)
    tables = [markdown(figures)]
    if protocols := [choice["protocol"] for choice in results[0]["multiple_choice"].values()]:
        tables += [markdown(choices), "\n".join(": ".join(text.split(" ", 1)) for text in protocols)]
    return "\n\n".join(tables)


def with_error(value: float, stderr: float | None, form: str) -> str:
    """Format both with `form`; the error, if known, without a sign."""
    return f"{value:{form}}" + ("" if stderr is None else f" ± {stderr:{form.removeprefix('+')}}")


def markdown(rows: list[dict[str, str]]) -> str:
    """Return `rows` as a Markdown table whose columns line up as plain text too."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    rule = {name: "-" * width for name, width in widths.items()}
    lines = (
        " | ".join(row[name].ljust(widths[name]) for name in widths) for row in ({n: n for n in widths}, rule, *rows)
    )
    return "\n".join(f"| {line} |" for line in lines)


def main() -> int:
    args = _parser().parse_args()
    if not 1 <= args.val_tokens <= MAX_COUNT:
        raise UserError(f"Cannot measure {args.val_tokens} tokens. Set --val-tokens to between 1 and {MAX_COUNT:,}.")
    if args.limit is not None and args.hellaswag == "none":
        raise UserError("Cannot use --limit without multiple choice. Add --hellaswag, or set --val-tokens.")
    folder, manifest = text_for(args.checkpoint, args.data)
    choice = None
    if args.hellaswag != "none":
        tokenizer, held_out = load_tokenizer(), manifest.validation[0]
        check_shard(folder, held_out, tokenizer.n_vocab)
        limit = HELD_OUT_ITEMS if args.limit is None and args.hellaswag == "held-out" else args.limit
        protocol, items = hellaswag.choose_items(args.hellaswag, limit, folder / held_out.file, tokenizer)
        choice = {"items": items, "tokenizer": tokenizer, "protocol": protocol}
    results: list[dict[str, Any]] = []
    for checkpoint in args.checkpoint:
        for weights in args.weights:
            loaded = load_model(checkpoint, args.device, weights)
            say(f"measuring {loaded.path}, weights {weights}, on {loaded.device}")
            results.append(evaluate(loaded, weights, folder, manifest, args.val_tokens, choice))
            del loaded  # frees its memory before the next one is loaded
    for result in results:
        result["loss_less_first"] = less(result, results[0])
    print(table(results))
    for result in results:
        del result["window_losses"]
    machine = describe_machine(choose_device(args.device))
    print_result({"dataset": str(folder), "manifest_sha256": manifest.sha256, "results": results, "machine": machine})
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m src.model_assessment.evaluate",
        description="Measure one or several trained models on the same held-out text and multiple-choice items. Prints "
        "a table, then one JSON object as the last line (not on a terminal).",
    )
    add = parser.add_argument
    checkpoint = "runs (folders or names), step_* folders or exports; the others are compared with the first"
    add("--checkpoint", required=True, nargs="+", action="extend", metavar="CHECKPOINT", help=checkpoint)
    add("--data", help="a dataset's name or folder (default: the first model's dataset)")
    add("--val-tokens", type=whole, default=2_097_152, help="maximum held-out tokens (default: 2,097,152)")
    items = "HellaSwag as .jsonl or .jsonl.gz; auto fetches it; held-out: a stand-in from the held-out text"
    add("--hellaswag", default="none", metavar="{FILE,auto,held-out,none}", help=f"{items} (default: none)")
    add("--limit", type=whole, help=f"use the first N items (default: all; held-out: {HELD_OUT_ITEMS})")
    weights = "dtypes of the weights, measured one after the other (default: float32; matmuls as in training)"
    add("--weights", nargs="+", default=["float32"], choices=WEIGHT_DTYPES[1:], help=weights)
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser


if __name__ == "__main__":
    exit_with(main)
