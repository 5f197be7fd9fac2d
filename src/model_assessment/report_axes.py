"""What the report's pictures share: the runs that they show, in which colours, over which axis."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from src.model_assessment.report_data import Run, Series
from src.utils.plot_style import GREY, LIGHT_GREY, as_png, new_figure, plain

Words = Callable[[float], str]

# From here on a noisy curve is drawn faintly, and its running median over it; sooner where several cross each other.
MANY_POINTS, MANY_OF_SEVERAL = 1_000, 200
BACKGROUND_BEYOND = 1.1  # times the run's own length is how far the background is drawn
# For several runs: seven colours that the colour-blind can tell apart too (Okabe and Ito, 2008, without its yellow,
# which white paper swallows; https://jfly.uni-koeln.de/color/), and a mark of each run's own.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
MARKERS = "osD^vPX"


class Plot(NamedTuple):
    """A picture and its words: `alt` says what is to be seen, `caption` what to know when reading it."""

    name: str
    png: bytes
    alt: str
    caption: str


class Look(NamedTuple):
    """How a run is drawn."""

    run: Run
    color: str
    name: str
    """"" for a run alone, which needs none."""
    marker: str
    """"" where marks are needed for few points only."""


@dataclass(frozen=True)
class Shown:
    """The runs in a page's pictures."""

    runs: list[Run]
    """One, or several to compare."""
    background: Run | None = None
    """Drawn in grey behind one."""

    @property
    def all(self) -> list[Run]:
        return [*self.runs, *([self.background] if self.background else [])]

    @property
    def by_tokens(self) -> bool:
        """Whether tokens, not steps, put the runs on the same footing: where their batches differ in size."""
        sizes = [run.tokens_per_step for run in self.all]
        return None not in sizes and max(sizes) > 1.001 * min(sizes)  # type: ignore[type-var, operator]

    def scale(self, run: Run) -> float:
        """What a step counts on the x axis."""
        return run.tokens_per_step / 1e6 if run.tokens_per_step and self.by_tokens else 1.0

    def curve(self, run: Run, kind: str, key: str, since: float = 0.0, whole: bool = False) -> Series:
        """The finite values of a quantity at their places on the x axis.

        Of the background's those that are drawn, unless asked for the whole.
        """
        steps, values = run.series(kind, key).finite()
        places = steps * self.scale(run)
        until = np.inf
        if run is self.background and not whole:
            until = BACKGROUND_BEYOND * self.runs[0].last_step * self.scale(self.runs[0])
        shown = (places >= since) & (places <= until)
        return Series(places[shown], values[shown])

    def looks(self, color: str, background_color: str = LIGHT_GREY) -> list[Look]:
        """The runs in the order they are drawn in: what matters most comes last, and on top. `color`: of one alone."""
        if len(self.runs) > 1:
            every = zip(self.runs, COLORS, MARKERS, strict=False)
            return [Look(run, color, plain(run.name, 24), marker) for run, color, marker in every][::-1]
        behind = [Look(self.background, background_color, self.background.name, "")] if self.background else []
        return [*behind, Look(self.runs[0], color, "", "")]

    def draw_noisy(self, axes: Axes, curve: Series, color: str, label: str) -> None:
        if not curve.steps.size:
            return
        if not self.is_many(curve):
            axes.plot(*curve, color=color, linewidth=1.6, label=label, marker=mark(curve))
            return
        axes.plot(*curve, color=color, linewidth=0.6, alpha=0.3)
        axes.plot(curve.steps, running_median(curve.values), color=color, linewidth=1.6, label=label)

    def median_note(self, curve: Series) -> str:
        if not self.is_many(curve):
            return ""
        return f"The bold line is the running median over {_window(curve.steps.size)} points."

    def is_many(self, curve: Series) -> bool:
        return curve.steps.size >= (MANY_POINTS if len(self.runs) == 1 else MANY_OF_SEVERAL)

    def alone(self) -> "Shown":
        """The same without the background."""
        return Shown(self.runs)


def figure_of(title: str, units: list[str], shown: Shown) -> tuple[Figure, list[Axes]]:
    """A figure with one panel for each unit, one above the other, over a common x axis."""
    figure = new_figure()
    panels = list(figure.subplots(len(units), 1, sharex=True, squeeze=False)[:, 0])
    panels[0].set_title(title)
    for axes, unit in zip(panels, units, strict=True):
        axes.set_ylabel(unit)
    bottom = panels[-1]
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=not shown.by_tokens, min_n_ticks=1))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    bottom.set_xlabel("millions of tokens" if shown.by_tokens else "step")
    return figure, panels


def legend(axes: Axes, shown: Shown) -> None:
    axes.legend(loc="best", reverse=len(shown.runs) > 1)  # the first run, drawn last, is named first


def label(what: str, name: str) -> str:
    return f"{what}, {name}" if name else what


def draw_level(axes: Axes, value: float, label: str) -> None:
    """A line to measure by, where there is such a value."""
    if np.isfinite(value):
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1.3, label=label, zorder=1.5)


def mark(curve: Series) -> str:
    return "." if curve.steps.size < 30 else ""


def _window(points: int) -> int:
    return points // 100 * 2 + 1


def running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median over a centred window; a mean would smear one slow step or spike over all of it."""
    padded = np.pad(values, _window(values.size) // 2, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, _window(values.size)), axis=1)


def outside_note(values: NDArray[np.float64], high: float, words: Words, unit: str = "") -> str:
    above = values[values > high]
    if not above.size:
        return ""
    return f"Above the frame: {above.size:,} of {values.size:,} points, the highest {words(above.max())}{unit}."


def in_words(what: str, curve: Series, words: Words) -> str:
    if not curve.steps.size:
        return ""
    if curve.steps.size == 1:
        return f"{what}: {words(curve.values[0])}."
    return (
        f"{what} goes from {words(curve.values[0])} to {words(curve.values[-1])}, "
        f"between {words(curve.values.min())} and {words(curve.values.max())}."
    )


def plot(name: str, figure: Figure, alt: list[str], caption: list[str]) -> Plot:
    title = figure.axes[0].get_title(loc="left")
    words = [" ".join(sentence for sentence in sentences if sentence) for sentences in (alt, caption)]
    return Plot(name, as_png(figure), f"{title}, line chart. {words[0]}", words[1])
