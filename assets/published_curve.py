"""Draw the published run's losses with those of this project's small run, for light and for dark pages.

    python -m assets.published_curve writes assets/published_curve.svg and assets/published_curve_dark.svg.

The published run's losses come from its author's log (assets/data/published_run_269m.csv), the others from the laptop
preset's run in assets/showcase. Their losses cannot be compared, because size and data differ, and the picture says so.
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from assets import dark
from src.model_assessment.run_history import Run, compact, duration, published_run, read_run
from src.utils.errors import exit_with, print_result
from src.utils.plot_style import BLUE, ORANGE, STYLE, as_svg, new_figure

HERE = Path(__file__).parent


def draw(published: Run, ours: Run) -> Figure:
    """Return the losses of both runs over the tokens seen, one panel each with an x axis of its length."""
    size, cores = compact(ours.setting("derived", "parameters")), ours.setting("machine", "cores")
    notes = {
        "The published run": "320M parameters, FineWeb-Edu,\n8 A100s, 8 h 47 min",
        "Another size on other data": f"{size} parameters, prose and manuals,\n{cores} CPU cores, "
        f"{duration(ours.active_seconds)}",
    }
    figure = new_figure()
    figure.set_size_inches(8.4, 4.2)
    panels = figure.subplots(1, 2)
    for axes, run, (title, note) in zip(panels, (published, ours), notes.items(), strict=True):
        training, validation = (run.series(kind, "loss").finite() for kind in ("train", "validation"))
        step_tokens = run.tokens_per_step or 1.0
        axes.plot(training.steps * step_tokens, training.values, color=BLUE, linewidth=1.4, label="training")
        axes.plot(validation.steps * step_tokens, validation.values, color=ORANGE, linewidth=1.6, label="validation")
        last = f"{validation.values[-1]:.2f}"
        place = (validation.steps[-1] * step_tokens, min(validation.values[-1], training.values[-10:].min()))
        axes.annotate(last, place, (4, -16), textcoords="offset points", color=ORANGE, weight="bold", ha="right")
        # The steep fall of the first steps would flatten the rest.
        low, high = place[1], validation.values[validation.steps > 0.015 * run.last_step][0]
        axes.set_ylim(low - 0.2 * (high - low), high + 0.4 * (high - low))
        axes.set_title(title, pad=40)
        axes.text(0, 1.035, note, transform=axes.transAxes, size=10, in_layout=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _short(tokens)))
        axes.set_xlabel("tokens seen")
        axes.legend(loc="upper right", framealpha=0)
    panels[0].set_ylabel("loss, nats per token")
    return figure


def _short(tokens: float) -> str:
    return f"{tokens / 1e9:g}B" if tokens >= 1e9 else f"{tokens / 1e3:g}k" if tokens else "0"


def main() -> None:
    with matplotlib.rc_context(STYLE):
        svg = as_svg(draw(published_run(), read_run(HERE / "showcase"))).decode()
    pictures = {"published_curve.svg": svg, "published_curve_dark.svg": dark(svg)}
    for name, text in pictures.items():
        (HERE / name).write_text(text, encoding="utf-8")
    print_result({"pictures": list(pictures)}, f"wrote {' and '.join(pictures)} to {HERE}")


if __name__ == "__main__":
    exit_with(main)
