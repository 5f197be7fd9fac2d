"""Draw a run's curves from its metrics.jsonl.

    python -m assets.curves RUN_DIR_OR_METRICS_FILE [--out assets/showcase]

Writes loss.png, training_metrics.png and hellaswag.png, except those without data in the run.
"""

import shutil
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from src.model_assessment.report_figures import draw_level, figure_of, marker_for, running_median
from src.model_assessment.run_history import CHANCE, Run, Series, read_run
from src.model_configs.arguments import Parser
from src.utils import root
from src.utils.errors import StorageError, UserError, exit_with, print_result
from src.utils.plot_style import BLUE, GREEN, ORANGE, STYLE, as_png

# Longer curves are drawn faintly under their running median. A report's limit is higher: its figures are larger.
MANY_POINTS = 150


def read_metrics(path: Path) -> Run:
    """Read the run at `path`, a run directory or a metrics file of any name.

    Raises UserError if it is missing or empty.
    """
    if not path.is_file():
        return read_run(path)
    with tempfile.TemporaryDirectory() as folder:  # read_run expects a directory with this file name
        shutil.copyfile(path, Path(folder) / "metrics.jsonl")
        return read_run(Path(folder))


def write_pictures(run: Run, out: Path) -> list[str]:
    """Write the pictures with data in `run` to `out`, and return their file names.

    The other pictures are removed, because they show another run. Raises UserError if the run has no data, and
    StorageError if `out` is not writable.
    """
    with matplotlib.rc_context(STYLE):
        figures = {"loss": loss(run), "training_metrics": training_metrics(run), "hellaswag": hellaswag(run)}
        pngs = {f"{name}.png": as_png(figure) if figure else None for name, figure in figures.items()}
    if not any(pngs.values()):
        raise UserError(
            "Cannot draw the run: it has no losses, training metrics or HellaSwag results yet. Resume it first."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, png in pngs.items():
            if png:
                (out / name).write_bytes(png)
            else:
                (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"Cannot write the pictures to {out}: {error.strerror or error}. Choose another folder with --out."
        ) from error
    return [name for name, png in pngs.items() if png]


def loss(run: Run) -> Figure | None:
    """Training and validation loss in nats per token; None without either."""
    training, validation = (run.series(kind, "loss").finite() for kind in ("train", "validation"))
    if not training.steps.size and not validation.steps.size:
        return None
    figure, (axes,) = _figure("Loss", ["nats per token"], run)
    if training.steps.size:
        _draw(axes, training, BLUE, f"training, {_ending(training):.3f} at the end")
    if validation.steps.size:
        label = f"validation, {validation.values[-1]:.3f} at the end"
        axes.plot(*validation, color=ORANGE, linewidth=1.6, marker=marker_for(validation), label=label, zorder=3)
    # The steep fall in the first hundredth of a run would fill most of the picture.
    every = np.concatenate([training.values, validation.values])
    later = np.concatenate([curve.values[curve.steps >= run.last_step / 50] for curve in (training, validation)])
    low, high = every.min(), later.max() if training.steps.size > MANY_POINTS and later.size else every.max()
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.legend(loc="upper right")
    return figure


def training_metrics(run: Run) -> Figure | None:
    """Learning rate, gradient norm and tokens per second, stacked; None without any of them."""
    quantities = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per s"}
    curves = {key: curve for key in quantities if (curve := run.series("train", key).finite()).steps.size}
    if not curves:
        return None
    figure, panels = _figure("Training metrics", [quantities[key] for key in curves], run)
    figure.set_size_inches(figure.get_figwidth(), 1.2 + 1.75 * len(curves))
    for axes, (key, curve) in zip(panels, curves.items(), strict=True):
        _draw(axes, curve, BLUE, noisy=key != "lr")
        axes.set_ylim(0, 1.08 * _usual_maximum(curve.values) or None)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_formatter(FuncFormatter(_compact if key == "tokens_per_second" else _short))
    figure.align_ylabels(panels)
    return figure


def hellaswag(run: Run) -> Figure | None:
    """Multiple-choice accuracy with error bars of one standard error; None without results.

    The title says if the items are HellaSwag or the stand-in from held-out text.
    """
    share = run.series("hellaswag", "acc_norm")
    known = np.isfinite(share.values)
    if not known.any():
        return None
    error = np.nan_to_num(run.series("hellaswag", "stderr").values[known])
    share, last = share.finite(), run.of_kind("hellaswag")[-1]
    stand_in = "not HellaSwag" in str(last.get("protocol"))
    title = "Multiple choice, a stand-in for HellaSwag" if stand_in else "HellaSwag accuracy"
    figure, (axes,) = _figure(title, ["accuracy"], run)
    label = f"{100 * share.values[-1]:.4g}% at the end"
    axes.errorbar(*share, error, color=GREEN, marker="o", markersize=4, capsize=2.5, elinewidth=1, label=label)
    draw_level(axes, CHANCE, f"chance, {CHANCE:.0%}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.margins(y=0.12)
    items = last.get("total")
    axes.set_ylabel(f"accuracy, {items:,} items" if isinstance(items, int) else "accuracy")
    axes.legend(loc="best")
    return figure


def main() -> None:
    parser = Parser(
        prog="python -m assets.curves", description="Draw a run's loss, training metrics and HellaSwag accuracy."
    )
    parser.add_argument(
        "run", metavar="RUN_DIR_OR_METRICS_FILE", help="a path, or the name of a run under temp_data/runs"
    )
    parser.add_argument("--out", type=Path, default=root.ROOT / "assets" / "showcase", help="folder of the pictures")
    arguments = parser.parse_args()
    path = Path(arguments.run)
    run = read_metrics(path if path.is_file() else root.run_dir(arguments.run))
    pictures = write_pictures(run, arguments.out)
    print_result({"out": str(arguments.out), "pictures": pictures}, f"wrote {', '.join(pictures)} to {arguments.out}")


def _figure(title: str, units: list[str], run: Run) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel per unit, stacked, with the steps as x axis."""
    figure, panels = figure_of(title, units)
    steps, tokens = run.series("train", "tokens_seen").finite()
    size = f" of {tokens[-1] / steps[-1]:,.0f} tokens" if steps.size and steps[-1] else ""
    panels[-1].set_xlabel(f"step{size}")
    return figure, panels


def _draw(axes: Axes, curve: Series, color: str, label: str = "", noisy: bool = True) -> None:
    if curve.steps.size <= MANY_POINTS or not noisy:
        axes.plot(*curve, color=color, linewidth=1.6, marker=marker_for(curve), label=label)
        return
    axes.plot(*curve, color=color, linewidth=0.6, alpha=0.3)
    axes.plot(curve.steps, running_median(curve.values), color=color, linewidth=1.6, label=label)


def _ending(curve: Series) -> float:
    """Return the last value as drawn."""
    return float((running_median(curve.values) if curve.steps.size > MANY_POINTS else curve.values)[-1])


def _usual_maximum(values: NDArray[np.float64]) -> float:
    """Return the maximum without outliers, such as the first gradient norm, which would flatten the curve."""
    return float(values[values <= 4 * np.median(values)].max(initial=0.0))


def _short(value: float, _: object) -> str:
    return f"{value:g}"


def _compact(value: float, _: object) -> str:
    return f"{value / 1000:,g}k" if abs(value) >= 10_000 else f"{value:,g}"


if __name__ == "__main__":
    exit_with(main)
