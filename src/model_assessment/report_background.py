"""The curve behind a run's losses: the published run of its shape, another run, or none.

What was asked for once is kept in the run's folder, because the page is made anew while the run goes on.
"""

import csv
import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.model_assessment.report_data import Record, Run, number, read_run
from src.params import ModelConfig
from src.utils import root
from src.utils.errors import UserError
from src.utils.plot_style import plain

PUBLISHED, NONE = "published", "none"
PUBLISHED_RUN = root.ROOT / "assets" / "data" / "published_run_269m.csv"
PUBLISHED_TOKENS_PER_STEP = 524_288
PUBLISHED_PROTOCOL = (
    "hellaswag-ctx-mean-logprob (HellaSwag: raw ctx, ending of the highest mean log-probability a token)"
)
SHAPE = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "ffn_mult")
CHOICE_FILE = "report.json"


def background_of(run_dir: Path, run: Run, asked: str | None = None) -> Run | None:
    """The run to draw behind `run`. `asked` for one: "published", "none", a run's name or folder; it is remembered.

    Else the one asked for before, else the published run where `run` has its shape. Raises UserError where the one
    that is asked for now cannot be read.
    """
    if asked is not None:
        found = _named(asked)
        with suppress(OSError):
            kept = asked if asked in (PUBLISHED, NONE) else str(root.run_dir(asked))
            (run_dir / CHOICE_FILE).write_text(json.dumps({"background": kept}) + "\n", encoding="utf-8")
        return found
    before = _remembered(run_dir)
    with suppress(UserError, OSError):  # moved or deleted since
        return _named(before or (PUBLISHED if _has_published_shape(run) else NONE))
    return None


def published_run() -> Run:
    """The log of the published run, as if its lines were ours. Raises UserError where the file is missing."""
    try:
        with open(PUBLISHED_RUN, encoding="ascii", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read the published run's curve, {PUBLISHED_RUN}: {error.strerror}") from error
    records: list[Record] = []
    for row in rows:
        step = int(row["step"]) + 1  # its log counts from 0: the first line has the first step's learning rate
        values = {name: _as_number(row[name]) for name in ("loss", "lr", "grad_norm", "tokens_per_second")}
        records.append({"kind": "train", "step": step, "tokens_seen": step * PUBLISHED_TOKENS_PER_STEP, **values})
        if row["validation_loss"]:
            records.append({"kind": "validation", "step": step, "loss": _as_number(row["validation_loss"])})
        if row["hellaswag_percent"]:
            share = _as_number(row["hellaswag_percent"]) / 100
            records.append({"kind": "hellaswag", "step": step, "acc_norm": share, "protocol": PUBLISHED_PROTOCOL})
    return Run("published run", {}, {}, records, 0, 0.0, remark=", on 10B tokens of FineWeb-Edu")


def _named(name: str) -> Run | None:
    if name == NONE:
        return None
    if name == PUBLISHED:
        return published_run()
    run = read_run(root.run_dir(name))
    return replace(run, name=plain(run.name, 24))


def _remembered(run_dir: Path) -> str:
    try:
        choice = json.loads((run_dir / CHOICE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    asked = choice.get("background") if isinstance(choice, dict) else None
    return asked if isinstance(asked, str) else ""


def _has_published_shape(run: Run) -> bool:
    published: Any = ModelConfig()
    return all(number(run.setting("config", "model", name)) == getattr(published, name) for name in SHAPE)


def _as_number(text: str) -> float:
    return float(text) if text else math.nan
