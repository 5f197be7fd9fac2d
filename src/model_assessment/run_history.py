"""The history of a training run: its settings, status and metrics as series and key figures.

    run = read_run(Path("temp_data/runs/debug"))
    steps, losses = run.series("train", "loss")

config.json, status.json and lines of metrics.jsonl may be missing, truncated or edited by hand. So values are checked
when they are used: `number` turns anything that is not a plausible number into NaN.
"""

import csv
import itertools
import math
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.model_configs.my_llm_config import lf_llm_269m
from src.params import to_dict
from src.utils.errors import UserError
from src.utils.logger import RunLogger
from src.utils.root import ROOT, instead_of

Record = dict[str, Any]  # a line of metrics.jsonl; see `read_run`

CHANCE = 0.25  # accuracy of guessing: every multiple-choice item has four endings
SILENT_SECONDS = 600.0
LARGEST_NUMBER = 1e30  # beyond it sums and axis limits overflow

PUBLISHED_RUN = ROOT / "assets" / "data" / "published_run_269m.csv"
PUBLISHED_TOKENS_PER_STEP = 524_288


class Series(NamedTuple):
    """One quantity over optimizer steps. NaN stands for a missing or non-finite value."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    def finite(self) -> "Series":
        known = np.isfinite(self.values)
        return Series(self.steps[known], self.values[known])

    def median(self) -> float:
        known = self.finite().values
        return float(np.median(known)) if known.size else math.nan


@dataclass(frozen=True)
class Run:
    """The content of a run folder's files; see `read_run`."""

    name: str
    settings: dict[str, Any]
    """Content of config.json: config, derived, versions, machine, dataset, command."""
    status: dict[str, Any]
    """Content of status.json."""
    records: list[Record]
    """Lines of metrics.jsonl in the order they were written."""

    def of_kind(self, kind: str) -> list[Record]:
        """Records of one kind by step."""
        # A checkpoint saved in the background may be logged after a later step.
        return sorted((record for record in self.records if record["kind"] == kind), key=lambda record: record["step"])

    def last(self, kind: str) -> Record:
        return next(reversed(self.of_kind(kind)), {})

    def series(self, kind: str, key: str) -> Series:
        """The quantity `key` of all records of one kind. A key such as "layer_grad_norms.3" is an element of a list."""
        pairs = [(record["step"], number(_element(record, key))) for record in self.of_kind(kind)]
        return Series(*np.array(pairs, dtype=np.float64).reshape(-1, 2).T)

    def setting(self, *path: str) -> Any:
        """A value of config.json such as `setting("config", "train", "seed")`, or None."""
        value: Any = self.settings
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def last_step(self) -> int:
        """Optimizer steps completed, according to metrics.jsonl and status.json."""
        return max(*(record["step"] for record in self.records), int(np.nan_to_num(number(self.status.get("step")))))

    @property
    def total_steps(self) -> int | None:
        planned = number(self.setting("derived", "total_steps"))
        return int(planned) if planned >= 1 else None

    @cached_property
    def tokens_per_step(self) -> float | None:
        """Tokens in one optimizer step, as measured."""
        steps, tokens = self.series("train", "tokens_seen").finite()
        return float(tokens[-1] / steps[-1]) if steps.size and steps[-1] > 0 and tokens[-1] > 0 else None

    @property
    def active_seconds(self) -> float:
        """Seconds from the first record to the last, without the pauses before each resume."""
        return sum(_silences(self.records))

    @property
    def first_and_last_time(self) -> tuple[float, float]:
        """Unix times of the first and the last record, or NaN. The clock may have been set back between them."""
        times = [number(record.get("time")) for record in (*self.records, self.status)]
        known = [time for time in times if math.isfinite(time)] or [math.nan]
        return min(known), max(known)

    def is_running(self, now: float) -> bool:
        """True if the run's status is running and it has written recently, compared with its usual pauses."""
        longest, (_, last) = max(_silences(self.records[-50:]), default=0.0), self.first_and_last_time
        return self.status.get("state") == "running" and now - last <= max(SILENT_SECONDS, 3 * longest)

    def seconds_left(self) -> float:
        """Seconds from the last record to the last step, at the recent pace including evaluations and saves, or NaN."""
        recent = self.records[-100:]
        steps = recent[-1]["step"] - recent[0]["step"]
        if steps <= 0 or not self.total_steps:
            return math.nan
        return max(0, self.total_steps - self.last_step) * sum(_silences(recent)) / steps


class KeyFigure(NamedTuple):
    """A number to compare runs by, with a note that gives its context."""

    label: str
    value: str
    note: str
    unit: str = ""
    """Shown after the value in a table of several runs."""
    number: float = math.nan
    """The numeric value if runs can be compared by it."""
    decimals: int | None = None
    """Decimals of a difference between two runs; None shows it as a percentage of the first."""


def read_run(folder: Path) -> Run:
    """Reads a run folder. Raises UserError if its metrics.jsonl is missing or empty.

    A record's `kind` is a string, its `step` an integer of at least 0, and its `time` a float or NaN.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f"Cannot read the run {folder}: it does not exist. Give a run's name or folder.{instead_of(folder)}"
        )
    log = RunLogger(folder, is_main=False)
    lines = log.records() if (folder / "metrics.jsonl").is_file() else []
    # A Boolean is an integer in Python, but not for `number`.
    valid = [line for line in lines if isinstance(line["kind"], str) and number(line["step"]) >= 0]
    if not valid:
        raise UserError(
            f"Cannot read the run {folder}: metrics.jsonl is missing or holds no complete line. Give the path of a run "
            "or its name under temp_data/runs. A new run needs its first step."
        )
    records = [{**line, "time": number(line.get("time"))} for line in valid]
    return Run(folder.resolve().name, log.settings(), log.status(), records)


def published_run() -> Run:
    """The reference's log, with the settings of the preset that reproduces it."""
    records: list[Record] = []
    for row in csv.DictReader(PUBLISHED_RUN.read_text(encoding="ascii").splitlines()):
        step = int(row["step"]) + 1  # its log counts from 0: the first line has the first step's learning rate
        at = {"step": step, "time": math.nan}
        loss = float(row["loss"])
        records.append({"kind": "train", **at, "loss": loss, "tokens_seen": step * PUBLISHED_TOKENS_PER_STEP})
        if row["validation_loss"]:
            records.append({"kind": "validation", **at, "loss": float(row["validation_loss"])})
    settings = {"config": to_dict(lf_llm_269m()), "dataset": {"name": "10B tokens of FineWeb-Edu"}}
    return Run("published run", settings, {"state": "done"}, records)


def protocols(run: Run) -> list[str]:
    """Names of the multiple-choice protocols used in the run."""
    return list(dict.fromkeys(str(record.get("protocol") or "not recorded") for record in run.of_kind("hellaswag")))


def choice_name(run: Run) -> str:
    """Returns the name of the run's multiple-choice evaluation.

    Empty if there is none, or if it is the stand-in and every accuracy is within two standard errors of chance.
    """
    used = protocols(run)
    if not used or not all("not HellaSwag" in protocol for protocol in used):
        return "HellaSwag" if used else ""
    accuracies, errors = (run.series("hellaswag", key).values for key in ("acc_norm", "stderr"))
    return "Held-out choice" if np.any(np.abs(accuracies - CHANCE) >= 2 * errors) else ""


def key_figures(run: Run) -> list[KeyFigure]:
    """The key figures that the run has, in the page's order."""
    training, validation, choice = run.last("train"), run.last("validation"), run.last("hellaswag")
    error = fixed(validation.get("stderr"))
    loss_note = f"± {error}; " if error else ""
    at, losses = run.series("validation", "loss").finite()
    if losses.size:
        best = losses.argmin()
        loss_note += "the lowest" if best == losses.size - 1 else f"lowest: {losses[best]:.3f} at step {at[best]:,.0f}"
    steps = f"of {run.total_steps:,} steps" if run.total_steps else "steps"
    tokens, seconds = number(training.get("tokens_seen")), run.active_seconds
    # Medians, because the first steps compile and machines have slow moments.
    speed, mfu = (run.series("train", key).median() for key in ("tokens_per_second", "mfu"))
    memory = max(run.series("train", "memory_gb").finite().values, default=0.0)

    def of(label: str, record: Record, key: str, note: str, unit: str = "", decimals: int = 3) -> KeyFigure:
        return KeyFigure(label, fixed(record.get(key), decimals), note, unit, number(record.get(key)), decimals)

    accuracy, name = number(choice.get("acc_norm")), choice_name(run)
    choice_note = f"± {percent(choice.get('stderr'))}; chance is {CHANCE:.0%}"
    figures = (
        of("Validation loss", validation, "loss", loss_note, "nats/token"),
        _training_loss(run),
        of("Perplexity", validation, "perplexity", "on validation text", decimals=1),
        of("Bits per byte", validation, "bits_per_byte", "on validation text"),
        KeyFigure(name, percent(accuracy) if name else "", choice_note, "", 100 * accuracy, 1),
        KeyFigure("Progress", f"{run.last_step:,}", steps, "steps", run.last_step, 0),
        KeyFigure("Tokens seen", compact(tokens), f"{compact(run.tokens_per_step)} per step", "", tokens),
        KeyFigure("Time", duration(seconds) if seconds else "", "without pauses", "", seconds),
        _cost(run),
        KeyFigure("Throughput", fixed(speed, 0), "tokens/s, median", "tokens/s", speed),
        KeyFigure("Utilisation", percent(mfu), "of the hardware's peak, median", "", 100 * mfu, 1),
        KeyFigure("Peak memory", f"{memory:.1f} GB" if memory > 0 else "", "of one process", "", memory),
    )
    return [figure for figure in figures if figure.value]


def _training_loss(run: Run) -> KeyFigure:
    """The mean of the last twentieth of the steps, because a single step's loss says little."""
    steps, losses = run.series("train", "loss").finite()
    before = steps[steps <= 0.95 * steps[-1]] if steps.size else steps
    since = before[-1] if before.size else 0.0
    loss = float(losses[steps > since].mean()) if steps.size else math.nan
    note = f"mean of the last {steps[-1] - since:,.0f} steps" if steps.size else ""
    return KeyFigure("Training loss", fixed(loss), note, "nats/token", loss, 3)


def _cost(run: Run) -> KeyFigure:
    """Dollars so far, without pauses, if the price is known."""
    price = number(run.setting("config", "price_per_gpu_hour"))
    per_second = price * number(run.setting("derived", "world_size")) / 3600
    cost, left = per_second * run.active_seconds, per_second * run.seconds_left()
    note = f"at {price:,.2f} per GPU-hour" + (f"; about {cost + left:,.2f} for all steps" if left > 0 else "")
    return KeyFigure("Cost", f"${cost:,.2f}" if math.isfinite(cost) else "", note, "", cost)


def number(value: Any) -> float:
    """`value` as a float; NaN if it is not a number or too large to be a measurement."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) <= LARGEST_NUMBER else math.nan  # NaN compares as False, too


def fixed(value: Any, decimals: int = 3) -> str:
    """A number with a fixed number of decimals; empty if it is not a number."""
    return f"{number(value):,.{decimals}f}" if math.isfinite(number(value)) else ""


def percent(share: Any) -> str:
    """A share between 0 and 1 in percent; empty if it is not a number."""
    return f"{number(share):.1%}" if math.isfinite(number(share)) else ""


def compact(value: Any) -> str:
    """A count, such as 320.1M if it is at least a million; empty if it is not a number."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number(value) >= size:
            return f"{value / size:.{1 if value >= 10 * size else 2}f}{letter}"
    return fixed(value, 0)


def duration(seconds: float) -> str:
    """A time in its two largest units, such as 8 h 47 min."""
    if not math.isfinite(seconds):
        return "an unknown time"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def moment(seconds: Any) -> str:
    """A Unix time as date and time of day in UTC; empty if it is not one."""
    try:
        return datetime.fromtimestamp(number(seconds), timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return ""


def _element(record: Record, key: str) -> Any:
    name, _, place = key.partition(".")
    value = record.get(name)
    if not place:
        return value
    return value[int(place)] if isinstance(value, list) and int(place) < len(value) else None


def _silences(records: list[Record]) -> list[float]:
    """Seconds between successive records, without the pauses before each resume."""
    timed = [record for record in records if math.isfinite(record["time"])]
    return [
        max(0.0, later["time"] - earlier["time"])  # a clock may have been set back
        for earlier, later in itertools.pairwise(timed)
        if later["kind"] != "event" or later.get("name") not in ("checkpoints", "resume")  # a new start's first records
    ]
