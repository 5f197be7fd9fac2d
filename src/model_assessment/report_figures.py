"""The figures of a report on one or several runs, drawn from the list FIGURES.

for picture in draw([read_run(folder)]):
    (plots / f"{picture.name}.png").write_bytes(picture.png)
"""

import itertools
from collections.abc import Callable
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

from src.model_assessment.run_history import CHANCE, Run, Series, choice_name, compact, number, protocols
from src.utils.errors import harmless

SIZE_INCHES = (5.6, 3.7)  # its text is readable at half the width of a desktop and on a phone
MOST_POINTS = 600  # of a drawn curve
MOST_VALUES = 90  # places along the x axis that show their values
MANY_POINTS = 300  # a longer curve is drawn faintly behind its running median
# Okabe and Ito's palette for the colour-blind (https://jfly.uni-koeln.de/color/), without yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
RED = "#a3341a"  # skipped steps


class Picture(NamedTuple):
    """A finished figure, with a caption that helps to read it."""

    name: str
    title: str
    png: bytes
    svg: bytes
    values: list[tuple[float, float, str]]
    """Strips of the picture that show values: left edge and width in percent of the picture's width, text."""
    caption: str


class Curve(NamedTuple):
    """One quantity of metrics.jsonl. `color` is used for a single run."""

    kind: str
    key: str
    label: str
    color: str = BLUE


class Drawn(NamedTuple):
    """The finite values of a run's quantity at their places on the x axis."""

    run: Run
    curve: Curve
    points: Series


class FigureSpec(NamedTuple):
    """One figure. `finish` sets limits, adds levels and marks, and returns sentences for the caption."""

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    finish: Callable[[Axes, list[Run], list[Drawn]], list[str]]


def draw(runs: list[Run]) -> list[Picture]:
    """The figures of FIGURES for which the first run has data; for a single run also gradient norms by layer."""
    specs = [spec for spec in FIGURES if spec.curves != (ACCURACY,) or any(map(choice_name, runs))]
    if len(runs) == 1 and (layers := _layer_norms(runs[0])):
        specs.insert(1 + [spec.name for spec in specs].index("gradient_norm"), layers)
    with matplotlib.rc_context(STYLE):
        return [picture for spec in specs if (picture := _draw_figure(spec, runs))]


def compared_by_tokens(runs: list[Run]) -> bool:
    """True if the runs differ in batch size, so that only tokens, not steps, compare them fairly."""
    sizes = [run.tokens_per_step or 0.0 for run in runs]
    return min(sizes) > 0 and max(sizes) > 1.001 * min(sizes)


def points_of(run: Run, curve: Curve, by_tokens: bool) -> Series:
    """The finite values of a quantity, over steps or over millions of tokens."""
    steps, values = run.series(curve.kind, curve.key).finite()
    return Series(steps * (run.tokens_per_step or 0.0) / 1e6 if by_tokens else steps, values)


def figure_of(title: str, units: list[str], by_tokens: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per unit, stacked, with a common x axis."""
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
    """Draws a dashed reference line if `value` is finite."""
    if np.isfinite(value):
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1.3, label=label, zorder=1.5)


def marker_for(points: Series) -> str:
    """Dots if the points are few, so that a single one is visible."""
    return "." if points.steps.size < 30 else ""


def running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median over a centred window of 2% of the points. A mean would smear a single spike over the window."""
    window = values.size // 100 * 2 + 1
    padded = np.pad(values, window // 2, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def thinned(points: Series) -> Series:
    """At most MOST_POINTS points: the smallest and the largest of each part, so that no spike is lost."""
    if points.steps.size <= MOST_POINTS:
        return points
    kept = set[int]()
    for part in np.array_split(np.arange(points.steps.size), MOST_POINTS // 2):
        kept |= {int(part[points.values[part].argmin()]), int(part[points.values[part].argmax()])}
    places = sorted(kept)
    return Series(points.steps[places], points.values[places])


def _draw_figure(spec: FigureSpec, runs: list[Run]) -> Picture | None:
    by_tokens = compared_by_tokens(runs)
    drawn = [Drawn(run, curve, points_of(run, curve, by_tokens)) for run in runs for curve in spec.curves]
    if not any(points.values.any() for run, _, points in drawn if run is runs[0]):
        return None
    figure, (axes,) = figure_of(spec.title, [spec.unit], by_tokens)
    figure.set_size_inches(SIZE_INCHES)
    if len(runs) == 1 and (tokens := runs[0].tokens_per_step):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,g}\n{compact(step * tokens)}"))
        axes.set_xlabel("step, and tokens seen")
    for each in sorted(drawn, key=lambda each: -runs.index(each.run)):  # the first run on top
        _draw_curve(axes, runs, *each)
    caption = spec.finish(axes, runs, drawn)
    # After the limits, because the best place for a legend depends on them.
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="best", reverse=len(runs) > 1)  # the first run is drawn last
    title, png, svg = axes.get_title("left"), as_png(figure), as_svg(figure)
    return Picture(spec.name, title, png, svg, _values(figure, axes, spec, drawn, by_tokens), " ".join(caption))


def _values(
    figure: Figure, axes: Axes, spec: FigureSpec, drawn: list[Drawn], by_tokens: bool
) -> list[tuple[float, float, str]]:
    """Strips from left to right that cover the plot. `axes` already has its final limits and position."""
    every = np.unique(np.concatenate([points.steps for _, _, points in drawn]))
    low, high = axes.get_xlim()
    last_in_part = {int((x - low) / (high - low) * MOST_VALUES): float(x) for x in every if low <= x <= high}
    places = list(last_in_part.values())
    edges = [low, *((left + right) / 2 for left, right in itertools.pairwise(places)), high]
    in_figure = axes.transData + figure.transFigure.inverted()
    at = [100 * float(in_figure.transform((x, 0))[0]) for x in edges]
    is_alone, strips = len(drawn) == len(spec.curves), []
    tokens = drawn[0].run.tokens_per_step if is_alone else None
    for place, left, right in zip(places, at[:-1], at[1:], strict=True):
        step = f"step {place:,.0f}" + (f", {compact(place * tokens)} tokens" if tokens else "")
        lines = [f"{place:,.6g} million tokens" if by_tokens else step]
        for run, curve, points in drawn:
            # The latest value known there.
            if (i := int(np.searchsorted(points.steps, place, side="right")) - 1) >= 0:
                name, value = curve.label or spec.title.lower(), points.values[i]
                if not is_alone:
                    name = f"{_short(run)}{f', {name}' if len(spec.curves) > 1 else ''}:"
                text = f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
                older = "" if points.steps[i] == place else f" at {points.steps[i]:,.6g}"
                lines.append(f"{name} {f'{value:.1%}' if curve is ACCURACY else text}{older}")
        strips.append((left, right - left, "\n".join(lines)))
    return strips


def _short(run: Run) -> str:
    """The run's name as a label, without control characters, which SVG forbids."""
    return harmless(run.name[:24])


def _draw_curve(axes: Axes, runs: list[Run], run: Run, curve: Curve, points: Series) -> None:
    if not points.steps.size:
        return
    style: dict[str, Any] = {"color": curve.color, "linewidth": 1.6, "label": curve.label, "marker": marker_for(points)}
    if len(runs) > 1:
        style |= {"color": COLORS[runs.index(run)], "label": _short(run)}
        if curve.kind == "validation":  # one entry of the legend for both losses
            style |= {"label": None, "linestyle": (0, (4, 2)), "linewidth": 1.2}
    if curve is ACCURACY:
        known = np.isfinite(run.series(curve.kind, curve.key).values)
        errors = np.nan_to_num(run.series(curve.kind, "stderr").values[known]).clip(min=0)
        axes.errorbar(*points, errors, **style | {"marker": "o", "markersize": 4, "capsize": 2.5, "elinewidth": 1})
    elif curve.kind == "train" and curve.key != "lr" and points.steps.size >= MANY_POINTS:
        if "." not in curve.key:  # for layers, of which there are many, only the median
            axes.plot(*thinned(points), color=style["color"], linewidth=0.6, alpha=0.3)
        axes.plot(*thinned(Series(points.steps, running_median(points.values))), **style)
    else:
        axes.plot(*thinned(points), **style, zorder=3 if curve.kind == "validation" else 2)


def _finish_loss(axes: Axes, runs: list[Run], drawn: list[Drawn]) -> list[str]:
    entropy = number(runs[0].last("validation").get("unigram_entropy"))
    draw_level(axes, entropy, "unigram entropy")
    # Keeps the first steps or a diverging end from flattening the rest.
    every = [points.values for _, _, points in drawn if points.values.size]
    losses, start = np.concatenate(every), max(values[0] for values in every)
    usual = np.quantile(losses, 0.95 if losses.size >= 100 else 1.0)  # with few points, none is an outlier
    low, high = np.nanmin([entropy, losses.min()]), np.nanmax([entropy, min(usual, start)])
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    if len(runs) > 1:
        return ["Solid: training. Dashed: validation."]
    caption, events = [], runs[0].of_kind("event")
    resumes = [event["step"] for event in events if event.get("name") == "resume"]
    for step in resumes:
        axes.axvline(step, color=LIGHT_GREY, linestyle=":", linewidth=1.3)
    if resumes:
        caption.append("Dotted: resumed here.")
    if skipped := [event["step"] for event in events if "skip" in str(event.get("name"))]:
        look: dict[str, Any] = {"linestyle": "", "marker": "x", "zorder": 4, "clip_on": False}
        heights = np.full(len(skipped), 0.02)  # just above the axis
        axes.plot(skipped, heights, color=RED, label="skipped step", transform=axes.get_xaxis_transform(), **look)
        caption.append(f"Skipped steps: {len(skipped):,}, the last {skipped[-1]:,}.")
    return caption


def _finish_multiple_choice(axes: Axes, runs: list[Run], _: list[Drawn]) -> list[str]:
    draw_level(axes, CHANCE, f"chance, {CHANCE:.0%}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.margins(y=0.12)
    used = dict.fromkeys(protocol for run in runs for protocol in protocols(run))
    names = {name for name in map(choice_name, runs) if name}
    caption = [f"Protocol: {'; '.join(used)}.", "Bars: one standard error either way."]
    if len(names) == 1:
        axes.set_title("".join(names))
    if "Held-out choice" in names:
        caption.insert(0, HELD_OUT_CHOICE)
    if len(used) > 1:
        caption.append("Do not compare accuracies of different protocols.")
    return caption


def _finish_gradient_norm(axes: Axes, runs: list[Run], drawn: list[Drawn]) -> list[str]:
    clip = number(runs[0].setting("config", "optim", "clip_grad_norm"))
    draw_level(axes, clip, f"clipped above {clip:g}")
    return _from_zero(axes, runs, drawn)


def _layer_norms(run: Run) -> FigureSpec | None:
    """The gradient norms of the embedding and of each block, if the run has recorded them."""
    # The last line of a stopped run has none.
    norms = next((n for line in reversed(run.of_kind("train")) if (n := line.get("layer_grad_norms"))), None)
    count = min(len(norms), MOST_LAYERS) if isinstance(norms, list) else 0
    shades = map(matplotlib.colors.to_hex, matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count)))
    curves = tuple(
        Curve("train", f"layer_grad_norms.{i}", f"block {i}" if i else "embedding", shade if i else GREY)
        for i, shade in enumerate(shades)
    )
    title, unit = "Gradient norm by layer", "L2 norm of the layer"
    return FigureSpec("layer_gradient_norms", title, unit, curves, _finish_layers) if curves else None


def _finish_layers(axes: Axes, runs: list[Run], drawn: list[Drawn]) -> list[str]:
    for line in axes.lines[2:-1]:  # first, second and last are enough
        line.set_label(None)
    return _from_zero(axes, runs, drawn)


def _from_zero(axes: Axes, _: list[Run], __: list[Drawn]) -> list[str]:
    values = np.concatenate([np.zeros(1), *(np.asarray(line.get_ydata(), np.float64) for line in axes.lines)])
    # Keeps the first gradients or one slow step from flattening the rest.
    axes.set_ylim(0, 1.06 * min(values.max(), 2 * np.quantile(values, 0.95)) or None)
    return []


MOST_LAYERS = 256
HELD_OUT_CHOICE = (
    "Held-out choice: the model picks the ending of a passage of validation text among four. Three are from other "
    "documents."
)
LOSSES = (Curve("train", "loss", "training"), Curve("validation", "loss", "validation", ORANGE))
ACCURACY = Curve("hellaswag", "acc_norm", "right answers", GREEN)
LEARNING_RATE, GRADIENT = Curve("train", "lr", ""), Curve("train", "grad_norm", "gradient norm")
SPEED, MEMORY = Curve("train", "tokens_per_second", ""), Curve("train", "memory_gb", "")
FIGURES = (
    FigureSpec("loss", "Loss", "nats per token", LOSSES, _finish_loss),
    FigureSpec("multiple_choice", "Multiple choice", "share of items", (ACCURACY,), _finish_multiple_choice),
    FigureSpec("learning_rate", "Learning rate", "learning rate", (LEARNING_RATE,), _from_zero),
    FigureSpec("gradient_norm", "Gradient norm", "global L2 norm", (GRADIENT,), _finish_gradient_norm),
    FigureSpec("speed", "Throughput", "tokens per s", (SPEED,), _from_zero),
    FigureSpec("memory", "Memory", "GB of one process", (MEMORY,), _from_zero),
)
