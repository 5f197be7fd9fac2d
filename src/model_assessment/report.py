"""The report on a run: one page for a person who wasn't there, made from the run directory alone.

    python -m src.model_assessment.report RUN_DIR [--compare RUN_DIR]

RUN_DIR is a path, or the name of a run under temp_data/runs. The page, report.html, holds its own
pictures, which are also written to plots/. Every figure on it comes from the run's files.
"""

import argparse
import base64
import html
import json
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from src.model_assessment import report_plots, report_text
from src.model_assessment.report_data import Record, Run, number, read_run
from src.model_assessment.report_plots import Plot
from src.utils import root
from src.utils.errors import StorageError, exit_with

MAX_EVENTS = 100  # in the table; of more, the first and the last are shown
MAX_VALUE_CHARACTERS = 400  # of one setting

# Control characters, halves of surrogate pairs, and the marks that reverse the direction of writing.
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write_report(run_dir: Path, compare: Path | None = None) -> Path:
    """Writes report.html and plots/*.png into `run_dir` and returns the page's path.

    Raises UserError where a directory is missing or has no metrics, StorageError where one can't be written.
    """
    run = read_run(run_dir)
    other = read_run(compare) if compare else None
    plots = report_plots.draw(run, other)
    page = run_dir / "report.html"
    try:
        (run_dir / "plots").mkdir(exist_ok=True)
        for name in report_plots.NAMES:  # pictures of an earlier report too, which this one may not have
            (run_dir / "plots" / f"{name}.png").unlink(missing_ok=True)
        for plot in plots:
            (run_dir / "plots" / f"{plot.name}.png").write_bytes(plot.png)
        # Whoever has the page open while a run goes on never finds half of it.
        unfinished = page.with_name("report.html.tmp")
        unfinished.write_text(_page(run, other, plots), encoding="utf-8")
        os.replace(unfinished, page)
    except OSError as error:
        raise StorageError(f"could not write the report to {run_dir}: {error.strerror or error}") from error
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_assessment.report", description="Write the report on a run, report.html and plots/."
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a path, or the name of a run under temp_data/runs")
    parser.add_argument("--compare", metavar="RUN_DIR", help="another run, drawn in grey beside this one")
    arguments = parser.parse_args()
    page = write_report(root.run_dir(arguments.run_dir), root.run_dir(arguments.compare) if arguments.compare else None)
    plots = [name for name in report_plots.NAMES if (page.parent / "plots" / f"{name}.png").is_file()]
    print(json.dumps({"report": str(page), "plots": len(plots)}))


def _page(run: Run, other: Run | None, plots: list[Plot]) -> str:
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    sections = [
        f'<p class="summary">{_safe(report_text.summary(run))}</p>',
        _tiles(run),
        _comparison(run, other) if other else "",
        _curves(plots),
        _samples(run),
        _events(run),
        _settings(run),
    ]
    return template.substitute(
        title=_safe(run.name),
        state=_state(run),
        main="\n".join(section for section in sections if section),
        footer=f"Made on {report_text.moment(time.time())} from config.json, metrics.jsonl and status.json of the run.",
    )


def _state(run: Run) -> str:
    state = _safe(str(run.status.get("state") or "state unknown"))
    times = [time for record in run.records if math.isfinite(time := number(record.get("time")))]
    # not the first and the last line: a clock may have been set back between them
    ends = [report_text.moment(time) for time in (min(times), max(times))] if times else []
    spans = (f'<span class="number">{end}</span>' for end in dict.fromkeys(ends))
    between = " · " + " to ".join(spans) if ends and all(ends) else ""
    return f'<p class="state"><b class="{state}">{state}</b>{between}</p>'


def _tiles(run: Run) -> str:
    tiles = (
        f'<div><dt>{_safe(figure.label)}</dt><dd class="value">{_safe(figure.value)}</dd>'
        f'<dd class="note">{_safe(figure.note)}</dd></div>'
        for figure in report_text.key_figures(run)
    )
    return '<h2>Key figures</h2>\n<dl class="tiles">\n' + "\n".join(tiles) + "\n</dl>"


def _comparison(run: Run, other: Run) -> str:
    mine, theirs = ({figure.label: figure.value for figure in report_text.key_figures(each)} for each in (run, other))
    figures = [(label, mine.get(label, "—"), theirs.get(label, "—")) for label in {**mine, **theirs}]
    ours, others = (_flat(each.setting("config")) for each in (run, other))
    changed = [
        (key, ours.get(key, "—"), others.get(key, "—"))
        for key in {**ours, **others}
        if ours.get(key) != others.get(key) and key not in ("run_name", "resume")
    ]
    names = (run.name, other.name)
    page = f"<h2>Compared with {_safe(other.name)}</h2>\n" + _table(("figure", *names), figures)
    if changed:
        return page + "<h3>Settings that differ</h3>\n" + _table(("setting", *names), changed)
    return page + "<p>Both runs have the same settings.</p>"


def _curves(plots: list[Plot]) -> str:
    if not plots:
        return ""
    return '<h2>Curves</h2>\n<div class="plots">\n' + "\n".join(map(_figure, plots)) + "\n</div>"


def _figure(plot: Plot) -> str:
    picture = base64.b64encode(plot.png).decode("ascii")
    caption = f"<figcaption>{_safe(plot.caption)}</figcaption>" if plot.caption else ""
    return (
        f'<figure id="{plot.name}"><img alt="{_safe(plot.alt)}" src="data:image/png;base64,{picture}">'
        f"{caption}</figure>"
    )


def _samples(run: Run) -> str:
    """What the model wrote at its first and its last sampling, side by side by prompt."""
    samples = run.of_kind("sample")
    if not samples:
        return ""
    steps = sorted({samples[0]["step"], samples[-1]["step"]})
    names = [f"step {step:,}" for step in steps]
    rows = []
    for prompt in dict.fromkeys(str(sample.get("prompt", "")) for sample in samples):
        texts = [[s for s in samples if s["step"] == step and str(s.get("prompt", "")) == prompt] for step in steps]
        cells = (
            f'<td data-step="{name}">{_continuations(prompt, found)}</td>'
            for name, found in zip(names, texts, strict=True)
        )
        rows.append(f'<tr><th scope="row" dir="auto">{_safe(prompt)}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{_safe(name)}</th>' for name in ("prompt", *names))
    table = f'<table class="samples"><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(rows) + "\n</tbody></table>"
    return "<h2>Samples</h2>\n<p>How the model continued each prompt.</p>\n" + table


def _continuations(prompt: str, samples: list[Record]) -> str:
    texts = dict.fromkeys(str(sample.get("text", "")).removeprefix(prompt) for sample in samples)
    return "".join(f'<p dir="auto">{_safe(text.strip())}</p>' for text in texts) or "—"


def _events(run: Run) -> str:
    """What happened besides training, and what was saved."""
    events = run.of_kind("event")
    rows = [
        (report_text.moment(e.get("time")), f"{e['step']:,}", str(e.get("name", "")), _words(e.get("detail", "")))
        for e in events
    ]
    if len(rows) > MAX_EVENTS:
        half = MAX_EVENTS // 2
        rows = [*rows[:half], ("", "", "…", f"{len(rows) - 2 * half:,} more"), *rows[-half:]]
    table = _table(("time", "step", "event", "detail"), rows, numbers=2) if rows else ""
    saved = run.of_kind("checkpoint")
    if saved:
        table += f"<p>{_safe(_saved(saved))}</p>"
    return f"<h2>Events</h2>\n{table}" if table else ""


def _saved(checkpoints: list[Record]) -> str:
    last = checkpoints[-1]
    count = "One checkpoint was" if len(checkpoints) == 1 else f"{len(checkpoints):,} checkpoints were"
    size, seconds = report_text.number(last.get("bytes")), report_text.number(last.get("seconds"))
    facts = [f"at step {last['step']:,}", str(last.get("path") or "")]
    facts += [f"{size / 1e6:,.1f} MB"] if size > 0 else []
    facts += [f"saved in {seconds:.1f} s"] if seconds >= 0 else []
    return f"{count} saved; the last: {', '.join(fact for fact in facts if fact)}."


def _settings(run: Run) -> str:
    """All of config.json: a table for each group, the first for what stands alone."""
    config = run.settings.get("config")
    entries = {**(config if isinstance(config, dict) else {}), **run.settings}
    if isinstance(config, dict):
        del entries["config"]  # its groups stand beside the others
    alone = {name: value for name, value in entries.items() if not isinstance(value, dict)}
    groups = {"run": alone, **{name: value for name, value in entries.items() if isinstance(value, dict)}}
    tables = [_setting_table(name, _flat(group)) for name, group in groups.items() if group]
    if not tables:
        return ""
    return '<h2>Settings, machine and data</h2>\n<div class="settings">\n' + "\n".join(tables) + "\n</div>"


def _setting_table(name: str, settings: dict[str, str]) -> str:
    rows = (f'<tr><th scope="row">{_safe(key)}</th><td>{_safe(value)}</td></tr>' for key, value in settings.items())
    return f"<table><caption>{_safe(name)}</caption><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested entries under dotted names, as the command line has them."""
    if not isinstance(value, dict):
        return {prefix: _words(value)}
    return {
        name: words
        for key, entry in value.items()
        for name, words in _flat(entry, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _words(value: Any) -> str:
    """Any value JSON can hold, for a table's cell."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:,.10g}"
    elif isinstance(value, list) and not any(isinstance(entry, list | dict) for entry in value):
        text = "\n".join(map(_words, value)) or "none"
    else:
        text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table that scrolls by itself where the page is narrow; its first `numbers` columns don't wrap."""
    columns = "".join(f'<th scope="col">{_safe(name)}</th>' for name in head)
    lines = []
    for row in rows:
        cells = (
            f'<td class="number">{_safe(cell)}</td>' if index < numbers else f"<td>{_safe(cell)}</td>"
            for index, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _safe(text: str) -> str:
    """`text` for any place of the page: it shows, and can neither become markup nor turn its surroundings around."""
    return html.escape(UNSHOWABLE.sub("\ufffd", text))


if __name__ == "__main__":
    exit_with(main)
