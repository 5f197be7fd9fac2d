"""The parts of a run's page, from top to bottom, each as HTML; "" for what the run has nothing of."""

import math
from collections.abc import Sequence

from src.model_assessment import report_text
from src.model_assessment.report_data import Record, Run, is_running, last_written, number, seconds_left
from src.model_assessment.report_html import flat, safe, table, words

MAX_EVENTS = 100  # in the table; of more, the first and the last are shown
MAX_CHECKPOINTS = 10  # the last ones
MAX_SAMPLED_STEPS = 100  # of those between the first and the last; of more, evenly chosen ones


def state(run: Run, now: float) -> str:
    """How the run is, and from when to when it wrote."""
    said = str(run.status.get("state") or "state unknown")
    if said == "running" and not is_running(run, now):
        said = "silent"
    times = [time for record in run.records if math.isfinite(time := number(record.get("time")))]
    # not the first and the last line: a clock may have been set back between them
    ends = [report_text.moment(time) for time in (min(times), max(times))] if times else []
    spans = (f'<span class="number">{end}</span>' for end in dict.fromkeys(ends))
    between = " · " + " to ".join(spans) if ends and all(ends) else ""
    return f'<p class="state"><b class="{safe(said)}">{safe(said)}</b>{between}</p>'


def progress(run: Run, now: float) -> str:
    """Where a run is that is not done, as a bar, and while it goes on when it will be done."""
    if not run.total_steps or run.status.get("state") == "done":
        return ""
    share = min(1.0, run.last_step / run.total_steps)
    facts = [f"step {run.last_step:,} of {run.total_steps:,}", f"{share:.1%}"]
    left = seconds_left(run)
    if is_running(run, now):
        if math.isfinite(left):
            end = last_written(run) + left
            facts += [f"{report_text.duration(max(0.0, end - now))} left", f"done about {report_text.moment(end)}"]
        facts.append(f"last written {report_text.moment(last_written(run))}")
    items = "".join(f"<li>{safe(fact)}</li>" for fact in facts)
    bar = (
        f'<div class="bar" role="progressbar" aria-label="steps" aria-valuemin="0" aria-valuemax="{run.total_steps}" '
        f'aria-valuenow="{run.last_step}"><i style="width: {100 * share:.2f}%"></i></div>'
    )
    return f'<div class="progress">{bar}<ul>{items}</ul></div>'


def tiles(run: Run) -> str:
    found = (
        f'<div><dt>{safe(figure.label)}</dt><dd class="value">{safe(figure.value)}</dd>'
        f'<dd class="note">{safe(figure.note)}</dd></div>'
        for figure in report_text.key_figures(run)
    )
    return '<h2>Key figures</h2>\n<dl class="tiles">\n' + "\n".join(found) + "\n</dl>"


def samples(run: Run) -> str:
    """What the model wrote over time: the first and the last side by side by prompt, what lies between folded away."""
    written = run.of_kind("sample")
    if not written:
        return ""
    steps = sorted({sample["step"] for sample in written})
    by_step = {step: [sample for sample in written if sample["step"] == step] for step in steps}
    ends = [*dict.fromkeys((steps[0], steps[-1]))]
    page = "<h2>Samples</h2>\n<p>How the model continued each prompt.</p>\n"
    page += sample_table([(f"step {step:,}", by_step[step]) for step in ends])
    between = steps[1:-1]
    if not between:
        return page
    stride = math.ceil(len(between) / MAX_SAMPLED_STEPS)
    chosen = between[::stride]
    which = f"{len(between):,} step{'' if len(between) == 1 else 's'} between"
    which += f", every {stride}th of them" if stride > 1 else ""
    folded = (
        f"<details><summary>step {step:,}</summary>{sample_table([(f'step {step:,}', by_step[step])])}</details>"
        for step in chosen
    )
    return page + f'\n<details class="between"><summary>{which}</summary>\n' + "\n".join(folded) + "\n</details>"


def sample_table(columns: Sequence[tuple[str, list[Record]]]) -> str:
    """Prompts down, and across what each of `columns`, a name with its samples, has for them."""
    rows = []
    prompts = dict.fromkeys(str(sample.get("prompt", "")) for _, found in columns for sample in found)
    for prompt in prompts:
        cells = (
            f'<td data-step="{safe(name)}">'
            f"{_continuations(prompt, [each for each in found if str(each.get('prompt', '')) == prompt])}</td>"
            for name, found in columns
        )
        rows.append(f'<tr><th scope="row" dir="auto">{safe(prompt)}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{safe(name)}</th>' for name in ("prompt", *(name for name, _ in columns)))
    return f'<table class="samples"><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(rows) + "\n</tbody></table>"


def _continuations(prompt: str, found: list[Record]) -> str:
    texts = dict.fromkeys(str(sample.get("text", "")).removeprefix(prompt) for sample in found)
    return "".join(f'<p dir="auto">{safe(text.strip())}</p>' for text in texts) or "—"


def events(run: Run) -> str:
    """What happened besides training."""
    rows = [
        (report_text.moment(e.get("time")), f"{e['step']:,}", str(e.get("name", "")), words(e.get("detail", "")))
        for e in run.of_kind("event")
    ]
    if len(rows) > MAX_EVENTS:
        half = MAX_EVENTS // 2
        rows = [*rows[:half], ("", "", "…", f"{len(rows) - 2 * half:,} more"), *rows[-half:]]
    return "<h2>Events</h2>\n" + table(("time", "step", "event", "detail"), rows, numbers=2) if rows else ""


def checkpoints(run: Run) -> str:
    """What was saved, the last ones first."""
    saved = run.of_kind("checkpoint")
    if not saved:
        return ""
    count = "One checkpoint was" if len(saved) == 1 else f"{len(saved):,} checkpoints were"
    shown = f"; these are the last {MAX_CHECKPOINTS}" if len(saved) > MAX_CHECKPOINTS else ""
    rows = [
        [
            *(f"{each['step']:,}", report_text.moment(each.get("time")), _megabytes(each)),
            *(_seconds(each, "seconds"), _seconds(each, "held_up_seconds"), str(each.get("path") or "")),
        ]
        for each in saved[: -MAX_CHECKPOINTS - 1 : -1]
    ]
    head = ("step", "time", "size", "saved in", "training waited", "place in the run's folder")
    note = f"<p>{count} saved{shown}. Only the newest are kept, and those that the settings name.</p>\n"
    return f"<h2>Checkpoints</h2>\n{note}" + table(head, rows, numbers=5)


def _megabytes(checkpoint: Record) -> str:
    size = number(checkpoint.get("bytes"))
    return f"{size / 1e6:,.1f} MB" if size > 0 else "—"


def _seconds(checkpoint: Record, key: str) -> str:
    seconds = number(checkpoint.get(key))
    return f"{seconds:.1f} s" if seconds >= 0 else "—"


def settings(run: Run) -> str:
    """All of config.json: a table for each group, the first for what stands alone."""
    config = run.settings.get("config")
    entries = {**(config if isinstance(config, dict) else {}), **run.settings}
    if isinstance(config, dict):
        del entries["config"]  # its groups stand beside the others
    alone = {name: value for name, value in entries.items() if not isinstance(value, dict)}
    groups = {"run": alone, **{name: value for name, value in entries.items() if isinstance(value, dict)}}
    tables = [_setting_table(name, flat(group)) for name, group in groups.items() if group]
    if not tables:
        return ""
    return '<h2>Settings, machine and data</h2>\n<div class="settings">\n' + "\n".join(tables) + "\n</div>"


def _setting_table(name: str, values: dict[str, str]) -> str:
    rows = (f'<tr><th scope="row">{safe(key)}</th><td>{safe(value)}</td></tr>' for key, value in values.items())
    return f"<table><caption>{safe(name)}</caption><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
