"""The report on a run: one page for a person who wasn't there, made from the run directory alone.

    python -m src.model_assessment.report RUN [--background RUN|published|none]
    python -m src.model_assessment.report RUN --compare RUN [RUN ...]

A RUN is a path, or the name of a run under temp_data/runs. The page, report.html, holds its own
pictures, which are also written to plots/. Every figure on it comes from the run's files. A run that
goes on makes it anew now and then. Several runs compared have a page of their own, comparison.html, in
the first one's folder.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template

from src.model_assessment import report_comparison, report_plots, report_sections, report_text
from src.model_assessment.report_axes import COLORS, Plot, Shown
from src.model_assessment.report_background import background_of
from src.model_assessment.report_data import Run, is_running, read_run
from src.model_assessment.report_html import curves, safe
from src.utils import root
from src.utils.errors import StorageError, UserError, exit_with

RELOAD_SECONDS = 60


def write_report(run_dir: Path, background: str | None = None) -> Path:
    """Writes report.html and plots/*.png into `run_dir` and returns the page's path.

    `background`: see `background_of`. Raises UserError where a directory is missing or has no metrics, StorageError
    where one can't be written.
    """
    run = read_run(run_dir)
    plots = report_plots.draw(Shown([run], background_of(run_dir, run, background)))
    return _write(run_dir, "report.html", _page(run, plots, time.time()), plots)


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Writes comparison.html into the first of `run_dirs` and returns its path; raises as `write_report` does."""
    if len(run_dirs) > len(COLORS):
        raise UserError(
            f"{len(run_dirs)} runs cannot be told apart in one picture; compare at most {len(COLORS)} at a time"
        )
    runs = report_comparison.with_names_apart([read_run(run_dir) for run_dir in run_dirs])
    plots = report_plots.draw(Shown(runs))
    page = _fill(
        title=f"{len(runs)} runs compared",
        kind="Pretraining, several runs",
        state="",
        main=[*report_comparison.sections(runs), curves(plots), report_comparison.samples(runs)],
        footer=f"Made on {report_text.moment(time.time())} from config.json, metrics.jsonl and status.json of each.",
    )
    return _write(run_dirs[0], "comparison.html", page, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_assessment.report", description="Write the report on a run, report.html and plots/."
    )
    parser.add_argument("run_dir", metavar="RUN", help="a path, or the name of a run under temp_data/runs")
    parser.add_argument(
        "--compare", metavar="RUN", nargs="+", help="other runs: comparison.html instead, with all of them"
    )
    parser.add_argument(
        "--background",
        metavar="RUN|published|none",
        help="a run to draw in grey behind the losses, from here on; the published one where it has this run's shape",
    )
    arguments = parser.parse_args()
    run_dirs = [root.run_dir(name) for name in (arguments.run_dir, *(arguments.compare or []))]
    if arguments.compare and arguments.background:
        parser.error("--background is for the report on one run, without --compare")
    page = write_comparison(run_dirs) if arguments.compare else write_report(run_dirs[0], arguments.background)
    found = page.read_text(encoding="utf-8").count('<figure id="')
    print(json.dumps({"report": str(page), "plots": found}))


def _page(run: Run, plots: list[Plot], now: float) -> str:
    going_on = is_running(run, now)
    footer = f"Made on {report_text.moment(now)} from config.json, metrics.jsonl and status.json of the run."
    if going_on:
        footer += " While it goes on, the run makes this page anew every few minutes."
    return _fill(
        title=run.name,
        kind="Pretraining report",
        state=report_sections.state(run, now),
        reload=f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' if going_on else "",
        main=[
            report_sections.progress(run, now),
            f'<p class="summary">{safe(report_text.summary(run, now))}</p>',
            report_sections.tiles(run),
            curves(plots),
            report_sections.samples(run),
            report_sections.events(run),
            report_sections.checkpoints(run),
            report_sections.settings(run),
        ],
        footer=footer,
    )


def _fill(title: str, kind: str, state: str, main: list[str], footer: str, reload: str = "") -> str:
    """The page; `title` and `footer` are text, the others HTML."""
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=safe(title),
        kind=kind,
        state=state,
        reload=reload,
        main="\n".join(section for section in main if section),
        footer=safe(footer),
    )


def _write(run_dir: Path, name: str, page: str, plots: list[Plot] | None) -> Path:
    """Puts a page into `run_dir`, and its pictures beside it, if any are given."""
    path = run_dir / name
    try:
        if plots is not None:
            folder = run_dir / "plots"
            folder.mkdir(exist_ok=True)
            for plot in plots:
                _replace(folder / f"{plot.name}.png", plot.png)
            for gone in {*report_plots.NAMES} - {plot.name for plot in plots}:  # of an earlier report
                (folder / f"{gone}.png").unlink(missing_ok=True)
        _replace(path, page.encode("utf-8"))
    except OSError as error:
        raise StorageError(f"could not write the report to {run_dir}: {error.strerror or error}") from error
    return path


def _replace(path: Path, content: bytes) -> None:
    """Whoever looks at it while a run goes on never finds half of it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a run and a person may both write it
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


if __name__ == "__main__":
    exit_with(main)
