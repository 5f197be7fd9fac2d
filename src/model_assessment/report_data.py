"""A run directory as the report sees it: its settings, how it stands, and what it measured.

Every file may be missing, half written or from a run that still goes on, so nothing here trusts a
value to be there or to be a number.
"""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.utils.errors import UserError

Record = dict[str, Any]

SILENT_SECONDS = 600.0  # after which a run that writes nothing is not called running, where its lines come more often
SPIKE_LINES, SPIKE_Z, SPIKE_SHARE = 19, 8.0, 0.02  # see `spikes`

SESSION_STARTS = ("checkpoints", "resume")  # the events a process may write first; before them it did not run


class Series(NamedTuple):
    """One measured quantity over the run. `values` is NaN where the run wrote none, or one that isn't finite."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    def finite(self) -> "Series":
        """The same without its NaN."""
        known = np.isfinite(self.values)
        return Series(self.steps[known], self.values[known])


@dataclass(frozen=True)
class Run:
    """What is known of one run; see `read_run`."""

    name: str
    settings: dict[str, Any]
    """config.json: config, derived, versions, machine, dataset, command."""
    status: dict[str, Any]
    records: list[Record]
    """The lines of metrics.jsonl, as written."""
    unreadable_lines: int
    active_seconds: float
    """Time between the first and the last line, without the pauses before each start."""
    remark: str = ""
    """What to add to its name where that stands for the run."""

    def of_kind(self, kind: str) -> list[Record]:
        """The lines of a kind. Events come in the order they happened, all others by step, the last one of each;
        samples keep every one of a step."""
        found = [record for record in self.records if record["kind"] == kind]
        if kind == "event":
            return found
        if kind != "sample":
            found = list({record["step"]: record for record in found}.values())
        return sorted(found, key=lambda record: record["step"])

    def series(self, kind: str, key: str) -> Series:
        """A quantity over the steps at which lines of this kind were written."""
        records = self.of_kind(kind)
        steps = np.array([record["step"] for record in records], dtype=np.float64)
        return Series(steps, np.array([number(record.get(key)) for record in records], dtype=np.float64))

    def setting(self, *path: str) -> Any:
        """A value of config.json, such as `setting("config", "train", "seed")`, or None."""
        value: Any = self.settings
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def last_step(self) -> int:
        """Optimizer steps completed, as far as the run wrote them down."""
        reached = number(self.status.get("step"))
        return max(*(record["step"] for record in self.records), int(reached) if math.isfinite(reached) else 0)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps planned, or None where no file says."""
        planned = number(self.setting("derived", "total_steps") or self.status.get("total_steps"))
        return int(planned) if math.isfinite(planned) else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens in one optimizer step, as measured; None where no line tells."""
        steps, tokens = self.series("train", "tokens_seen").finite()
        return float(tokens[-1] / steps[-1]) if steps.size and steps[-1] > 0 else None


def read_run(directory: Path) -> Run:
    """The run in `directory`; raises UserError where there is no such folder, or none with metrics in it."""
    if not directory.is_dir():
        raise UserError(f"there is no run directory {directory}; give a path, or the name of a run in temp_data/runs")
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{directory} has no metrics.jsonl, so there is nothing to report; is it a run directory?")
    written, unreadable = _read_lines(path)
    if not written:
        raise UserError(f"{path} holds no complete line yet, so there is nothing to report; let the run go on first")
    settings = _read_object(directory / "config.json")
    config = settings.get("config")
    name = config.get("run_name") if isinstance(config, dict) else None
    return Run(
        name=str(name or directory.resolve().name),
        settings=settings,
        status=_read_object(directory / "status.json"),
        records=written,
        unreadable_lines=unreadable,
        active_seconds=_active_seconds(written),
    )


def last_written(run: Run) -> float:
    """When the run last wrote something, as Unix time; NaN where no line tells."""
    times = [number(record.get("time")) for record in (*run.records, run.status)]
    return max((time for time in times if math.isfinite(time)), default=math.nan)


def is_running(run: Run, now: float) -> bool:
    """Whether the run says so and has written lately: within ten minutes, or three times its longest recent silence."""
    longest = max(_silences(run.records[-50:]), default=0.0)
    silent = now - last_written(run)
    return run.status.get("state") == "running" and silent <= max(SILENT_SECONDS, 3 * longest)


def seconds_left(run: Run) -> float:
    """Until the last step at the pace of the last training lines, evaluations and saves included; NaN if unknown."""
    starts = [index for index, record in enumerate(run.records) if _is_event(record, *SESSION_STARTS)]
    session = run.records[starts[-1] if starts else 0 :]
    lines = [line for line in session if line["kind"] == "train" and math.isfinite(number(line.get("time")))][-50:]
    if not lines or not run.total_steps:
        return math.nan
    first, last = lines[0], lines[-1]
    steps, pace = last["step"] - first["step"], number(last.get("step_ms")) / 1e3
    if steps > 0 and last["time"] > first["time"]:
        pace = (last["time"] - first["time"]) / steps
    return max(0.0, (run.total_steps - last["step"]) * pace)


def skipped_steps(run: Run) -> list[int]:
    return [event["step"] for event in run.of_kind("event") if "skip" in str(event.get("name"))]


def spikes(run: Run) -> Series:
    """Training lines whose loss lies far above the 19 before.

    That is eight standard deviations, and 2%, above their median. As in the guard that skips steps, the deviation comes
    from the changes between successive lines, since a falling curve has a spread of its own.
    """
    steps, losses = run.series("train", "loss").finite()
    if losses.size <= SPIKE_LINES:
        return Series(steps[:0], losses[:0])
    before = np.lib.stride_tricks.sliding_window_view(losses, SPIKE_LINES)[:-1]
    level = np.median(before, axis=1)
    deviation = 1.4826 * np.median(np.abs(np.diff(before, axis=1)), axis=1) / math.sqrt(2)
    high = losses[SPIKE_LINES:] - level > np.maximum(SPIKE_Z * deviation, SPIKE_SHARE * level)
    return Series(steps[SPIKE_LINES:][high], losses[SPIKE_LINES:][high])


def number(value: Any) -> float:
    """`value` as a float; NaN where it is absent, not a number, or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # JSON knows integers of any size
        return math.nan


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> tuple[list[Record], int]:
    """The records in the file, and how many other lines it has; a last line that is cut off is not counted."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records, unreadable = [], 0
    for index, line in enumerate(lines):
        record = _record(line)
        if record:
            records.append(record)
        elif line.strip() and index < len(lines) - 1:
            unreadable += 1
    return records, unreadable


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    step = number(record.get("step"))
    return {**record, "step": int(step)} if step >= 0 else None


def _active_seconds(written: Iterable[Record]) -> float:
    return sum(_silences(written))


def _silences(written: Iterable[Record]) -> list[float]:
    """Seconds between successive lines, without the pauses before each start."""
    timed = [record for record in written if math.isfinite(number(record.get("time")))]
    return [
        max(0.0, later["time"] - earlier["time"])
        for earlier, later in itertools.pairwise(timed)
        if not _is_event(later, *SESSION_STARTS)
    ]


def _is_event(record: Record, *names: str) -> bool:
    return record["kind"] == "event" and record.get("name") in names
