"""The report's pictures: each shows one thing of a run, and a second run in grey where two are compared."""

from collections.abc import Callable
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from src.model_assessment.report_data import Run, Series, number
from src.model_assessment.report_text import CHANCE, fixed, percent, protocols
from src.utils.plot_style import BLUE, GREEN, GREY, LIGHT_GREY, ORANGE, STYLE, as_png, new_figure, plain

Words = Callable[[float], str]

NAMES = ("loss", "loss_second_half", "multiple_choice", "learning_rate", "gradient_norm", "speed")

MANY_POINTS = 1_000  # from here on a noisy curve is drawn faintly, and its running median over it


class Plot(NamedTuple):
    """A picture and its words: `alt` says what is to be seen, `caption` what to know when reading it."""

    name: str
    png: bytes
    alt: str
    caption: str


def draw(run: Run, other: Run | None = None) -> list[Plot]:
    """The pictures that `run` has data for, in the order of NAMES."""
    runs = [run] if other is None else [run, other]
    with matplotlib.rc_context(STYLE):
        plots = (
            _loss(runs),
            _loss_second_half(runs),
            _multiple_choice(runs),
            _learning_rate(runs),
            _gradient_norm(runs),
            _speed(runs),
        )
        return [plot for plot in plots if plot]


def _loss(runs: list[Run]) -> Plot | None:
    train, validation = (_curve(runs[0], runs, kind, "loss") for kind in ("train", "validation"))
    if not train.steps.size and not validation.steps.size:
        return None
    figure, (axes,) = _figure("Loss", ["nats per token"], runs)
    _draw_losses(axes, runs)
    entropy = _unigram_entropy(runs[0])
    if np.isfinite(entropy):
        axes.axhline(entropy, color=GREY, linestyle="--", linewidth=1.3, label="unigram entropy")
    resumes = [event["step"] for event in runs[0].of_kind("event") if event.get("name") == "resume"]
    for step in resumes:
        axes.axvline(step * _scale(runs[0], runs), color=LIGHT_GREY, linestyle=":", linewidth=1.3)
    curves = [_curve(run, runs, kind, "loss").values for run in runs for kind in ("train", "validation")]
    low, high = _loss_range(curves, entropy)
    axes.set_ylim(low, high)
    _legend(axes, runs)
    alt = [_in_words("Training loss", train, fixed), _in_words("Validation loss", validation, fixed)]
    alt.append(f"The unigram entropy is {fixed(entropy)}." if np.isfinite(entropy) else "")
    caption = ["A point of the training loss is the mean over the steps since the point before.", _median_note(train)]
    caption.append("Dotted: resumed here." if resumes else "")
    caption.append(_outside_note(np.concatenate(curves), high, fixed))
    return _plot("loss", figure, alt, caption)


def _loss_second_half(runs: list[Run]) -> Plot | None:
    """The part where a run is decided, which the fall at the start flattens in the plot of the whole."""
    half = runs[0].last_step * _scale(runs[0], runs) / 2
    train, validation = (_since(_curve(runs[0], runs, kind, "loss"), half) for kind in ("train", "validation"))
    if train.steps.size < 10:
        return None
    figure, (axes,) = _figure("Loss, second half", ["nats per token"], runs)
    _draw_losses(axes, runs, since=half)
    losses = np.concatenate([train.values, validation.values])
    high = 2 * np.quantile(losses, 0.95) - losses.min()  # a spike may not flatten the rest
    if len(runs) == 1 and high < losses.max():
        axes.set_ylim(top=high)
    _legend(axes, runs)
    alt = [_in_words("Training loss", train, fixed), _in_words("Validation loss", validation, fixed)]
    caption = ["The same curves from half-way on.", _median_note(train)]
    caption.append(_outside_note(losses, axes.get_ylim()[1], fixed))
    return _plot("loss_second_half", figure, alt, caption)


def _multiple_choice(runs: list[Run]) -> Plot | None:
    if not _curve(runs[0], runs, "hellaswag", "acc_norm").steps.size:
        return None
    figure, (axes,) = _figure("Multiple choice", ["share of items"], runs)
    for run, color, name in _cast(runs, GREEN, GREY):
        share = _curve(run, runs, "hellaswag", "acc_norm")
        known = np.isfinite(run.series("hellaswag", "acc_norm").values)
        error = np.nan_to_num(run.series("hellaswag", "stderr").values[known]).clip(min=0)
        label = _label("right answers", name)
        axes.errorbar(*share, error, color=color, label=label, marker="o", markersize=4, capsize=2.5, elinewidth=1)
    axes.axhline(CHANCE, color=GREY, linestyle="--", linewidth=1.3, label=f"chance, {CHANCE:.0%}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.margins(y=0.12)
    _legend(axes, runs)
    alt = [_in_words("Share of right answers", _curve(runs[0], runs, "hellaswag", "acc_norm"), percent)]
    measured = ["; ".join(protocols(run)) for run in runs if run.of_kind("hellaswag")]
    caption = [f"What was measured: {measured[0]}."]
    if len(set(measured)) > 1:
        caption.append(f"But in {runs[1].name}: {measured[1]}. So do not compare the two runs by it.")
    caption.append("Bars: one standard error either way.")
    return _plot("multiple_choice", figure, alt, caption)


def _learning_rate(runs: list[Run]) -> Plot | None:
    curve = _curve(runs[0], runs, "train", "lr")
    if not curve.steps.size:
        return None
    figure, (axes,) = _figure("Learning rate", ["learning rate"], runs)
    for run, color, name in _cast(runs, BLUE, LIGHT_GREY):
        theirs = _curve(run, runs, "train", "lr")
        axes.plot(*theirs, color=color, linewidth=1.6, marker=_marker(theirs), label=name)
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax or None)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(runs) > 1:
        _legend(axes, runs)
    return _plot("learning_rate", figure, [_in_words("The learning rate", curve, _short)], [])


def _gradient_norm(runs: list[Run]) -> Plot | None:
    curve = _curve(runs[0], runs, "train", "grad_norm")
    if not curve.steps.size:
        return None
    figure, (axes,) = _figure("Gradient norm", ["global L2 norm"], runs)
    for run, color, name in _cast(runs, BLUE, LIGHT_GREY):
        _draw_noisy(axes, _curve(run, runs, "train", "grad_norm"), color, _label("gradient norm", name))
    clip = number(runs[0].setting("config", "optim", "clip_grad_norm"))
    if np.isfinite(clip):
        axes.axhline(clip, color=GREY, linestyle="--", linewidth=1.3, label=f"clipped above {clip:g}")
    positive = curve.values[curve.values > 0]
    if positive.size and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend(axes, runs)
    return _plot("gradient_norm", figure, [_in_words("The gradient norm", curve, _short)], [_median_note(curve)])


def _speed(runs: list[Run]) -> Plot | None:
    quantities = [("step_ms", "ms per step"), ("tokens_per_second", "tokens per s")]
    shown = [(key, unit) for key, unit in quantities if _curve(runs[0], runs, "train", key).steps.size]
    if not shown:
        return None
    figure, panels = _figure("Speed", [unit for _, unit in shown], runs)
    alt, caption = [], []
    for axes, (key, unit) in zip(panels, shown, strict=True):
        for run, color, name in _cast(runs, BLUE, LIGHT_GREY):
            _draw_noisy(axes, _curve(run, runs, "train", key), color, name)
        values = np.concatenate([_curve(run, runs, "train", key).values for run in runs])
        high = 1.15 * values[values <= 2.5 * np.median(values)].max(
            initial=0.0
        )  # one slow step would flatten all others
        axes.set_ylim(0, high if high > 0 else None)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        curve = _curve(runs[0], runs, "train", key)
        alt.append(f"Median {np.median(curve.values):,.0f} {unit}.")
        caption.append(_outside_note(values, high, lambda value: f"{value:,.0f}", f" {unit}"))
    if len(runs) > 1:
        panels[0].legend(loc="lower right", reverse=True)
    return _plot("speed", figure, alt, [*dict.fromkeys(caption)])


def _figure(title: str, units: list[str], runs: list[Run]) -> tuple[Figure, list[Axes]]:
    """A figure with one panel for each unit, one above the other, over a common x axis."""
    figure = new_figure()
    panels = list(figure.subplots(len(units), 1, sharex=True, squeeze=False)[:, 0])
    panels[0].set_title(title)
    for axes, unit in zip(panels, units, strict=True):
        axes.set_ylabel(unit)
    bottom = panels[-1]
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=not _by_tokens(runs), min_n_ticks=1))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    bottom.set_xlabel("millions of tokens" if _by_tokens(runs) else "step")
    return figure, panels


def _by_tokens(runs: list[Run]) -> bool:
    """Whether tokens, not steps, put the runs on the same footing: where their batches differ in size."""
    sizes = [run.tokens_per_step for run in runs]
    return None not in sizes and max(sizes) > 1.001 * min(sizes)  # type: ignore[type-var, operator]


def _scale(run: Run, runs: list[Run]) -> float:
    """What a step counts on the x axis."""
    return run.tokens_per_step / 1e6 if run.tokens_per_step and _by_tokens(runs) else 1.0


def _curve(run: Run, runs: list[Run], kind: str, key: str) -> Series:
    """The finite values of a quantity at their places on the x axis."""
    steps, values = run.series(kind, key).finite()
    return Series(steps * _scale(run, runs), values)


def _since(curve: Series, start: float) -> Series:
    late = curve.steps >= start
    return Series(curve.steps[late], curve.values[late])


def _cast(runs: list[Run], color: str, other_color: str) -> list[tuple[Run, str, str]]:
    """The runs with their colors and names, "" for one alone; the one compared with first, so that it lies behind."""
    if len(runs) == 1:
        return [(runs[0], color, "")]
    return [(runs[1], other_color, plain(runs[1].name, 24)), (runs[0], color, plain(runs[0].name, 24))]


def _label(what: str, name: str) -> str:
    return f"{what}, {name}" if name else what


def _legend(axes: Axes, runs: list[Run]) -> None:
    axes.legend(loc="best", reverse=len(runs) > 1)  # the run itself, drawn last, is named first


def _draw_losses(axes: Axes, runs: list[Run], since: float = 0.0) -> None:
    for run, color, name in _cast(runs, BLUE, LIGHT_GREY):
        _draw_noisy(axes, _since(_curve(run, runs, "train", "loss"), since), color, _label("training", name))
    for run, color, name in _cast(runs, ORANGE, GREY):
        curve = _since(_curve(run, runs, "validation", "loss"), since)
        if curve.steps.size:
            label = _label("validation", name)
            axes.plot(*curve, color=color, linewidth=1.6, label=label, marker=_marker(curve), zorder=3)


def _draw_noisy(axes: Axes, curve: Series, color: str, label: str) -> None:
    if not curve.steps.size:
        return
    if curve.steps.size < MANY_POINTS:
        axes.plot(*curve, color=color, linewidth=1.6, label=label, marker=_marker(curve))
        return
    axes.plot(*curve, color=color, linewidth=0.6, alpha=0.3)
    axes.plot(curve.steps, _running_median(curve.values), color=color, linewidth=1.6, label=label)


def _marker(curve: Series) -> str:
    return "." if curve.steps.size < 30 else ""


def _window(points: int) -> int:
    return points // 100 * 2 + 1


def _running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median over a centred window; a mean would smear one slow step or spike over all of it."""
    padded = np.pad(values, _window(values.size) // 2, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, _window(values.size)), axis=1)


def _loss_range(curves: list[NDArray[np.float64]], entropy: float) -> tuple[float, float]:
    """Limits that show the course of a run: neither its first steps nor a diverging end may flatten the rest."""
    losses = np.concatenate(curves)
    start = max(values[0] for values in curves if values.size)
    usual = np.quantile(losses, 0.95 if losses.size >= 100 else 1.0)
    low, high = np.nanmin([entropy, losses.min()]), np.nanmax([entropy, min(usual, start)])
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def _unigram_entropy(run: Run) -> float:
    values = run.series("validation", "unigram_entropy").finite().values
    return float(values[-1]) if values.size else np.nan


def _short(value: float) -> str:
    return f"{value:.4g}"


def _median_note(curve: Series) -> str:
    if curve.steps.size < MANY_POINTS:
        return ""
    return f"The bold line is the running median over {_window(curve.steps.size)} points."


def _outside_note(values: NDArray[np.float64], high: float, words: Words, unit: str = "") -> str:
    above = values[values > high]
    if not above.size:
        return ""
    return f"Above the frame: {above.size:,} of {values.size:,} points, the highest {words(above.max())}{unit}."


def _in_words(what: str, curve: Series, words: Words) -> str:
    if not curve.steps.size:
        return ""
    if curve.steps.size == 1:
        return f"{what}: {words(curve.values[0])}."
    return (
        f"{what} goes from {words(curve.values[0])} to {words(curve.values[-1])}, "
        f"between {words(curve.values.min())} and {words(curve.values.max())}."
    )


def _plot(name: str, figure: Figure, alt: list[str], caption: list[str]) -> Plot:
    title = figure.axes[0].get_title(loc="left")
    words = [" ".join(sentence for sentence in sentences if sentence) for sentences in (alt, caption)]
    return Plot(name, as_png(figure), f"{title}, line chart. {words[0]}", words[1])
