"""The report on a run: one self-contained page made from the run folder.

    python -m src.model_assessment.report RUN [--background RUN|published|none]
    python -m src.model_assessment.report RUN --compare RUN [RUN ...]

RUN is a path, or the name of a run under temp_data/runs. The first form writes report.html and plots/*.png into the
run folder; training regenerates them regularly. The second writes comparison.html into the folder of the first run.
"""

import argparse
import base64
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from src.model_assessment import run_history
from src.model_assessment.report_figures import COLORS, FIGURES, Picture, draw
from src.model_assessment.run_history import CHANCE, Record, Run, compact, duration, fixed, moment, number, percent
from src.params import ModelConfig
from src.utils import root
from src.utils.errors import UserError, exit_with
from src.utils.files import storage_errors

MAX_DEPTH = 10  # of nested settings; ours have three levels
BACKGROUND_FILE = "report.json"
SHAPE = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "ffn_mult")
# Groups of config.json that may explain a difference between runs, and settings that never do.
COMPARED = ("config", "derived", "versions", "machine", "dataset")
NOT_COMPARED = ("config.run_name", "config.resume", "config.profile", "config.report_to")
# Control characters, lone surrogates and marks that reverse the direction of writing.
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write_report(run_dir: Path, background: str | None = None) -> Path:
    """Writes report.html and plots/*.png into `run_dir` and returns the page's path.

    `background`: "published", "none", or a run; see `_background_of`. Raises UserError if a run cannot be read,
    StorageError if the page cannot be written.
    """
    run, now = run_history.read_run(run_dir), time.time()
    pictures = draw([run], _background_of(run_dir, run, background))
    is_running = run.is_running(now)
    state = run.status.get("state")
    page = _page(
        now,
        run=run,
        is_running=is_running,
        state="silent" if state == "running" and not is_running else state,
        times=[record["time"] for record in run.records if math.isfinite(record["time"])],
        key_figures=run_history.key_figures(run),
        pictures=pictures,
        samples=_samples(run),
        event_rows=[(moment(e["time"]), e["step"], e.get("name"), e.get("detail")) for e in run.of_kind("event")],
        settings={name: group for name, group in _setting_groups(run).items() if group},
        **_summary(run),
    )
    folder = run_dir / "plots"
    with storage_errors(run_dir):
        folder.mkdir(exist_ok=True)
        for stale in {spec.name for spec in FIGURES} - {picture.name for picture in pictures}:
            (folder / f"{stale}.png").unlink(missing_ok=True)  # of an earlier report
        for picture in pictures:
            _replace(folder / f"{picture.name}.png", picture.png)
        return _replace(run_dir / "report.html", page)


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Writes comparison.html into the first of `run_dirs` and returns its path. Raises like `write_report`."""
    if len(run_dirs) > len(COLORS):
        raise UserError(f"Cannot compare {len(run_dirs)} runs: more than {len(COLORS)} look alike. Name fewer.")
    runs = [run_history.read_run(run_dir) for run_dir in run_dirs]
    count = Counter(run.name for run in runs)
    runs = [replace(run, name=f"{run.name} ({i})") if count[run.name] > 1 else run for i, run in enumerate(runs, 1)]
    figures = [{figure.label: figure.value for figure in run_history.key_figures(run)} for run in runs]
    labels = dict.fromkeys(label for each in figures for label in each)
    last_samples = []
    for run in runs:
        samples = run.of_kind("sample")
        last_samples.append((run.name, [sample for sample in samples if sample["step"] == samples[-1]["step"]]))
    page = _page(
        time.time(),
        runs=list(zip(runs, COLORS, strict=False)),
        differences=_differences(runs),
        figure_rows=[(label, *(each.get(label, "—") for each in figures)) for label in labels],
        pictures=draw(runs),
        samples=[_sample_table(last_samples)] if any(samples for _, samples in last_samples) else [],
    )
    with storage_errors(run_dirs[0]):
        return _replace(run_dirs[0] / "comparison.html", page)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_assessment.report", description="Write the report on a run, report.html and plots/."
    )
    parser.add_argument("run_dir", metavar="RUN", help="a path, or the name of a run under temp_data/runs")
    parser.add_argument("--compare", metavar="RUN", nargs="+", help="write comparison.html about RUN and these runs")
    parser.add_argument(
        "--background",
        metavar="RUN|published|none",
        help="run to draw in grey behind the losses, remembered for later reports; default: the published run, if it "
        "has the same shape",
    )
    arguments = parser.parse_args()
    run_dirs = [root.run_dir(name) for name in (arguments.run_dir, *(arguments.compare or []))]
    if arguments.compare and arguments.background:
        parser.error("--background does not work with --compare. Leave one of them out.")
    page = write_comparison(run_dirs) if arguments.compare else write_report(run_dirs[0], arguments.background)
    print(json.dumps({"report": str(page), "plots": page.read_text(encoding="utf-8").count('<figure id="')}))


def _summary(run: Run) -> dict[str, Any]:
    """The values of the template's first paragraph; NaN or None if the run has none."""
    last = {kind: (run.of_kind(kind) or [{}])[-1] for kind in ("train", "validation", "hellaswag")}
    accuracy, stderr = (number(last["hellaswag"].get(key)) for key in ("acc_norm", "stderr"))
    machine = run.setting("machine", "gpu") or run.setting("machine", "cpu")
    losses = run.series("train", "loss").values
    notes = {
        "resumes": sum(event.get("name") == "resume" for event in run.of_kind("event")),
        "skipped steps": len(run_history.skipped_steps(run)),
        "training losses that are not finite": int(np.count_nonzero(~np.isfinite(losses))),
        "unreadable lines of metrics.jsonl": run.unreadable_lines,
    }
    return {
        "parameters": run.setting("derived", "parameters"),
        "data": run.setting("dataset", "name"),
        "tokens": last["train"].get("tokens_seen"),
        "machine": machine if isinstance(machine, str) else None,
        "loss": number(last["validation"].get("loss")),
        "entropy": number(last["validation"].get("unigram_entropy")),
        "best": run_history.best_validation(run),
        "accuracy": accuracy,
        "stderr": stderr,
        "within_error": abs(accuracy - CHANCE) < 2 * stderr,
        "notes": [(name, count) for name, count in notes.items() if count],
    }


def _background_of(run_dir: Path, run: Run, requested: str | None) -> Run | None:
    """The run to draw behind `run`: the requested one, else the last one requested, else the published one.

    The published run is the default only if it has the same shape. A request is remembered in the run folder, because
    training regenerates the page. Raises UserError if the requested run cannot be read.
    """

    def named(name: str) -> Run | None:
        if name == "none":
            return None
        return run_history.published_run() if name == "published" else run_history.read_run(root.run_dir(name))

    if requested is not None:
        background = named(requested)
        kept = requested if requested in ("published", "none") else str(root.run_dir(requested))
        with storage_errors(run_dir):
            _replace(run_dir / BACKGROUND_FILE, json.dumps({"background": kept}) + "\n")
        return background
    choice = run_history.read_object(run_dir / BACKGROUND_FILE).get("background")
    same_shape = all(run.setting("config", "model", name) == getattr(ModelConfig(), name) for name in SHAPE)
    with suppress(UserError, OSError):  # moved or deleted since
        return named(choice if isinstance(choice, str) else "published" if same_shape else "none")
    return None


def _samples(run: Run) -> list[dict[str, Any]]:
    """Tables of samples: the first and the last step side by side, then one for each step between."""
    by_step: dict[int, list[Record]] = {}
    for sample in run.of_kind("sample"):
        by_step.setdefault(sample["step"], []).append(sample)
    steps = list(by_step)
    groups = [dict.fromkeys([steps[0], steps[-1]]), *([step] for step in steps[1:-1])] if steps else []
    return [_sample_table([(f"step {step:,}", by_step[step]) for step in group]) for group in groups]


def _sample_table(columns: Sequence[tuple[str, list[Record]]]) -> dict[str, Any]:
    """Prompts down; across, the texts that each column, a title with its samples, has for them."""
    texts: dict[str, list[list[str]]] = {}
    for i, (_, samples) in enumerate(columns):
        for sample in samples:
            prompt = str(sample.get("prompt", ""))
            cells = texts.setdefault(prompt, [[] for _ in columns])
            cells[i].append(str(sample.get("text", "")).removeprefix(prompt).strip())
    return {"titles": [title for title, _ in columns], "rows": texts}


def _setting_groups(run: Run) -> dict[str, dict[str, Any]]:
    """All of config.json by group: first what stands alone, then the groups of `config` and the others."""
    config = run.settings.get("config")
    entries = {**(config if isinstance(config, dict) else {}), **run.settings}
    entries.pop("config", None)  # its groups stand among the others
    alone = {name: value for name, value in entries.items() if not isinstance(value, dict)}
    return {"run": alone, **{name: _flat(value) for name, value in entries.items() if isinstance(value, dict)}}


def _differences(runs: list[Run]) -> dict[str, Any]:
    """Settings that are not the same in all runs whose config.json is readable."""
    known = [run for run in runs if isinstance(run.settings.get("config"), dict)]
    # Only listed groups: command and times of a start always differ.
    flats = [_flat({name: run.settings.get(name) for name in COMPARED if name in run.settings}) for run in known]
    keys = dict.fromkeys(key for settings in flats for key in settings if key not in NOT_COMPARED)
    rows = [(key.removeprefix("config."), *(_text(settings.get(key, "—")) for settings in flats)) for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    # The run's own settings first, then what follows from them, machine and data.
    differing.sort(key=lambda row: row[0].split(".")[0] in COMPARED)
    unknown = [run.name for run in runs if run not in known]
    return {"titles": [run.name for run in known], "rows": differing, "unknown": unknown}


def _flat(value: dict[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Nested settings under dotted names, like on the command line."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, dict) and depth < MAX_DEPTH:
            flat |= _flat(entry, f"{prefix}{key}.", depth + 1)
        else:
            flat[prefix + key] = "…" if isinstance(entry, dict) else entry
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
    return UNSHOWABLE.sub("\ufffd", text)


def _page(now: float, pictures: list[Picture], **sections: Any) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # nothing in a run's files becomes markup
        finalize=_text,  # every value that the template shows
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in (moment, duration, fixed, percent, compact)}
    images = [(picture, base64.b64encode(picture.png).decode("ascii")) for picture in pictures]
    page = environment.get_template("report_template.html").render(now=now, images=images, **sections)
    return page.encode("utf-8")


def _replace(path: Path, content: bytes | str) -> Path:
    """Writes a file so that a reader never sees half of it. The run and a person may do so at the same time."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(unfinished, path)
    return path


if __name__ == "__main__":
    exit_with(main)
