"""A run folder is read whatever state its files are in."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from src.model_assessment.run_history import compact, duration, key_figures, number, published_run, read_run
from src.model_configs.my_llm_config import lf_llm_269m
from src.utils.errors import UserError
from tests.model_assessment.reported_runs import START, STEPS, append, make_run, metrics, rewrite


def test_missing_or_empty_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text('{"kind": "ev')
    for folder in (tmp_path / "nowhere", tmp_path, tmp_path / "new"):
        with pytest.raises(UserError, match=r"does not exist|metrics\.jsonl is missing or holds no complete line"):
            read_run(folder)


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text()
    deep = '{"kind": "train", "step": 1, "loss": ' + "[" * 100_000 + "]" * 100_000 + "}"
    damaged = ['{"kind": "tra\0\0', "[1, 2]", '{"kind": [], "step": 1}', '{"kind": "train", "step": 1e99}', deep]
    (folder / "metrics.jsonl").write_text("\n".join(damaged) + "\n" + whole + '{"kind": "train", "step": 251, "lo')
    assert len(read_run(folder).records) == len(metrics())


@pytest.mark.parametrize("value", [None, True, "1", [1], {}, math.nan, math.inf, 10**400, -1e200])
def test_only_plausible_numbers_are_numbers(value: Any) -> None:
    assert math.isnan(number(value))


def test_numbers_as_people_read_them() -> None:
    assert [compact(n) for n in (0, 8_192, 999_999, 3_276_800, 10e9, None)] == [
        *("0", "8,192", "999,999", "3.28M", "10.0B", "")
    ]
    assert [duration(s) for s in (0.4, 61, 31_620, 90_000)] == ["0 s", "1 min 1 s", "8 h 47 min", "1 d 1 h"]


def test_a_pause_before_a_resume_is_not_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "resumed")
    before = [line for line in metrics() if line["step"] <= 100]
    resume = {"kind": "event", "step": 100, "time": START + 9_000, "name": "resume", "detail": "from step_0000100"}
    again = [line | {"time": line["time"] + 9_000 - 81} for line in metrics() if line["step"] > 100]
    rewrite(folder, [*before, resume, *again])
    run = read_run(folder)
    assert list(run.series("train", "loss").steps) == list(range(10, STEPS + 1, 10))
    assert run.active_seconds == pytest.approx(201)  # 81 s to step 100, and 120 s from there to step 250
    assert run.seconds_left() == 0


def test_a_slow_run_may_be_silent_for_longer(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "slow")
    now = time.time()
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    lines = [line for line in metrics() if line["kind"] == "train"]
    rewrite(folder, [line | {"time": now - 660 + 300 * (line["step"] - STEPS) / 10} for line in lines])
    assert read_run(folder).is_running(now)  # a line comes every five minutes
    rewrite(folder, [line | {"time": now - 660 + 100 * (line["step"] - STEPS) / 10} for line in lines])
    assert not read_run(folder).is_running(now)


def test_steps_of_the_published_run_are_counted_like_ours() -> None:
    published = published_run()
    assert published.last_step == lf_llm_269m().total_steps
    assert published.tokens_per_step == lf_llm_269m().train.batch_tokens


def test_the_lowest_validation_loss_is_named_if_the_last_is_higher(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "overfit")
    append(folder, {"kind": "validation", "step": 260, "time": START + 300, "loss": 5.5, "perplexity": math.exp(5.5)})
    lowest = min(line["loss"] for line in metrics() if line["kind"] == "validation")
    figures = {figure.label: figure for figure in key_figures(read_run(folder))}
    assert figures["Validation loss"].value == "5.500"
    assert figures["Validation loss"].note == f"lowest: {lowest:.3f} at step 250"
    assert figures["Perplexity"].value == "244.7"
