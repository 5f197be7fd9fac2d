"""The report in words: numbers as people read them, the key figures, and the summary of a run.

Everything here is plain text; the page escapes it.
"""

import math
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np

from src.model_assessment.report_data import Record, Run, is_running, last_written, number

CHANCE = 0.25  # of guessing right: every multiple-choice item has four endings


class KeyFigure(NamedTuple):
    """One number worth a tile: what it is, its value with unit, and a few words of context."""

    label: str
    value: str
    note: str


def summary(run: Run, now: float) -> str:
    """What was trained, on what, for how long, how it ended and how good it became, in a few sentences.

    `now`: when the reader reads it, as Unix time.
    """
    sentences = (_model_and_data(run), _effort(run), _ending(run, now), _validation(run), _multiple_choice(run))
    return " ".join(sentence for sentence in (*sentences, _trouble(run)) if sentence)


def key_figures(run: Run) -> list[KeyFigure]:
    """The figures to compare runs by, those that the run has."""
    figures = []
    validations = run.of_kind("validation")
    if validations:
        last, best = validations[-1], _best(validations)
        lowest = f"lowest: {best['loss']:.3f} at step {best['step']:,}" if best else ""
        error = f"± {fixed(last.get('stderr'))}; " if fixed(last.get("stderr")) else ""
        note = error + ("the lowest" if best is last else lowest)
        figures = [
            KeyFigure("Validation loss", fixed(last.get("loss")) or "not finite", note.removesuffix("; ")),
            KeyFigure("Perplexity", perplexity(last.get("perplexity")), "on validation text"),
            KeyFigure("Bits per byte", fixed(last.get("bits_per_byte")), "on validation text"),
        ]
    choices = run.of_kind("hellaswag")
    if choices:
        note = f"± {percent(choices[-1].get('stderr'))}; chance is {CHANCE:.0%}"
        figures.append(KeyFigure("Multiple choice", percent(choices[-1].get("acc_norm")), note))
    progress = f"of {run.total_steps:,} steps" if run.total_steps else "steps"
    figures.append(KeyFigure("Progress", f"{run.last_step:,}", progress))
    seen = run.series("train", "tokens_seen").finite().values
    if seen.size:
        figures.append(KeyFigure("Tokens seen", compact(seen[-1]), f"{compact(run.tokens_per_step)} a step"))
    if run.active_seconds:
        figures.append(KeyFigure("Time", duration(run.active_seconds), "without pauses"))
    figures += _speed_figures(run)
    return [figure for figure in figures if figure.value]


def fixed(value: Any) -> str:
    """Three decimals, as losses are read; empty where there is no number."""
    return f"{number(value):.3f}" if math.isfinite(number(value)) else ""


def perplexity(value: Any) -> str:
    """One decimal below a thousand, whole above; empty where there is no number."""
    found = number(value)
    return "" if math.isnan(found) else f"{found:,.1f}" if found < 1_000 else f"{found:,.0f}"


def percent(share: Any) -> str:
    """A share of 0 to 1 in percent, with one decimal; empty where there is no number."""
    return f"{number(share):.1%}" if math.isfinite(number(share)) else ""


def compact(value: Any) -> str:
    """A count; from a million on in three or four digits, such as 320.1M; empty where there is no number."""
    found = number(value)
    if math.isnan(found):
        return ""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if found >= size:
            return f"{found / size:.{1 if found >= 10 * size else 2}f}{letter}"
    return f"{found:,.0f}"


def duration(seconds: float) -> str:
    """The two largest units, such as 8 h 47 min."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def moment(seconds: Any) -> str:
    """A Unix time as date and time of day in UTC; empty where it is none."""
    try:
        return datetime.fromtimestamp(number(seconds), timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return ""


def protocols(run: Run) -> list[str]:
    """What the multiple-choice test measured, in the run's own words; several if that changed on the way."""
    return list(dict.fromkeys(str(record.get("protocol") or "not recorded") for record in run.of_kind("hellaswag")))


def _speed_figures(run: Run) -> list[KeyFigure]:
    """Medians: the first steps compile, and a machine has its moments."""
    figures = []
    for label, key, words, note in (
        ("Throughput", "tokens_per_second", lambda value: f"{value:,.0f}", "tokens a second, median"),
        ("Utilisation", "mfu", percent, "of the hardware's peak, median"),
    ):
        values = run.series("train", key).finite().values
        if values.size:
            figures.append(KeyFigure(label, words(float(np.median(values))), note))
    memory = run.series("train", "memory_gb").finite().values
    if memory.size and memory.max() > 0:
        figures.append(KeyFigure("Peak memory", f"{memory.max():.1f} GB", "of one process"))
    return figures


def _best(validations: list[Record]) -> Record | None:
    measured = [record for record in validations if math.isfinite(number(record.get("loss")))]
    return min(measured, key=lambda record: record["loss"], default=None)


def _model_and_data(run: Run) -> str:
    parameters = compact(run.setting("derived", "parameters"))
    rest = compact(run.setting("derived", "parameters_without_embedding"))
    size = f" with {parameters} parameters" if parameters else ""
    size += f" ({rest} of them outside the embedding)" if parameters and rest else ""
    data = run.setting("dataset", "name") or run.setting("config", "data", "dir")
    on = f" on {data}" if data else ""
    sources = run.setting("dataset", "sources")
    names = (entry.get("name") for entry in sources if isinstance(entry, dict)) if isinstance(sources, list) else ()
    source = " and ".join(dict.fromkeys(map(str, names)))
    documents, tokens = (compact(run.setting("dataset", key)) for key in ("documents", "tokens"))
    facts = [
        f"source {source}" if source and source != data else "",
        f"{documents} documents" if documents else "",
        f"{tokens} tokens" if tokens else "",
    ]
    known = ", ".join(fact for fact in facts if fact)
    return f"{run.name} is a language model{size}, trained from scratch{on}{f' ({known})' if data and known else ''}."


def _effort(run: Run) -> str:
    steps = f"{run.last_step:,} step{'' if run.last_step == 1 else 's'}"
    seen = run.series("train", "tokens_seen").finite().values
    tokens = f" on {compact(seen[-1])} tokens" if seen.size else ""
    machine = run.setting("machine", "gpu") or run.setting("machine", "cpu")
    where = f" on {machine}" if isinstance(machine, str) else ""
    processes = number(run.setting("derived", "world_size"))
    where += f" in {processes:.0f} processes" if processes > 1 else ""
    time = f", which took {duration(run.active_seconds)}" if run.active_seconds else ""
    return f"It has trained for {steps}{tokens}{time}{where}."


def _ending(run: Run, now: float) -> str:
    state = run.status.get("state")
    at = f"at step {run.last_step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
    said = f": {run.status['message']}".rstrip(".") if run.status.get("message") else ""
    code = run.status.get("exit_code")
    if state == "done":
        return "The run is complete."
    if state == "running" and is_running(run, now):
        return f"The run was going on, {at}, when this page was made."
    if state == "running":
        wrote = last_written(run)
        since = f" since {moment(wrote)}, {duration(now - wrote)} before this page was made" if moment(wrote) else ""
        return f"The run says that it is going on, {at}, but has written nothing{since}: it may have been killed."
    if state == "stopped":
        return f"The run was stopped {at}{said}."
    if state == "failed":
        return f"The run failed {at}{f' with exit code {code}' if code is not None else ''}{said}."
    return f"How the run ended is not recorded; its last line is {at}."


def _validation(run: Run) -> str:
    validations = run.of_kind("validation")
    best = _best(validations)
    if not best:
        return "There is no validation loss." if not validations else "No validation loss was a finite number."
    first, last = validations[0], validations[-1]
    if not fixed(last.get("loss")):
        return (
            f"The last validation loss, at step {last['step']:,}, is not a finite number; "
            f"the lowest was {fixed(best['loss'])} nats a token at step {best['step']:,}."
        )
    start = f" after {fixed(first.get('loss'))} at step {first['step']:,}" if first is not last else ""
    also = [
        f"a perplexity of {perplexity(last.get('perplexity'))}" if perplexity(last.get("perplexity")) else "",
        f"{fixed(last.get('bits_per_byte'))} bits per byte" if fixed(last.get("bits_per_byte")) else "",
    ]
    meaning = " and ".join(words for words in also if words)
    text = f"Its validation loss is {fixed(last['loss'])} nats a token{f' ({meaning})' if meaning else ''}{start}"
    if best is not last:
        text += f"; the lowest was {fixed(best['loss'])} at step {best['step']:,}"
    return f"{text}. {_against_unigram(last)}".strip()


def _against_unigram(validation: Record) -> str:
    entropy = number(validation.get("unigram_entropy"))
    if math.isnan(entropy):
        return ""
    margin = entropy - validation["loss"]
    verdict = f"the model is {margin:.3f} nats better" if margin > 0 else "the model does not beat that yet"
    return f"Knowing only how often each token occurs would give {entropy:.3f} (the unigram entropy); {verdict}."


def _multiple_choice(run: Run) -> str:
    choices = run.of_kind("hellaswag")
    if not choices or not percent(choices[-1].get("acc_norm")):
        return ""
    last = choices[-1]
    share, stderr = number(last["acc_norm"]), number(last.get("stderr"))
    spread = f" ± {percent(stderr)}" if math.isfinite(stderr) else ""
    of = f" of {compact(last.get('total'))} items" if compact(last.get("total")) else ""
    text = f"In multiple choice it picked the right one of four endings in {percent(share)}{spread}{of}"
    text += f", where guessing gives {CHANCE:.0%}"
    if abs(share - CHANCE) < 2 * stderr:
        text += " (a difference within two standard errors)"
    return f"{text}; what was measured: {protocols(run)[-1].rstrip('.')}."


def _trouble(run: Run) -> str:
    losses = run.series("train", "loss").values
    bad = int(np.count_nonzero(~np.isfinite(losses)))
    skipped = sum("skip" in str(event.get("name")) for event in run.of_kind("event"))
    resumed = sum(event.get("name") == "resume" for event in run.of_kind("event"))
    found = [
        f"it was resumed {_times(resumed)}" if resumed else "",
        f"steps were skipped {_times(skipped)}" if skipped else "",
        f"the training loss was not a finite number in {bad} of {losses.size} lines" if bad else "",
        f"{run.unreadable_lines} lines of metrics.jsonl could not be read" if run.unreadable_lines else "",
    ]
    words = "; ".join(part for part in found if part)
    return f"To note: {words}." if words else ""


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
