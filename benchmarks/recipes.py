"""Compare training recipes: the validation loss that each reaches from a number of tokens. Resumable, hours on a CPU.

python -m benchmarks.recipes --path TEXT ... [--dataset NAME] [--only NAME ...] [--table] [--picture FILE]

TEXT are files for data_downloader, which prepares --dataset from them unless it exists. Every run is a process of
`pretrain.py`, named DATASET-NAME, so a stopped benchmark resumes inside a run. All runs of a size and seed see the
same windows in the same order, and each schedule is planned for its own length. Losses are measured on the same
validation windows, so their differences have paired standard errors. Each line of benchmarks/DATASET.jsonl is a
finished run, which is not repeated.

--table prints the finished runs as Markdown, --picture FILE draws them; neither trains.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from assets import dark
from benchmarks import print_figures
from src.data_processing.shards import read_manifest
from src.data_processing.training_data_loader import WindowDataset
from src.model_assessment.evaluate import markdown, with_error
from src.model_assessment.report_figures import draw_level
from src.model_assessment.validation import standard_error, validate
from src.model_configs.arguments import Parser
from src.model_utils.load_model import load_model
from src.utils import hardware
from src.utils.errors import exit_with, say
from src.utils.plot_style import BLUE, GREY, STYLE, as_svg, new_figure
from src.utils.root import ROOT, RUNS, dataset_dir

VALIDATION_WINDOWS = 400


@dataclass(frozen=True)
class Size:
    """A model and the length of its full run."""

    settings: str
    batch_tokens: int
    steps: int


SIZES = {
    "17m": Size("--model.n-embd 256 --model.n-head 4 --model.n-layer 4", 2_048, 300),
    "33m": Size("--model.n-embd 384 --model.n-head 6 --model.n-layer 6", 4_096, 160),
}
COMMON = "--model.n-ctx 256 --train.micro-batch-size 8 --train.precision float32 --eval.hellaswag-items 0"
# The published recipe. Both recipes warm up for as long here, which in a few hundred steps helps the published one.
FAITHFUL = (
    "--model.residual-dropout 0.1 --model.ffn-dropout 0.15 --model.bias --model.no-qk-norm --model.no-zero-init "
    "--optim.optimizer adamw --optim.embedding-lr None --optim.schedule cosine "
    "--optim.decay-ratio 1 --optim.min-lr-ratio 0.1 --optim.warmup-ratio 0.05"
)
FAST = (
    "--model.residual-dropout 0 --model.ffn-dropout 0 --model.no-bias --model.qk-norm --model.zero-init "
    "--optim.optimizer muon --optim.max-lr 4e-3 --optim.embedding-lr 1e-2 --optim.schedule linear "
    "--optim.decay-ratio 0.85 --optim.min-lr-ratio 0 --optim.warmup-ratio 0.05"
)


@dataclass(frozen=True)
class Training:
    """A run of the comparison."""

    size: str
    recipe: str
    share: float = 1.0
    """Of the size's steps."""
    seed: int = 1

    @property
    def name(self) -> str:
        return f"{self.size}-{self.recipe}-{self.share:.3g}-{self.seed}"

    @property
    def steps(self) -> int:
        return round(SIZES[self.size].steps * self.share)


# One ingredient of the fast recipe taken away, changed or added.
LADDER = {
    "fast-dropout": "--model.residual-dropout 0.1 --model.ffn-dropout 0.15",
    "fast-bias": "--model.bias",
    "fast-no-qk-norm": "--model.no-qk-norm",
    "fast-no-zero-init": "--model.no-zero-init",
    "fast-cosine": "--optim.schedule cosine --optim.decay-ratio 1 --optim.min-lr-ratio 0.1",
    "fast-one-rate": "--optim.embedding-lr None",
    "fast-embedding-3e-3": "--optim.embedding-lr 3e-3",
    "fast-embedding-6e-3": "--optim.embedding-lr 6e-3",
    "fast-embedding-2e-2": "--optim.embedding-lr 2e-2",
    "fast-adamw": "--optim.optimizer adamw",
    "fast-relu2": "--model.ffn relu2",
}
RECIPES = {
    **{f"faithful-{rate}": f"{FAITHFUL} --optim.max-lr {rate}" for rate in ("1e-3", "2e-3", "4e-3")},
    "fast": FAST,
    **{name: f"{FAST} {change}" for name, change in LADDER.items()},
}
SHARES = (1.0, 0.5, 0.4, 1 / 3)


def planned(best: dict[str, str]) -> list[Training]:
    """Return all runs; `best` is the faithful recipe with the best rate by size, as far as it is known."""
    runs = []
    for size, seeds in (("17m", (1, 2, 3)), ("33m", (1,))):
        runs += [Training(size, recipe) for recipe in RECIPES if recipe.startswith("faithful")]
        for seed in seeds:
            if size in best:
                runs.append(Training(size, best[size], seed=seed))
            runs += [Training(size, "fast", share, seed) for share in SHARES]
    runs += [Training("17m", recipe, 0.4) for recipe in LADDER] + [Training("33m", "fast-relu2", 0.4)]
    return list(dict.fromkeys(runs))


def main() -> None:
    parser = Parser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("--path", nargs="+", default=[], help="files of text")
    parser.add_argument("--dataset", default="recipes", help="name of the dataset and of the file of results")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose names contain one of these")
    parser.add_argument("--table", action="store_true", help="print the finished runs as Markdown, and train nothing")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="draw the finished runs, also as FILE_dark.svg"
    )
    args = parser.parse_args()
    results_file = ROOT / "benchmarks" / f"{args.dataset}.jsonl"
    results = read_results(results_file)
    if args.table:
        print(table(results))
        print("\nshare of tokens:", ", ".join(f"{run} {share:.3f}" for run, share in shares(results).items()))
        return
    if args.picture:
        svg = picture(results)
        args.picture.write_text(svg, encoding="utf-8")
        args.picture.with_stem(f"{args.picture.stem}_dark").write_text(dark(svg), encoding="utf-8")
    else:
        if not (dataset_dir(args.dataset) / "manifest.json").exists():
            options = ["--source", "files", "--out", args.dataset, "--path", *args.path]
            command = [sys.executable, "-m", "src.data_processing.data_downloader", *options]
            subprocess.run(command, cwd=ROOT, check=True)
        # The best rate is known only once the first runs are done, and adds others.
        while todo := [
            run
            for run in planned(best_rates(results))
            if run.name not in results and any(part in run.name for part in args.only)
        ]:
            say(f"{len(todo)} runs to do; now {todo[0].name}")
            results[todo[0].name] = measure(todo[0], args.dataset)
            with open(results_file, "a") as file:
                file.write(json.dumps(results[todo[0].name]) + "\n")
    print_figures(
        {
            "shares": shares(results),
            "runs": summary(results),
            "machine": hardware.describe_machine(torch.device("cpu")),
        }
    )


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["name"]: entry for entry in map(json.loads, lines)}


def best_rates(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return by size the faithful recipe with the lowest loss of those tried; `planned` tries all rates first."""
    best = {}
    for size in SIZES:
        runs = [Training(size, recipe) for recipe in RECIPES if recipe.startswith("faithful")]
        if tried := [run for run in runs if run.name in results]:
            best[size] = min(tried, key=lambda run: results[run.name]["loss"]).recipe
    return best


def measure(run: Training, dataset: str) -> dict[str, Any]:
    """Train, and return the loss on each validation window."""
    size = SIZES[run.size]
    options = f"{COMMON} {size.settings} {RECIPES[run.recipe]} --train.batch-tokens {size.batch_tokens}"
    options += f" --train.total-steps {run.steps} --train.seed {run.seed} --data.dir {dataset}"
    options += f" --run-name {dataset}-{run.name} --eval.val-every-steps 1000000 --eval.val-tokens 8192"
    command = [sys.executable, "pretrain.py", "laptop", *options.split(), "--eval.sample-prompts"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    loaded = load_model(f"{dataset}-{run.name}", "cpu")
    folder = dataset_dir(dataset)
    manifest = read_manifest(folder)
    shard = manifest.validation[0]
    losses: list[float] = []
    result = validate(
        loaded.model.eval(),
        WindowDataset(folder, manifest.validation, loaded.config.model.n_ctx, manifest.n_vocab, at_least=1),
        n_windows=VALIDATION_WINDOWS,
        batch_size=1,
        bytes_per_token=shard.text_bytes / shard.tokens,
        window_losses=losses,
    )
    lines = [json.loads(line) for line in (RUNS / f"{dataset}-{run.name}" / "metrics.jsonl").read_text().splitlines()]
    step_ms = statistics.median(line["step_ms"] for line in lines if line["kind"] == "train")
    return {
        "name": run.name,
        "size": run.size,
        "recipe": run.recipe,
        "seed": run.seed,
        "tokens": run.steps * size.batch_tokens,
        "steps": run.steps,
        "step_ms": step_ms,
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "dataset": manifest.sha256,
        "settings": RECIPES[run.recipe],
        "date": time.strftime("%Y-%m-%d"),
        "window_losses": [round(loss, 4) for loss in losses],
    }


def summary(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each run with its difference to the best faithful run of its size and seed, with the paired error."""
    best, rows = best_rates(results), []
    for entry in results.values():
        row = {key: value for key, value in entry.items() if key != "window_losses"}
        base = results.get(Training(entry["size"], best.get(entry["size"], ""), seed=entry["seed"]).name)
        if base and base is not entry:
            pairs = zip(entry["window_losses"], base["window_losses"], strict=True)
            differences = [ours - theirs for ours, theirs in pairs]
            row["difference"] = statistics.mean(differences)
            row["stderr"] = standard_error(differences)
        rows.append(row)
    return rows


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the runs of `summary` as Markdown: by size and seed, the faithful recipe first, then the longest run."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        recipe, is_fast = row["recipe"], row["recipe"].startswith("fast")
        return row["size"], row["seed"], is_fast, recipe != "fast", -row["tokens"], recipe

    return markdown(
        [
            {
                "parameters": f"{row['size'][:-1]}M",
                "recipe": row["recipe"].replace("-", " ", 1),
                "seed": str(row["seed"]),
                "steps": str(row["steps"]),
                "tokens": f"{row['tokens']:,}",
                "validation loss": f"{row['loss']:.3f}",
                "difference from the best faithful run": with_error(row["difference"], row["stderr"], "+.3f")
                if "difference" in row
                else "",
            }
            for row in sorted(summary(results), key=place)
        ]
    )


def shares(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return by size and seed the share of its tokens from which the fast recipe reaches the best faithful loss.

    Between two measured shares, loss is taken to be linear in the logarithm of tokens. NaN outside of all of them.
    """
    reached = {}
    for size, recipe in best_rates(results).items():
        for seed in (1, 2, 3):
            target = results.get(Training(size, recipe, seed=seed).name)
            runs = {share: results.get(Training(size, "fast", share, seed).name) for share in SHARES}
            losses = {math.log(share): run["loss"] for share, run in runs.items() if run}  # rising, as tokens fall
            if target and losses:
                log_share = np.interp(
                    target["loss"], list(losses.values()), list(losses), left=math.nan, right=math.nan
                )
                reached[f"{size} seed {seed}"] = math.exp(float(log_share))
    return reached


def picture(results: dict[str, dict[str, Any]]) -> str:
    """Return an SVG with a panel for each size: validation loss over tokens of both recipes, one mark a seed."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure()
        best = best_rates(results)
        for axes, size in zip(np.atleast_1d(figure.subplots(1, len(best))), best, strict=True):
            for recipe, color, label in ((best[size], GREY, "faithful"), ("fast", BLUE, "fast")):
                runs = [r for r in results.values() if (r["size"], r["recipe"]) == (size, recipe)]
                by_tokens: dict[int, list[float]] = {}
                for run in runs:
                    by_tokens.setdefault(run["tokens"], []).append(run["loss"])
                tokens = sorted(by_tokens)
                axes.plot(tokens, [statistics.mean(by_tokens[t]) for t in tokens], color=color, label=label)
                axes.plot([r["tokens"] for r in runs], [r["loss"] for r in runs], "o", color=color, markersize=4)
            level = statistics.mean(
                by["loss"] for by in results.values() if (by["size"], by["recipe"]) == (size, best[size])
            )
            draw_level(axes, level, "")
            axes.set_title(f"{size[:-1]}M parameters")
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
            axes.legend()
        figure.axes[0].set_ylabel("validation loss, nats per token")
        return as_svg(figure).decode()


if __name__ == "__main__":
    exit_with(main)
