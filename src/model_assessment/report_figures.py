"""The figures of a report, drawn from the list FIGURES: one run, optionally with another in grey, or several runs.

for picture in draw([read_run(folder)]):
    (plots / f"{picture.name}.png").write_bytes(picture.png)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from src.model_assessment.run_history import CHANCE, Run, Series, number, protocols, skipped_steps, spikes
from src.utils.plot_style import BLUE, GREEN, GREY, LIGHT_GREY, ORANGE, STYLE, as_png, new_figure, plain

# A longer curve is drawn faintly under its running median; sooner where the curves of several runs cross.
MANY_POINTS, MANY_OF_SEVERAL = 1_000, 200
BACKGROUND_BEYOND = 1.1  # the background is drawn up to this multiple of the run's own length
# Okabe and Ito's palette for the colour-blind (https://jfly.uni-koeln.de/color/), without yellow, and a marker a run.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
MARKERS = "osD^vPX"
RED, PURPLE = "#a3341a", "#7a3b8f"  # skipped steps and spikes


class Picture(NamedTuple):
    """A finished figure; `caption` helps to read it."""

    name: str
    title: str
    png: bytes
    caption: str


class Curve(NamedTuple):
    """One quantity of metrics.jsonl. `color` is for a run alone."""

    kind: str
    key: str
    label: str
    unit: str
    color: str = BLUE


@dataclass(frozen=True)
class Shown:
    """The runs on a page: one with an optional background, or several."""

    runs: list[Run]
    background: Run | None = None

    @property
    def all(self) -> list[Run]:
        """The runs in drawing order: the most important one last, on top."""
        return [*([self.background] if self.background else []), *self.runs[::-1]]

    @cached_property
    def by_tokens(self) -> bool:
        """True if the runs differ in batch size. Then only tokens, not steps, compare them fairly."""
        sizes = [run.tokens_per_step or 0.0 for run in self.all]
        return min(sizes) > 0 and max(sizes) > 1.001 * min(sizes)

    @property
    def half(self) -> float:
        """The middle of the first run on the x axis."""
        return self.runs[0].last_step * self.scale(self.runs[0]) / 2

    def scale(self, run: Run) -> float:
        """The length of a step on the x axis."""
        return run.tokens_per_step / 1e6 if run.tokens_per_step and self.by_tokens else 1.0

    def points(self, run: Run, curve: Curve, since: float = 0.0) -> Series:
        """The finite values of a quantity at their places on the x axis from `since` on."""
        steps, values = run.series(curve.kind, curve.key).finite()
        places = steps * self.scale(run)
        until = np.inf
        if run is self.background:
            until = BACKGROUND_BEYOND * 2 * self.half  # all of it would squeeze a short run to a corner
        inside = (places >= since) & (places <= until)
        return Series(places[inside], values[inside])


class FigureSpec(NamedTuple):
    """One figure: a panel for each unit of its curves.

    `finish` sets limits, adds levels and marks, and returns sentences for the caption.
    """

    name: str
    title: str
    curves: tuple[Curve, ...]
    finish: Callable[[list[Axes], Shown], list[str]]


def draw(runs: list[Run], background: Run | None = None) -> list[Picture]:
    """The figures of FIGURES that the first run has data for."""
    with matplotlib.rc_context(STYLE):
        pictures = (_draw_figure(spec, Shown(runs, background)) for spec in FIGURES)
        return [picture for picture in pictures if picture]


def figure_of(title: str, units: list[str], by_tokens: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per unit, one above the other, over a common x axis."""
    figure = new_figure()
    panels = list(figure.subplots(len(units), 1, sharex=True, squeeze=False)[:, 0])
    panels[0].set_title(title)
    for axes, unit in zip(panels, units, strict=True):
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    bottom = panels[-1]
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=not by_tokens, min_n_ticks=1))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    bottom.set_xlabel("millions of tokens" if by_tokens else "step")
    return figure, panels


def draw_level(axes: Axes, value: float, label: str) -> None:
    """A dashed line to compare with, if `value` is finite."""
    if np.isfinite(value):
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1.3, label=label, zorder=1.5)


def marker_for(points: Series) -> str:
    """Dots where the points are few, so that a single one is visible."""
    return "." if points.steps.size < 30 else ""


def running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median over a centred window of 2% of the points. A mean would smear a single spike over the window."""
    window = values.size // 100 * 2 + 1
    padded = np.pad(values, window // 2, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def _draw_figure(spec: FigureSpec, shown: Shown) -> Picture | None:
    run = shown.runs[0]
    if shown.background and (
        spec.name in ("speed", "memory")  # of another machine
        or (spec.name == "multiple_choice" and protocols(shown.background) != protocols(run))
    ):
        shown = Shown(shown.runs)
    since = shown.half if spec.name == "loss_second_half" else 0.0
    own = {curve: shown.points(run, curve, since) for curve in spec.curves}
    values = np.concatenate([points.values for points in own.values()])
    if values.size < (10 if since else 1) or not values.any():
        return None
    units = list(dict.fromkeys(curve.unit for curve in spec.curves))
    figure, panels = figure_of(spec.title, units, shown.by_tokens)
    for curve in spec.curves:
        for each in shown.all:
            _draw_curve(panels[units.index(curve.unit)], shown, each, curve, since)
    caption = spec.finish(panels, shown)
    caption += [_outside(axes, unit) for axes, unit in zip(panels, units, strict=True)]
    # After the limits: the best place for a legend depends on them.
    if len(panels[0].get_legend_handles_labels()[1]) > 1:
        panels[0].legend(loc="best", reverse=len(shown.runs) > 1)  # the first run is drawn last
    return Picture(spec.name, spec.title, as_png(figure), " ".join(filter(None, caption)))


def _draw_curve(axes: Axes, shown: Shown, run: Run, curve: Curve, since: float) -> None:
    points = shown.points(run, curve, since)
    if not points.steps.size:
        return
    several, name = len(shown.runs) > 1, plain(run.name, 24)
    style: dict[str, Any] = {"color": curve.color, "linewidth": 1.6, "label": curve.label, "marker": marker_for(points)}
    if run is shown.background:
        style |= {"color": LIGHT_GREY if curve.kind == "train" else GREY, "label": f"{curve.label}, {name}"}
    elif several:
        rank = shown.runs.index(run)
        style |= {"color": COLORS[rank], "label": name}
        if curve.kind == "validation":
            marks = {"marker": MARKERS[rank], "markersize": 4.5, "markevery": max(1, points.steps.size // 10)}
            style |= {"linewidth": 1.2, "linestyle": (0, (4, 2)), **marks}
            style["label"] = None if run.of_kind("train") else name  # one entry of the legend for both losses
    if curve.kind == "hellaswag":
        known = np.isfinite(run.series(curve.kind, curve.key).values)
        # Of a background's later points, which are not drawn, the errors are cut off, too.
        errors = np.nan_to_num(run.series(curve.kind, "stderr").values[known][: points.steps.size]).clip(min=0)
        axes.errorbar(*points, errors, **style | {"marker": "o", "markersize": 4, "capsize": 2.5, "elinewidth": 1})
    elif curve.kind == "train" and points.steps.size >= (MANY_OF_SEVERAL if several else MANY_POINTS):
        axes.plot(*points, color=style["color"], linewidth=0.6, alpha=0.3)
        axes.plot(points.steps, running_median(points.values), **style)
    else:
        axes.plot(*points, **style, zorder=3 if curve.kind == "validation" else 2)


def _finish_loss(panels: list[Axes], shown: Shown) -> list[str]:
    (axes,), run = panels, shown.runs[0]
    entropies = run.series("validation", "unigram_entropy").finite().values
    entropy = float(entropies[-1]) if entropies.size else np.nan
    draw_level(axes, entropy, "unigram entropy")
    # Neither the first steps nor a diverging end may flatten the rest.
    every = [shown.points(each, curve).values for each in shown.all for curve in LOSSES]
    losses, start = np.concatenate(every), max(values[0] for values in every if values.size)
    usual = np.quantile(losses, 0.95 if losses.size >= 100 else 1.0)  # of few points none is an exception
    low, high = np.nanmin([entropy, losses.min()]), np.nanmax([entropy, min(usual, start)])
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    if len(shown.runs) > 1:
        return ["Solid: training. Dashed, with marks: validation."]
    return [_background_text(shown), *_mark_events(axes, shown, high + margin)]


def _mark_events(axes: Axes, shown: Shown, high: float) -> list[str]:
    """Marks resumes, skipped steps and spikes, and counts them for the caption."""
    run, caption = shown.runs[0], []
    scale = shown.scale(run)
    resumes = [event["step"] for event in run.of_kind("event") if event.get("name") == "resume"]
    for step in resumes:
        axes.axvline(step * scale, color=LIGHT_GREY, linestyle=":", linewidth=1.3)
    if resumes:
        caption.append("Dotted: resumed here.")
    look: dict[str, Any] = {"linestyle": "", "zorder": 4, "markerfacecolor": "none"}
    if skipped := skipped_steps(run):
        bottom: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        places, heights = np.array(skipped) * scale, np.full(len(skipped), 0.02)
        axes.plot(places, heights, marker="x", color=RED, label="skipped step", **look, **bottom)
        caption.append(f"Skipped steps: {len(skipped):,}, the last {skipped[-1]:,}.")
    steps, losses = spikes(run)
    if steps.size:
        axes.plot(steps * scale, np.minimum(losses, high), marker="v", color=PURPLE, label="spike", **look)
        caption.append(f"Spikes, far above the points before: {steps.size:,}, the last at step {steps[-1]:,.0f}.")
    return caption


def _finish_second_half(panels: list[Axes], shown: Shown) -> list[str]:
    losses = np.concatenate([shown.points(shown.runs[0], curve, shown.half).values for curve in LOSSES])
    high = 2 * np.quantile(losses, 0.95) - losses.min()  # a spike may not flatten the rest
    if len(shown.runs) == 1 and losses.min() < high < losses.max():
        panels[0].set_ylim(top=high)
    return ["The same curves from half-way on."]


def _finish_multiple_choice(panels: list[Axes], shown: Shown) -> list[str]:
    run, axes = shown.runs[0], panels[0]
    draw_level(axes, CHANCE, f"chance, {CHANCE:.0%}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.margins(y=0.12)
    caption = [f"Protocol: {'; '.join(protocols(run))}.", "Bars: one standard error either way."]
    for other in shown.runs[1:]:
        if protocols(other) and protocols(other) != protocols(run):
            caption.append(f"{other.name} used another: {'; '.join(protocols(other))}. Do not compare the two by it.")
    return caption


def _finish_gradient_norm(panels: list[Axes], shown: Shown) -> list[str]:
    run, axes = shown.runs[0], panels[0]
    clip = number(run.setting("config", "optim", "clip_grad_norm"))
    draw_level(axes, clip, f"clipped above {clip:g}")
    values = run.series("train", "grad_norm").finite().values
    if values.min() <= 0 or values.max() <= 20 * values.min():
        return _from_zero(panels, shown)
    formatter = axes.yaxis.get_major_formatter()  # which a logarithmic scale replaces
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(formatter)
    return []


def _from_zero(panels: list[Axes], shown: Shown) -> list[str]:
    panels[0].set_ylim(bottom=0)
    return []


def _finish_speed(panels: list[Axes], shown: Shown) -> list[str]:
    for axes, key in zip(panels, ("step_ms", "tokens_per_second"), strict=True):
        values = np.concatenate([run.series("train", key).finite().values for run in shown.runs])
        usual = values[values <= 2.5 * np.median(values)] if values.size else values  # one slow step flattens the rest
        axes.set_ylim(0, 1.15 * usual.max(initial=0.0) or None)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    return []


def _background_text(shown: Shown) -> str:
    """The background's name and data, and the last validation losses of both at the same place."""
    if not shown.background:
        return ""
    data = shown.background.setting("dataset", "name")
    grey = f"Grey: {shown.background.name}{f', trained on {data}' if data else ''}."
    own, other = (run.series("validation", "loss").finite() for run in (shown.runs[0], shown.background))
    if not own.steps.size or not other.steps.size:
        return grey
    place, places = own.steps[-1] * shown.scale(shown.runs[0]), other.steps * shown.scale(shown.background)
    if not places[0] <= place <= places[-1]:
        return grey
    loss, reference = own.values[-1], np.interp(place, places, other.values)
    at = f"{place:,.4g} million tokens" if shown.by_tokens else f"step {place:,.0f}"
    return f"{grey} Its validation loss at {at}: {reference:.3f}; this run's: {loss:.3f} ({loss - reference:+.3f})."


def _outside(axes: Axes, unit: str) -> str:
    # Only curves are in data coordinates; levels and marks are not.
    curves = [line for line in axes.lines if line.get_transform() == axes.transData]
    highest = max((np.max(np.asarray(line.get_ydata(), dtype=np.float64)) for line in curves), default=0.0)
    return f"Above the frame: values up to {_short(highest)} {unit}." if highest > axes.get_ylim()[1] else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


LOSSES = (
    Curve("train", "loss", "training", "nats per token"),
    Curve("validation", "loss", "validation", "nats per token", ORANGE),
)
ACCURACY = Curve("hellaswag", "acc_norm", "right answers", "share of items", GREEN)
LEARNING_RATE = Curve("train", "lr", "learning rate", "learning rate")
GRADIENT_NORM = Curve("train", "grad_norm", "gradient norm", "global L2 norm")
STEP_TIME = Curve("train", "step_ms", "step time", "ms per step")
THROUGHPUT = Curve("train", "tokens_per_second", "throughput", "tokens per s")
MEMORY = Curve("train", "memory_gb", "memory", "GB of one process")
FIGURES = (
    FigureSpec("loss", "Loss", LOSSES, _finish_loss),
    FigureSpec("loss_second_half", "Loss, second half", LOSSES, _finish_second_half),
    FigureSpec("multiple_choice", "Multiple choice", (ACCURACY,), _finish_multiple_choice),
    FigureSpec("learning_rate", "Learning rate", (LEARNING_RATE,), _from_zero),
    FigureSpec("gradient_norm", "Gradient norm", (GRADIENT_NORM,), _finish_gradient_norm),
    FigureSpec("speed", "Speed", (STEP_TIME, THROUGHPUT), _finish_speed),
    FigureSpec("memory", "Memory", (MEMORY,), _from_zero),
)
