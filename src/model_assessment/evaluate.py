"""One or several models on the same text and questions: a table for people, and JSON.

Validation loss and bits a byte on the held-out text of a dataset, and multiple choice by the protocols that
src/model_assessment/hellaswag.py describes. Where several models are compared, the difference to the first one's loss
has a standard error of its own: they are measured on the same batches, so what makes a batch hard for all of them does
not count.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.data_processing.shards import MANIFEST, Manifest, check_shard, read_manifest
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.data_processing.training_data_loader import WindowDataset
from src.model_assessment import hellaswag
from src.model_assessment.validation import validate
from src.model_utils.debugging import count_parameters
from src.model_utils.load_model import WEIGHT_DTYPES, LoadedModel, convert_weights, load_model
from src.utils.errors import UserError, exit_with, now_and_then, say
from src.utils.hardware import autocast, choose_device, describe_machine
from src.utils.root import dataset_dir

BATCH_TOKENS = 2_048  # of a validation batch, the same for all models: only then are their batches pairs


@dataclass(frozen=True)
class Evaluated:
    """What was measured of one model."""

    checkpoint: str
    step: int
    weights: str
    """What they are kept in: float32 or bf16."""
    matmuls: str
    """What they are computed in."""
    n_ctx: int
    parameters: int
    validation: dict[str, Any]
    """As validation.ValidationResult."""
    multiple_choice: dict[str, Any]
    """`reference` and `lm_eval`, as hellaswag.Measured; empty where none was asked for."""
    batch_losses: list[float]

    def less(self, first: "Evaluated") -> tuple[float, float | None] | None:
        """This model's loss less that of the first, in nats a token, and its standard error, from pairs of batches.

        None where the two did not see the same batches, because their contexts differ; no error from one batch.
        """
        if self.n_ctx != first.n_ctx:
            return None
        changes = [mine - theirs for mine, theirs in zip(self.batch_losses, first.batch_losses, strict=True)]
        stderr = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
        return self.validation["loss"] - first.validation["loss"], stderr


def evaluate(
    loaded: LoadedModel, weights: str, folder: Path, manifest: Manifest, val_tokens: int, questions: "Questions | None"
) -> Evaluated:
    """Measures a model on the first `val_tokens` of the held-out text in `folder`, and on the questions.

    `weights` says how the model is to keep its weights, which it then does for good. Raises UserError where the text
    cannot serve this model.
    """
    config, held_out = loaded.config.model, manifest.validation[0]
    parameters = count_parameters(loaded.model)
    precision = convert_weights(loaded.model, weights, loaded.precision)
    windows = WindowDataset(folder, manifest.validation, config.n_ctx, config.n_vocab, at_least=1)
    n_windows = min(max(1, val_tokens // config.n_ctx), windows.n_windows)
    batch_size = max(1, BATCH_TOKENS // config.n_ctx)
    losses: list[float] = []
    progress = now_and_then()
    with autocast(loaded.device, precision):
        result = validate(
            loaded.model,
            windows,
            n_windows=n_windows,
            batch_size=batch_size,
            bytes_per_token=held_out.text_bytes / held_out.tokens,
            batch_losses=losses,
            between_batches=lambda: progress(f"validation: {len(losses) * batch_size:,} of {n_windows:,} sequences"),
        )
        choice = questions.ask(loaded) if questions else {}
    return Evaluated(
        checkpoint=str(loaded.path),
        step=loaded.step,
        weights=weights,
        matmuls=str(precision).removeprefix("torch."),
        n_ctx=config.n_ctx,
        parameters=parameters,
        validation=asdict(result),
        multiple_choice=choice,
        batch_losses=losses,
    )


@dataclass(frozen=True)
class Questions:
    """Multiple-choice items, chosen once for all models."""

    protocol: str
    items: Sequence[hellaswag.Item]
    tokenizer: Tokenizer
    asked: str | None

    def ask(self, loaded: LoadedModel) -> dict[str, Any]:
        measured = hellaswag.measure(
            loaded.model,
            self.items,
            self.tokenizer,
            protocol=self.protocol,
            asked=self.asked,
            on_progress=hellaswag.items_done(len(self.items)),
        )
        if measured.note:
            say(f"note: {measured.note}")
        found = {"reference": measured.reference, "lm_eval": measured.lm_eval}
        return {name: asdict(result) for name, result in found.items() if result}


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    for name, value in (("--val-tokens", args.val_tokens), ("--limit", args.limit)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if args.hellaswag == "none" and (args.limit or args.protocol):
        raise UserError("--limit and --protocol are about multiple choice; name its items with --hellaswag")
    tokenizer = load_tokenizer()
    folder, manifest = text_for(args.checkpoint, args.data)
    questions = None
    if args.hellaswag != "none":
        check_shard(folder, manifest.validation[0], tokenizer.n_vocab)
        shard = folder / manifest.validation[0].file
        protocol, items = hellaswag.choose_items(args.hellaswag, args.limit or _usual_limit(args), shard, tokenizer)
        hellaswag.check_protocol(items, protocol, args.protocol)
        questions = Questions(protocol, items, tokenizer, args.protocol)

    found: list[Evaluated] = []
    for checkpoint in args.checkpoint:
        for weights in args.weights:
            loaded = load_model(checkpoint, args.device)  # anew for each: storing weights is for good
            say(f"measuring {loaded.path}, weights {weights}, on {loaded.device}")
            found.append(evaluate(loaded, weights, folder, manifest, args.val_tokens, questions))
            del loaded  # before the next one comes
    print(table(found))
    results = []
    for each in found:
        values = asdict(each)
        del values["batch_losses"]
        less = each.less(found[0]) if each is not found[0] else None
        results.append(values | {"loss_less_first": less and {"difference": less[0], "stderr": less[1]}})
    machine = describe_machine(choose_device(args.device))
    print(
        json.dumps({"dataset": str(folder), "manifest_sha256": manifest.sha256, "results": results, "machine": machine})
    )
    return 0


def text_for(checkpoints: Sequence[str], data: str | None) -> tuple[Path, Manifest]:
    """The dataset called `data`, or else the first model's, once each of the models is known to fit it.

    Raises UserError for a model or a dataset that is not there or that do not go together.
    """
    folder, manifest = Path(), None
    for checkpoint in checkpoints:
        loaded = load_model(checkpoint, "cpu")
        if manifest is None:
            folder = dataset_dir(data or loaded.config.data.dir)
            if data is None and not loaded.dataset_sha256:
                raise UserError(
                    f"what {loaded.path} was trained on is not known; name a dataset to measure on with --data"
                )
            if data is None and not (folder / MANIFEST).exists():
                raise UserError(
                    f"the text that {loaded.path} was trained beside is not in {folder}; name it, or another, with "
                    "--data"
                )
            manifest = read_manifest(folder)
        if manifest.n_vocab > loaded.config.model.n_vocab:
            raise UserError(
                f"{folder} holds ids of {manifest.tokenizer} up to {manifest.n_vocab - 1}, and {loaded.path} knows "
                f"{loaded.config.model.n_vocab}; give a dataset of its own tokenizer with --data"
            )
        if loaded.dataset_sha256 != manifest.sha256:
            say(f"note: {loaded.path} was not trained beside {folder}, and may have been trained on its text")
    assert manifest is not None, "there is a checkpoint"
    return folder, manifest


def table(found: Sequence[Evaluated]) -> str:
    """The figures as Markdown tables, one row a model."""
    rows = [["model", "step", "weights", "parameters", "loss", "perplexity", "bits a byte", "loss less the first's"]]
    for each in found:
        values, less = each.validation, each.less(found[0])
        rows.append(
            [
                _name(each),
                f"{each.step:,}",
                _weights(each),
                f"{each.parameters:,}",
                _with_error(values["loss"], values["stderr"], ".4f"),
                f"{values['perplexity']:.2f}",
                f"{values['bits_per_byte']:.4f}",
                "" if each is found[0] or less is None else _with_error(*less, "+.4f"),
            ]
        )
    tables = [_markdown(rows)]
    legend = {}
    choices = []
    for each in found:
        row = {"model": _name(each), "weights": _weights(each), "items": ""}
        for result in each.multiple_choice.values():
            short, _, words = result["protocol"].partition(" ")
            legend[short] = words
            for share in ("acc", "acc_norm"):
                if share in result:
                    stderr = result["stderr" if "stderr" in result else f"{share}_stderr"]
                    row[f"{short} {share}"] = _with_error(result[share], stderr, ".2%")
            row["items"] = f"{result['total']:,}"
        choices.append(row)
    if legend:
        tables.append(_markdown([list(choices[0]), *(list(row.values()) for row in choices)]))
        tables.append("\n".join(f"{short}: {words}" for short, words in legend.items()))
    return "\n\n".join(tables)


def _name(each: Evaluated) -> str:
    """The run's name and step folder, or the export's."""
    path = Path(each.checkpoint)
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name


def _weights(each: Evaluated) -> str:
    return each.weights + (" (computed in bf16)" if (each.weights, each.matmuls) == ("float32", "bfloat16") else "")


def _with_error(value: float, stderr: float | None, form: str) -> str:
    return f"{value:{form}}" + ("" if stderr is None else f" ± {stderr:{form.removeprefix('+')}}")


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def _usual_limit(args: argparse.Namespace) -> int | None:
    """Of the stand-in, which can make any number of items, as many as are quick; of a file all."""
    return 500 if args.hellaswag == "held-out" else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_assessment.evaluate",
        description="Measure one or several trained models on the same held-out text and multiple-choice items. Prints "
        "a table, then one JSON object as the last line.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="CHECKPOINT",
        help="runs (folders or names), step_* folders or exports; the others are compared with the first",
    )
    parser.add_argument("--data", help="a dataset's name or folder (default: what the first model was trained on)")
    parser.add_argument(
        "--val-tokens", type=int, default=2_097_152, help="held-out tokens, or all there are (default: 2,097,152)"
    )
    parser.add_argument(
        "--hellaswag",
        default="none",
        metavar="{FILE,auto,held-out,none}",
        help="HellaSwag as .jsonl or .jsonl.gz; auto fetches it; held-out: a stand-in from the held-out text (default: "
        "none)",
    )
    parser.add_argument("--limit", type=int, help="the first so many items (default: all; held-out: 500)")
    parser.add_argument(
        "--protocol", choices=(hellaswag.REFERENCE, hellaswag.LM_EVAL, hellaswag.BOTH), help="default: all that can be"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["float32"],
        choices=WEIGHT_DTYPES[1:],
        help="how to keep the weights, one after the other (default: float32, as they are saved; computed in bf16 "
        "where training would be)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser


if __name__ == "__main__":
    exit_with(main)
