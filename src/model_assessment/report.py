"""The report on a run: one self-contained page made from the run folder.

    python -m src.model_assessment.report RUN
    python -m src.model_assessment.report RUN --compare RUN [RUN ...]
    python -m src.model_assessment.report --all

RUN is a path or the name of a run under temp_data/runs. In a comparison, "published" is the reference's run. The first
form writes report.html and plots/*.png into the run folder; training regenerates them regularly. The second writes
comparison.html into the folder of the first run. The third writes temp_data/runs/index.html, a table of all runs.
"""

import base64
import glob
import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from src.model_assessment import run_history
from src.model_assessment.report_figures import COLORS, Picture, draw
from src.model_assessment.run_history import (
    KeyFigure,
    Record,
    Run,
    choice_name,
    compact,
    duration,
    fixed,
    moment,
    number,
    percent,
)
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS
from src.params import to_dict
from src.utils import root
from src.utils.errors import UserError, exit_with, harmless, print_result
from src.utils.files import storage_errors

LONGEST_WRITE_SECONDS = 60.0
# Groups of config.json that may explain a difference between runs. The others, command and times, always differ.
COMPARED = ("config", "derived", "versions", "machine", "dataset")
Samples = dict[str, list[list[str]]]  # for each prompt, the texts in each column of a table


def write_report(run_dir: Path) -> Path:
    """Writes report.html and plots/*.png into `run_dir` and returns the page's path.

    Raises UserError if the run cannot be read, StorageError if the page cannot be written.
    """
    run, now = run_history.read_run(run_dir), time.time()
    # Everything is rendered before anything is written, so that an error leaves the old report intact.
    pictures = draw([run])
    page = _page(
        now,
        run=run,
        is_running=run.is_running(now),
        state=_state(run, now),
        key_figures=run_history.key_figures(run),
        choice=choice_name(run),
        pictures=pictures,
        samples=_samples(run),
        preset=_preset(run),
        changed=_changed(run),
        event_rows=[(moment(e["time"]), e["step"], e.get("name"), e.get("detail")) for e in run.of_kind("event")],
        settings=_setting_groups(run),
    )
    with storage_errors(run_dir / "plots"):
        (run_dir / "plots").mkdir(exist_ok=True)
    for picture in pictures:
        _replace(run_dir / "plots" / f"{picture.name}.png", picture.png)
    return _replace(run_dir / "report.html", page)


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Writes comparison.html into the first of `run_dirs` and returns its path. Raises like `write_report`."""
    if len(run_dirs) > len(COLORS):
        raise UserError(f"Cannot compare {len(run_dirs)} runs: more than {len(COLORS)} look alike. Name fewer.")
    if run_dirs[0].name == "published" and not run_dirs[0].exists():
        raise UserError("Cannot write a page about the published run: it has no folder. Type: RUN --compare published.")
    runs = [
        run_history.published_run() if each.name == "published" and not each.exists() else run_history.read_run(each)
        for each in run_dirs
    ]
    count = Counter(run.name for run in runs)
    runs = [replace(run, name=f"{run.name} ({i})") if count[run.name] > 1 else run for i, run in enumerate(runs, 1)]
    figures = [{figure.label: figure for figure in run_history.key_figures(run)} for run in runs]
    labels = dict.fromkeys(label for each in figures for label in each)
    page = _page(
        time.time(),
        runs=list(zip(runs, COLORS, strict=False)),
        differences=_differences(runs),
        figure_rows=[
            (label, *(_compared(each.get(label), figures[0].get(label)) for each in figures)) for label in labels
        ],
        pictures=draw(runs),
        samples=[_side_by_side([(run.name, _samples_by_step(run)[-1][1]) for run in runs])],
    )
    return _replace(run_dirs[0] / "comparison.html", page)


def write_index() -> Path:
    """Writes index.html into temp_data/runs and returns its path. Raises UserError if there is no run."""
    now, rows = time.time(), []
    folders = sorted(path for path in root.RUNS.glob("*") if path.is_dir() and not path.name.startswith("."))
    for folder in folders:
        try:
            run = run_history.read_run(folder)
        except UserError:
            continue  # a folder without a step
        figures = {figure.label: figure.value for figure in run_history.key_figures(run)}
        page = next((name for name in ("report.html", "comparison.html") if (folder / name).is_file()), "")
        rows.append((run, _state(run, now), f"./{quote(folder.name)}/{page}" if page else "", figures))
    if not rows:
        raise UserError(f"Cannot list the runs in {root.RUNS}: none has made a step. Train one first.")
    rows.sort(key=lambda row: number(row[0].first_and_last_time[1]), reverse=True)
    return _replace(root.RUNS / "index.html", _page(now, index=rows, folder=str(root.RUNS)))


def main() -> None:
    parser = Parser(
        prog="python -m src.model_assessment.report", description="Write the report on a run, report.html and plots/."
    )
    parser.add_argument("run_dir", metavar="RUN", nargs="?", help="a path, or the name of a run under temp_data/runs")
    options = parser.add_mutually_exclusive_group()
    compare = "write comparison.html about RUN and these runs; published means the reference's run"
    options.add_argument("--compare", metavar="RUN", nargs="+", help=compare)
    options.add_argument("--all", action="store_true", help="write temp_data/runs/index.html, a table of all runs")
    arguments = parser.parse_args()
    if arguments.all == bool(arguments.run_dir):
        parser.error("name one RUN, or use --all for a table of all runs")
    if arguments.all:
        index = write_index()
        print_result({"index": str(index)}, f"index: {index.as_uri()}")
        return
    run_dirs = [root.run_dir(name) for name in (arguments.run_dir, *(arguments.compare or []))]
    page = write_comparison(run_dirs) if arguments.compare else write_report(run_dirs[0])
    plots = page.read_text(encoding="utf-8").count('<figure id="')
    print_result({"report": str(page), "plots": plots}, f"report: {page.as_uri()}")


def _state(run: Run, now: float) -> Any:
    """The state of status.json, or "silent" for a run that may have been killed."""
    state = run.status.get("state")
    return "silent" if state == "running" and not run.is_running(now) else state


def _samples(run: Run) -> list[tuple[list[str], Samples]]:
    """Tables of samples with their titles: the last step next to the first, then the steps between, newest first."""
    columns = _samples_by_step(run)[::-1]
    return [_side_by_side([columns[0], columns[-1]][: len(columns)]), *(_side_by_side([c]) for c in columns[1:-1])]


def _samples_by_step(run: Run) -> list[tuple[str, list[Record]]]:
    """The samples of each step, with a title. One empty group if there are none."""
    by_step: dict[str, list[Record]] = {}
    for sample in run.of_kind("sample"):
        by_step.setdefault(f"step {sample['step']:,}", []).append(sample)
    return list(by_step.items()) or [("", [])]


def _side_by_side(columns: list[tuple[str, list[Record]]]) -> tuple[list[str], Samples]:
    rows: Samples = {}
    for i, (_, samples) in enumerate(columns):
        for sample in samples:
            prompt = str(sample.get("prompt", ""))
            texts = rows.setdefault(prompt, [[] for _ in columns])[i]
            texts.append(str(sample.get("text", "")).removeprefix(prompt).strip())
    return [title for title, _ in columns], rows


def _preset(run: Run) -> str:
    """The preset in the run's command, or ""."""
    return next((word for word in str(run.settings.get("command")).split() if word in PRESETS), "")


def _changed(run: Run) -> list[tuple[str, Any, Any]]:
    """Settings that differ from the preset's: name, the run's value, the preset's."""
    config, preset = run.settings.get("config"), _preset(run)
    if not preset or not isinstance(config, dict):
        return []
    usual = _flat(json.loads(json.dumps(to_dict(PRESETS[preset]()))))  # a tuple becomes a list, as in the run's file
    both = ((name, value, usual[name]) for name, value in _flat(config).items() if name in usual and name != "run_name")
    return [row for row in both if row[1] != row[2]]


def _compared(figure: KeyFigure | None, first: KeyFigure | None) -> str:
    """The figure with its unit and, except in the first run, its difference from the first."""
    if figure is None:
        return "—"
    text = f"{figure.value} {figure.unit}".rstrip()
    if first is None or first is figure or not math.isfinite(change := figure.number - first.number):
        return text
    if figure.decimals is not None:
        points = " points" if text.endswith("%") else ""  # a difference of shares is not a share
        return f"{text} ({change:+,.{figure.decimals}f}{points})"
    return f"{text} ({change / first.number:+.1%})" if first.number else text


def _setting_groups(run: Run) -> dict[str, dict[str, Any]]:
    """All of config.json by group: first single values, then the groups of `config` and the others."""
    config = run.settings.get("config")
    entries = {**(config if isinstance(config, dict) else {}), **run.settings}
    entries.pop("config", None)  # its groups are listed with the others
    alone = {name: value for name, value in entries.items() if not isinstance(value, dict)}
    return {"run": alone, **{name: _flat(value) for name, value in entries.items() if isinstance(value, dict)}}


def _differences(runs: list[Run]) -> list[tuple[str, ...]]:
    """Settings that differ between the runs, with each run's value."""
    flats = [_flat({name: run.settings[name] for name in COMPARED if name in run.settings}) for run in runs]
    keys = dict.fromkeys(key for settings in flats for key in settings if key != "config.run_name")
    rows = [(key.removeprefix("config."), *(_text(settings.get(key, "—")) for settings in flats)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(value: dict[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Nested settings under dotted names, like on the command line."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, dict) and depth < 5:  # ours have three levels; a file edited by hand may have a thousand
            flat |= _flat(entry, f"{prefix}{key}.", depth + 1)
        else:
            flat[prefix + key] = entry
    return flat


def _text(value: Any) -> str:
    """Any JSON value as text for the page, which then escapes it."""
    if hasattr(value, "__html__"):  # a table that the template made
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "…"
    return text if text.isprintable() else harmless(text, keep="\n\t")


def _page(now: float, pictures: Sequence[Picture] = (), **sections: Any) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # nothing in a run's files becomes markup
        finalize=_text,  # every value that the template shows
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in (moment, duration, fixed, percent, compact, number)}
    # Embedded as images, they can neither run nor fetch anything, whatever a name in them contains.
    images = [(picture, base64.b64encode(picture.svg).decode("ascii")) for picture in pictures]
    page = environment.get_template("report_template.html").render(now=now, images=images, **sections)
    return page.encode("utf-8")


def _replace(path: Path, content: bytes) -> Path:
    """Replaces a file so that a reader never sees half of it. The run and a person may do so at the same time."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # of a report that was killed
        with suppress(OSError):
            if time.time() - leftover.lstat().st_mtime > LONGEST_WRITE_SECONDS:
                leftover.unlink()
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        unfinished.unlink(missing_ok=True)
        try:
            with open(unfinished, "xb") as file:  # "x" never writes through a link of that name
                file.write(content)
            return unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    exit_with(main)
