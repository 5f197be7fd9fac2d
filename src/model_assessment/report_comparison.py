"""Several runs side by side: what differs in their settings, their key figures, and what their models wrote last."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from src.model_assessment import report_text
from src.model_assessment.report_axes import COLORS
from src.model_assessment.report_data import Run
from src.model_assessment.report_html import flat, safe, table
from src.model_assessment.report_sections import sample_table

# Of config.json: what may explain a difference. The rest is a copy of it, or says when and where a start was made.
COMPARED = ("config", "derived", "versions", "machine", "dataset")
NOT_COMPARED = ("config.run_name", "config.resume", "config.profile", "config.report_to")
MISSING = "—"


def with_names_apart(runs: list[Run]) -> list[Run]:
    """The runs, with a number after each name that several of them have."""
    often = {name for name, count in Counter(run.name for run in runs).items() if count > 1}
    return [replace(run, name=f"{run.name} ({i})") if run.name in often else run for i, run in enumerate(runs, 1)]


def sections(runs: list[Run]) -> list[str]:
    """Which runs, in which colours; the settings that differ; the key figures."""
    figures = [{figure.label: figure.value for figure in report_text.key_figures(run)} for run in runs]
    labels = dict.fromkeys(label for found in figures for label in found)
    names = [run.name for run in runs]
    return [
        _names(runs),
        _differences(runs),
        "<h2>Key figures</h2>\n"
        + table(("figure", *names), ((label, *(found.get(label, MISSING) for found in figures)) for label in labels)),
    ]


def samples(runs: list[Run]) -> str:
    """What each model wrote at its last sampling."""
    columns = []
    for run in runs:
        found = run.of_kind("sample")
        last = [sample for sample in found if sample["step"] == found[-1]["step"]]
        columns.append((f"{run.name}, step {last[-1]['step']:,}" if last else run.name, last))
    if not any(last for _, last in columns):
        return ""
    return f"<h2>Samples</h2>\n<p>How each model last continued a prompt.</p>\n{sample_table(columns)}"


def _names(runs: list[Run]) -> str:
    items = (
        f'<li><i style="background: {color}"></i><b>{safe(run.name)}</b> {safe(_standing(run))}</li>'
        for run, color in zip(runs, COLORS, strict=False)
    )
    return f'<ul class="names">{"".join(items)}</ul>'


def _standing(run: Run) -> str:
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    return f"{run.status.get('state') or 'state unknown'}, step {run.last_step:,}{of}"


def _differences(runs: list[Run]) -> str:
    """A row for each setting that is not the same in all runs."""
    unknown = [run.name for run in runs if not isinstance(run.settings.get("config"), dict)]
    runs = [run for run in runs if run.name not in unknown]
    flats = [flat({name: run.settings.get(name) for name in COMPARED if name in run.settings}) for run in runs]
    keys = dict.fromkeys(key for settings in flats for key in settings if key not in NOT_COMPARED)
    rows = [
        (key.removeprefix("config."), *(settings.get(key, MISSING) for settings in flats))
        for key in keys
        if len({settings.get(key) for settings in flats}) > 1
    ]
    title = "<h2>Settings that differ</h2>\n"
    if unknown:
        title += f"<p>Not known, for want of a readable config.json: those of {safe(', '.join(unknown))}.</p>\n"
    if not rows:
        return f"{title}<p>All runs have the same settings, machine and data.</p>"
    return title + table(("setting", *(run.name for run in runs)), _own_settings_first(rows))


def _own_settings_first(rows: list[tuple[str, ...]]) -> Iterable[tuple[str, ...]]:
    """Before what follows from them, and before machine and data."""
    return sorted(rows, key=lambda row: row[0].split(".")[0] in COMPARED)
