"""The report's pictures: each shows one thing of a run, with another in grey behind it, or of several runs."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from src.model_assessment.report_axes import (
    Plot,
    Shown,
    draw_level,
    figure_of,
    in_words,
    label,
    legend,
    mark,
    outside_note,
    plot,
)
from src.model_assessment.report_data import Run, number, skipped_steps, spikes
from src.model_assessment.report_text import CHANCE, fixed, percent, protocols
from src.utils.plot_style import BLUE, GREEN, GREY, LIGHT_GREY, ORANGE, STYLE

NAMES = (*("loss", "loss_second_half", "multiple_choice", "learning_rate", "gradient_norm", "speed", "memory"),)
RED, PURPLE = "#a3341a", "#7a3b8f"  # skipped steps, and spikes


def draw(shown: Shown) -> list[Plot]:
    """The pictures that the first run has data for, in the order of NAMES."""
    with matplotlib.rc_context(STYLE):
        plots = (
            _loss(shown),
            _loss_second_half(shown),
            _multiple_choice(shown),
            _learning_rate(shown),
            _gradient_norm(shown),
            _speed(shown.alone()),  # a background's is another machine's
            _memory(shown.alone()),
        )
        return [each for each in plots if each]


def _loss(shown: Shown) -> Plot | None:
    run = shown.runs[0]
    train, validation = (shown.curve(run, kind, "loss") for kind in ("train", "validation"))
    if not train.steps.size and not validation.steps.size:
        return None
    figure, (axes,) = figure_of("Loss", ["nats per token"], shown)
    _draw_losses(axes, shown)
    entropy = _unigram_entropy(run)
    draw_level(axes, entropy, "unigram entropy")
    curves = [shown.curve(each, kind, "loss").values for each in shown.all for kind in ("train", "validation")]
    low, high = _loss_range(curves, entropy)
    axes.set_ylim(low, high)
    marks = _mark_trouble(axes, shown, high) if len(shown.runs) == 1 else []
    legend(axes, shown)
    alt = [in_words("Training loss", train, fixed), in_words("Validation loss", validation, fixed)]
    alt.append(f"The unigram entropy is {fixed(entropy)}." if np.isfinite(entropy) else "")
    caption = [
        "A point of the training loss is the mean over the steps since the point before.",
        shown.median_note(train),
    ]
    caption += [_solid_and_dashed(shown), _beside_background(shown), *marks]
    caption.append(outside_note(np.concatenate(curves), high, fixed))
    return plot("loss", figure, alt, caption)


def _mark_trouble(axes: Axes, shown: Shown, high: float) -> list[str]:
    """Resumes, skipped steps and spikes, drawn, and said in words."""
    run, words = shown.runs[0], []
    resumes = [event["step"] for event in run.of_kind("event") if event.get("name") == "resume"]
    for step in resumes:
        axes.axvline(step * shown.scale(run), color=LIGHT_GREY, linestyle=":", linewidth=1.3)
    if resumes:
        words.append("Dotted: resumed here.")
    if skipped := skipped_steps(run):
        places = np.array(skipped) * shown.scale(run)
        bottom = axes.get_xaxis_transform()
        marks: dict[str, Any] = {"marker": "x", "color": RED, "linestyle": "", "clip_on": False, "zorder": 4}
        axes.plot(places, np.full(places.size, 0.02), transform=bottom, label="skipped step", **marks)
        words.append(f"Skipped steps: {len(skipped):,}, the last of them {skipped[-1]:,}.")
    found = spikes(run)
    if found.steps.size:
        heights = np.minimum(found.values, high)
        look: dict[str, Any] = {"marker": "v", "markerfacecolor": "none", "color": PURPLE, "linestyle": "", "zorder": 4}
        axes.plot(found.steps * shown.scale(run), heights, label="spike", **look)
        last = f"step {found.steps[-1]:,.0f}: {fixed(found.values[-1])}"
        words.append(f"Spikes, far above the lines before: {found.steps.size:,}, the last at {last}.")
    return words


def _loss_second_half(shown: Shown) -> Plot | None:
    """The part where a run is decided, which the fall at the start flattens in the plot of the whole."""
    run = shown.runs[0]
    half = run.last_step * shown.scale(run) / 2
    train, validation = (shown.curve(run, kind, "loss", half) for kind in ("train", "validation"))
    if train.steps.size < 10:
        return None
    figure, (axes,) = figure_of("Loss, second half", ["nats per token"], shown)
    _draw_losses(axes, shown, since=half)
    losses = np.concatenate([train.values, validation.values])
    high = 2 * np.quantile(losses, 0.95) - losses.min()  # a spike may not flatten the rest
    if len(shown.runs) == 1 and high < losses.max():
        axes.set_ylim(top=high)
    legend(axes, shown)
    alt = [in_words("Training loss", train, fixed), in_words("Validation loss", validation, fixed)]
    caption = ["The same curves from half-way on.", shown.median_note(train)]
    caption.append(outside_note(losses, axes.get_ylim()[1], fixed))
    return plot("loss_second_half", figure, alt, caption)


def _draw_losses(axes: Axes, shown: Shown, since: float = 0.0) -> None:
    several = len(shown.runs) > 1
    for look in shown.looks(BLUE):
        curve = shown.curve(look.run, "train", "loss", since)
        shown.draw_noisy(axes, curve, look.color, look.name if several else label("training", look.name))
    for look in shown.looks(ORANGE, GREY):
        curve = shown.curve(look.run, "validation", "loss", since)
        if not curve.steps.size:
            continue
        if several:
            training = shown.curve(look.run, "train", "loss", since).steps.size
            name = "" if training else look.name
            every = max(1, curve.steps.size // 10)
            marks: dict[str, Any] = {
                "marker": look.marker,
                "markersize": 4.5,
                "markevery": every,
                "linestyle": (0, (4, 2)),
            }
            axes.plot(*curve, color=look.color, linewidth=1.2, zorder=3, label=name or None, **marks)
        else:
            name = label("validation", look.name)
            axes.plot(*curve, color=look.color, linewidth=1.6, label=name, marker=mark(curve), zorder=3)


def _solid_and_dashed(shown: Shown) -> str:
    return "Solid: training; dashed, with marks: validation." if len(shown.runs) > 1 else ""


def _beside_background(shown: Shown) -> str:
    """The last validation loss, and the background's at the same place."""
    if not shown.background:
        return ""
    mine, others = (shown.curve(run, "validation", "loss", whole=True) for run in (shown.runs[0], shown.background))
    grey = f"Grey: {shown.background.name}{shown.background.remark}."
    if not mine.steps.size or not others.steps.size or not others.steps[0] <= mine.steps[-1] <= others.steps[-1]:
        return grey
    there = float(np.interp(mine.steps[-1], others.steps, others.values))
    at = f"{mine.steps[-1]:,.4g} million tokens" if shown.by_tokens else f"step {mine.steps[-1]:,.0f}"
    difference = float(mine.values[-1]) - there
    return f"{grey} At {at} its validation loss was {there:.3f}, this run's {mine.values[-1]:.3f} ({difference:+.3f})."


def _multiple_choice(shown: Shown) -> Plot | None:
    run = shown.runs[0]
    if not shown.curve(run, "hellaswag", "acc_norm").steps.size:
        return None
    if shown.background and not set(protocols(shown.background)) <= set(protocols(run)):
        shown = shown.alone()  # another test
    figure, (axes,) = figure_of("Multiple choice", ["share of items"], shown)
    for look in shown.looks(GREEN, GREY):
        share = shown.curve(look.run, "hellaswag", "acc_norm")
        if not share.steps.size:
            continue
        known = look.run.series("hellaswag", "acc_norm").finite().steps[: share.steps.size]
        errors = dict(zip(*look.run.series("hellaswag", "stderr"), strict=True))
        error = np.nan_to_num([errors[step] for step in known]).clip(min=0)
        style: dict[str, Any] = {"marker": look.marker or "o", "markersize": 4, "capsize": 2.5, "elinewidth": 1}
        axes.errorbar(*share, error, color=look.color, label=label("right answers", look.name), **style)
    draw_level(axes, CHANCE, f"chance, {CHANCE:.0%}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.margins(y=0.12)
    legend(axes, shown)
    alt = [in_words("Share of right answers", shown.curve(run, "hellaswag", "acc_norm"), percent)]
    caption = [f"What was measured: {'; '.join(protocols(run))}."]
    for other in shown.runs[1:]:
        measured = protocols(other)
        if measured and measured != protocols(run):
            caption.append(f"But in {other.name}: {'; '.join(measured)}. So do not compare the two runs by it.")
    caption.append("Bars: one standard error either way.")
    return plot("multiple_choice", figure, alt, caption)


def _learning_rate(shown: Shown) -> Plot | None:
    curve = shown.curve(shown.runs[0], "train", "lr")
    if not curve.steps.size:
        return None
    figure, (axes,) = figure_of("Learning rate", ["learning rate"], shown)
    for look in shown.looks(BLUE):
        theirs = shown.curve(look.run, "train", "lr")
        axes.plot(*theirs, color=look.color, linewidth=1.6, marker=mark(theirs), label=look.name or "this run")
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax or None)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(shown.all) > 1:
        legend(axes, shown)
    return plot("learning_rate", figure, [in_words("The learning rate", curve, _short)], [])


def _gradient_norm(shown: Shown) -> Plot | None:
    run = shown.runs[0]
    curve = shown.curve(run, "train", "grad_norm")
    if not curve.steps.size:
        return None
    figure, (axes,) = figure_of("Gradient norm", ["global L2 norm"], shown)
    for look in shown.looks(BLUE):
        shown.draw_noisy(
            axes, shown.curve(look.run, "train", "grad_norm"), look.color, label("gradient norm", look.name)
        )
    clip = number(run.setting("config", "optim", "clip_grad_norm"))
    draw_level(axes, clip, f"clipped above {clip:g}")
    positive = curve.values[curve.values > 0]
    if positive.size and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    legend(axes, shown)
    return plot("gradient_norm", figure, [in_words("The gradient norm", curve, _short)], [shown.median_note(curve)])


def _speed(shown: Shown) -> Plot | None:
    quantities = [("step_ms", "ms per step"), ("tokens_per_second", "tokens per s")]
    panels = [(key, unit) for key, unit in quantities if shown.curve(shown.runs[0], "train", key).steps.size]
    if not panels:
        return None
    figure, all_axes = figure_of("Speed", [unit for _, unit in panels], shown)
    alt, caption = [], []
    for axes, (key, unit) in zip(all_axes, panels, strict=True):
        for look in shown.looks(BLUE):
            shown.draw_noisy(axes, shown.curve(look.run, "train", key), look.color, look.name)
        values = np.concatenate([shown.curve(run, "train", key).values for run in shown.runs])
        usual = values[values <= 2.5 * np.median(values)]  # one slow step would flatten all others
        high = 1.15 * usual.max(initial=0.0)
        axes.set_ylim(0, high if high > 0 else None)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        curve = shown.curve(shown.runs[0], "train", key)
        alt.append(f"Median {np.median(curve.values):,.0f} {unit}.")
        caption.append(outside_note(values, high, lambda value: f"{value:,.0f}", f" {unit}"))
    if len(shown.runs) > 1:
        all_axes[0].legend(loc="lower right", reverse=True)
    return plot("speed", figure, alt, [*dict.fromkeys(caption)])


def _memory(shown: Shown) -> Plot | None:
    curve = shown.curve(shown.runs[0], "train", "memory_gb")
    if not curve.steps.size or curve.values.max() <= 0:
        return None
    figure, (axes,) = figure_of("Memory", ["GB of one process"], shown)
    for look in shown.looks(BLUE):
        theirs = shown.curve(look.run, "train", "memory_gb")
        axes.plot(*theirs, color=look.color, linewidth=1.6, marker=mark(theirs), label=look.name)
    axes.set_ylim(0, 1.15 * axes.dataLim.ymax)
    if len(shown.runs) > 1:
        axes.legend(loc="lower right", reverse=True)
    words = in_words("The memory in use", curve, lambda value: f"{value:.1f} GB")
    return plot("memory", figure, [words], ["The most in use so far, on a GPU as PyTorch counts it."])


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
