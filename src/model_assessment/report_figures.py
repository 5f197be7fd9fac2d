"""The figures of a report, drawn from the list FIGURES: one run, optionally with another in grey, or several runs.

for picture in draw([read_run(folder)]):
    (plots / f"{picture.name}.png").write_bytes(picture.png)
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

# First, because it imports matplotlib without the user's settings.
from src.utils.plot_style import BLUE, GREEN, GREY, LIGHT_GREY, ORANGE, STYLE, as_png, as_svg, new_figure

# isort: split
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from src.model_assessment.run_history import CHANCE, Run, Series, choice_name, compact, number, protocols, spikes
from src.utils.errors import harmless

SIZE_INCHES = (5.6, 3.7)  # its text is readable in half the width of a desktop and on a phone
MOST_POINTS = 600  # of a drawn curve
MOST_VALUES = 90  # places along the x axis that show their values
MANY_POINTS = 300  # a longer curve is drawn faintly under its running median
BACKGROUND_BEYOND = 1.1  # the background is drawn up to this multiple of the run's own length
# Okabe and Ito's palette for the colour-blind (https://jfly.uni-koeln.de/color/), without yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
RED, PURPLE = "#a3341a", "#7a3b8f"  # skipped steps and spikes


class Values(NamedTuple):
    """The text for one place along the x axis: a strip of the picture, in percent of its width."""

    left: float
    width: float
    text: str


class Picture(NamedTuple):
    """A finished figure; `caption` helps to read it."""

    name: str
    title: str
    png: bytes
    svg: bytes
    values: list[Values]
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

    def scale(self, run: Run) -> float:
        """The length of a step on the x axis."""
        return run.tokens_per_step / 1e6 if run.tokens_per_step and self.by_tokens else 1.0

    def points(self, run: Run, curve: Curve) -> Series:
        """The finite values of a quantity at their places on the x axis."""
        steps, values = run.series(curve.kind, curve.key).finite()
        places = steps * self.scale(run)
        if run is self.background:  # all of it would squeeze a short run into a corner
            near = places <= BACKGROUND_BEYOND * self.runs[0].last_step * self.scale(self.runs[0])
            return Series(places[near], values[near])
        return Series(places, values)


class FigureSpec(NamedTuple):
    """One figure: a panel for each unit of its curves.

    `finish` sets limits, adds levels and marks, and returns sentences for the caption.
    """

    name: str
    title: str
    curves: tuple[Curve, ...]
    finish: Callable[[list[Axes], Shown], list[str]]


def draw(runs: list[Run], background: Run | None = None) -> list[Picture]:
    """The figures of FIGURES that the first run has data for. Only the losses have a background.

    A run alone also has its gradient norms by layer.
    """
    specs = [spec for spec in FIGURES if spec.curves != (ACCURACY,) or any(map(choice_name, runs))]
    if len(runs) == 1 and (layers := _layer_norms(runs[0])):
        specs.insert(1 + [spec.name for spec in specs].index("gradient_norm"), layers)
    with matplotlib.rc_context(STYLE):
        pictures = (_draw_figure(spec, Shown(runs, background if spec.name == "loss" else None)) for spec in specs)
        return [picture for picture in pictures if picture]


def figure_of(title: str, units: list[str], by_tokens: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per unit, one above the other, over a common x axis."""
    figure = new_figure()
    panels = list(figure.subplots(len(units), 1, sharex=True, squeeze=False)[:, 0])
    panels[0].set_title(title)
    for axes, unit in zip(panels, units, strict=True):
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    bottom = panels[-1]
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=not by_tokens, min_n_ticks=1))
    bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
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


def thinned(points: Series) -> Series:
    """At most MOST_POINTS of the points: the smallest and the largest of each part, so that no spike is lost."""
    if points.steps.size <= MOST_POINTS:
        return points
    kept = set[int]()
    for part in np.array_split(np.arange(points.steps.size), MOST_POINTS // 2):
        kept |= {int(part[points.values[part].argmin()]), int(part[points.values[part].argmax()])}
    places = sorted(kept)
    return Series(points.steps[places], points.values[places])


def _draw_figure(spec: FigureSpec, shown: Shown) -> Picture | None:
    if not any(shown.points(shown.runs[0], curve).values.any() for curve in spec.curves):
        return None
    units = list(dict.fromkeys(curve.unit for curve in spec.curves))
    figure, panels = figure_of(spec.title, units, shown.by_tokens)
    figure.set_size_inches(SIZE_INCHES)
    if len(shown.runs) == 1 and (tokens := shown.runs[0].tokens_per_step) and not shown.by_tokens:
        panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,g}\n{compact(step * tokens)}"))
        panels[-1].set_xlabel("step, and tokens seen")
    for curve in spec.curves:
        for run in shown.all:
            _draw_curve(panels[units.index(curve.unit)], shown, run, curve)
    caption = spec.finish(panels, shown)
    # After the limits: the best place for a legend depends on them.
    if len(panels[0].get_legend_handles_labels()[1]) > 1:
        panels[0].legend(loc="best", reverse=len(shown.runs) > 1)  # the first run is drawn last
    title, png, svg = panels[0].get_title("left"), as_png(figure), as_svg(figure)
    return Picture(spec.name, title, png, svg, _values(figure, panels[-1], spec, shown), " ".join(caption))


def _values(figure: Figure, axes: Axes, spec: FigureSpec, shown: Shown) -> list[Values]:
    """Strips from left to right that cover the plot. `axes` has its final limits and place."""
    runs = [*shown.runs, *([shown.background] if shown.background else [])]
    drawn = [(curve, run, shown.points(run, curve)) for run in runs for curve in spec.curves]
    every = np.unique(np.concatenate([points.steps for _, _, points in drawn]))
    low, high = axes.get_xlim()
    last_in_part = {int((x - low) / (high - low) * MOST_VALUES): float(x) for x in every if low <= x <= high}
    places = list(last_in_part.values())
    edges = [low, *((left + right) / 2 for left, right in itertools.pairwise(places)), high]
    in_figure = axes.transData + figure.transFigure.inverted()
    at = [100 * float(in_figure.transform((x, 0))[0]) for x in edges]
    tokens, strips = shown.runs[0].tokens_per_step if len(shown.runs) == 1 else None, []
    for place, left, right in zip(places, at[:-1], at[1:], strict=True):
        lines = [f"step {place:,.0f}" + (f", {compact(place * tokens)} tokens" if tokens else "")]
        if shown.by_tokens:
            lines = [f"{place:,.6g} million tokens"]
        for curve, run, points in drawn:
            # The latest value that was known there.
            if (i := int(np.searchsorted(points.steps, place, side="right")) - 1) >= 0:
                name, value = curve.label or spec.title.lower(), points.values[i]
                if len(shown.all) > 1:
                    name = f"{_short(run)}{f', {name}' if len(spec.curves) > 1 else ''}:"
                text = f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
                older = "" if points.steps[i] == place else f" at {points.steps[i]:,.6g}"
                lines.append(f"{name} {f'{value:.1%}' if curve.unit == ACCURACY.unit else text}{older}")
        strips.append(Values(left, right - left, "\n".join(lines)))
    return strips


def _short(run: Run) -> str:
    """The run's name as a label; SVG has no place for a control character."""
    return harmless(run.name[:24])


def _draw_curve(axes: Axes, shown: Shown, run: Run, curve: Curve) -> None:
    points = shown.points(run, curve)
    if not points.steps.size:
        return
    style: dict[str, Any] = {"color": curve.color, "linewidth": 1.6, "label": curve.label, "marker": marker_for(points)}
    if run is shown.background:
        style |= {"color": LIGHT_GREY if curve.kind == "train" else GREY, "label": f"{curve.label}, {_short(run)}"}
    elif len(shown.runs) > 1:
        style |= {"color": COLORS[shown.runs.index(run)], "label": _short(run)}
        if curve.kind == "validation":  # one entry of the legend for both losses
            style |= {"label": None, "linestyle": (0, (4, 2)), "linewidth": 1.2}
    if curve.kind == "hellaswag":
        known = np.isfinite(run.series(curve.kind, curve.key).values)
        errors = np.nan_to_num(run.series(curve.kind, "stderr").values[known]).clip(min=0)
        axes.errorbar(*points, errors, **style | {"marker": "o", "markersize": 4, "capsize": 2.5, "elinewidth": 1})
    elif curve.kind == "train" and curve.key != "lr" and points.steps.size >= MANY_POINTS:
        if "." not in curve.key:  # of many layers only the median
            axes.plot(*thinned(points), color=style["color"], linewidth=0.6, alpha=0.3)
        axes.plot(*thinned(Series(points.steps, running_median(points.values))), **style)
    else:
        axes.plot(*thinned(points), **style, zorder=3 if curve.kind == "validation" else 2)


def _finish_loss(panels: list[Axes], shown: Shown) -> list[str]:
    (axes,), run = panels, shown.runs[0]
    entropy = number(run.last("validation").get("unigram_entropy"))
    draw_level(axes, entropy, "unigram entropy")
    # Neither the first steps nor a diverging end may flatten the rest.
    every = [shown.points(each, curve).values for each in shown.all for curve in LOSSES]
    losses, start = np.concatenate(every), max(values[0] for values in every if values.size)
    usual = np.quantile(losses, 0.95 if losses.size >= 100 else 1.0)  # of few points none is an exception
    low, high = np.nanmin([entropy, losses.min()]), np.nanmax([entropy, min(usual, start)])
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    if len(shown.runs) > 1:
        return ["Solid: training. Dashed: validation."]
    caption = _mark_events(axes, shown, high + margin)
    if shown.background:
        data = shown.background.setting("dataset", "name")
        caption.insert(0, f"Grey: {shown.background.name}{f', trained on {data}' if data else ''}.")
    return caption


def _mark_events(axes: Axes, shown: Shown, high: float) -> list[str]:
    """Marks resumes, skipped steps and spikes, and counts them for the caption."""
    run, caption, events = shown.runs[0], [], shown.runs[0].of_kind("event")
    scale = shown.scale(run)
    resumes = [event["step"] for event in events if event.get("name") == "resume"]
    for step in resumes:
        axes.axvline(step * scale, color=LIGHT_GREY, linestyle=":", linewidth=1.3)
    if resumes:
        caption.append("Dotted: resumed here.")
    look: dict[str, Any] = {"linestyle": "", "zorder": 4, "markerfacecolor": "none"}
    if skipped := [event["step"] for event in events if "skip" in str(event.get("name"))]:
        bottom: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        places, heights = np.array(skipped) * scale, np.full(len(skipped), 0.02)
        axes.plot(places, heights, marker="x", color=RED, label="skipped step", **look, **bottom)
        caption.append(f"Skipped steps: {len(skipped):,}, the last {skipped[-1]:,}.")
    steps, losses = spikes(run)
    if steps.size:
        axes.plot(steps * scale, np.minimum(losses, high), marker="v", color=PURPLE, label="spike", **look)
        caption.append(f"Spikes, far above the points before: {steps.size:,}, the last at step {steps[-1]:,.0f}.")
    return caption


def _finish_multiple_choice(panels: list[Axes], shown: Shown) -> list[str]:
    draw_level(panels[0], CHANCE, f"chance, {CHANCE:.0%}")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    panels[0].margins(y=0.12)
    used = dict.fromkeys(protocol for run in shown.runs for protocol in protocols(run))
    names = {name for name in map(choice_name, shown.runs) if name}
    caption = [f"Protocol: {'; '.join(used)}.", "Bars: one standard error either way."]
    if len(names) == 1:
        panels[0].set_title("".join(names))
    if "Held-out choice" in names:
        caption.insert(0, HELD_OUT_CHOICE)
    if len(used) > 1:
        caption.append("Do not compare accuracies of different protocols.")
    return caption


def _finish_gradient_norm(panels: list[Axes], shown: Shown) -> list[str]:
    clip = number(shown.runs[0].setting("config", "optim", "clip_grad_norm"))
    draw_level(panels[0], clip, f"clipped above {clip:g}")
    return _from_zero(panels, shown)


def _layer_norms(run: Run) -> FigureSpec | None:
    """The gradient norm of the embedding and of each block, as far as the run has recorded them."""
    # The line of a stopped run has none.
    norms = next((n for line in reversed(run.of_kind("train")) if (n := line.get("layer_grad_norms"))), None)
    count = min(len(norms), MOST_LAYERS) if isinstance(norms, list) else 0
    shades = map(matplotlib.colors.to_hex, matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count)))
    curves = tuple(
        Curve("train", f"layer_grad_norms.{i}", f"block {i}" if i else "embedding", LAYER_UNIT, shade if i else GREY)
        for i, shade in enumerate(shades)
    )
    return FigureSpec("layer_gradient_norms", "Gradient norm by layer", curves, _finish_layers) if curves else None


def _finish_layers(panels: list[Axes], shown: Shown) -> list[str]:
    for line in panels[0].lines[2:-1]:  # first, second and last are enough
        line.set_label(None)
    return _from_zero(panels, shown)


def _from_zero(panels: list[Axes], shown: Shown) -> list[str]:
    for axes in panels:
        values = np.concatenate([np.zeros(1), *(np.asarray(line.get_ydata(), np.float64) for line in axes.lines)])
        # Neither the first gradients nor one slow step may flatten the rest.
        axes.set_ylim(0, 1.06 * min(values.max(), 2 * np.quantile(values, 0.95)) or None)
    return []


MOST_LAYERS, LAYER_UNIT = 256, "L2 norm of the layer"
HELD_OUT_CHOICE = (
    "Held-out choice: the model picks the ending of a passage of validation text among four, three of which are from "
    "other documents."
)
LOSSES = (
    Curve("train", "loss", "training", "nats per token"),
    Curve("validation", "loss", "validation", "nats per token", ORANGE),
)
ACCURACY = Curve("hellaswag", "acc_norm", "right answers", "share of items", GREEN)
GRADIENT = Curve("train", "grad_norm", "gradient norm", "global L2 norm")
SPEEDS = (
    Curve("train", "step_ms", "step time", "ms per step"),
    Curve("train", "tokens_per_second", "throughput", "tokens per s"),
)
FIGURES = (
    FigureSpec("loss", "Loss", LOSSES, _finish_loss),
    FigureSpec("multiple_choice", "Multiple choice", (ACCURACY,), _finish_multiple_choice),
    FigureSpec("learning_rate", "Learning rate", (Curve("train", "lr", "", "learning rate"),), _from_zero),
    FigureSpec("gradient_norm", "Gradient norm", (GRADIENT,), _finish_gradient_norm),
    FigureSpec("speed", "Speed", SPEEDS, _from_zero),
    FigureSpec("memory", "Memory", (Curve("train", "memory_gb", "", "GB of one process"),), _from_zero),
)
