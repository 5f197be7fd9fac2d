"""The report on a run that goes on: where it is, what is marked on its curves, and what stands behind them."""

import json
import re
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from src.model_assessment import report_axes
from src.model_assessment.report import write_report
from src.model_assessment.report_background import published_run
from src.model_assessment.report_data import is_running, read_run, spikes
from src.model_configs.my_llm_config import lf_llm_269m
from src.params import to_dict
from src.utils.errors import UserError
from src.utils.root import ROOT
from tests.model_assessment.reported_runs import START, STEPS, Page, append, make_run, metrics, rewrite


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at them here, and they take longest."""
    monkeypatch.setattr(report_axes, "as_png", lambda figure: b"")


def running(folder: Path, silent: float, **settings: Any) -> Path:
    """A run at step 250 of 1,000 whose last line is `silent` seconds old."""
    make_run(folder, derived={"total_steps": 4 * STEPS}, **settings)
    late = time.time() - silent - max(line["time"] for line in metrics())
    rewrite(folder, [line | {"time": line["time"] + late} for line in metrics()])
    (folder / "status.json").write_text(json.dumps({"state": "running", "time": time.time() - silent}))
    return folder


def test_a_page_of_a_run_that_goes_on_says_how_long_and_loads_itself_again(tmp_path: Path) -> None:
    page = Page(write_report(running(tmp_path / "run", silent=5.0)))
    assert ("meta", "http-equiv", "refresh") in page.attributes
    assert ("i", "style", "width: 25.00%") in page.attributes
    assert "step 250 of 1,000 25.0%" in page.text
    left = re.search(r"(\d+) min (\d+) s left done about (.{23}) last written", page.text)
    assert left
    # 750 steps of 0.8 s, of which 5 s are gone
    assert 60 * int(left[1]) + int(left[2]) == pytest.approx(750 * 0.8 - 5, abs=3)
    end = datetime.strptime(left[3], "%Y-%m-%d %H:%M:%S %Z").replace(tzinfo=timezone.utc).timestamp()
    assert end == pytest.approx(time.time() + 595, abs=4)


def test_a_run_that_has_been_silent_for_long_is_not_called_running(tmp_path: Path) -> None:
    page = Page(write_report(running(tmp_path / "killed", silent=11 * 60)))
    assert ("b", "class", "silent") in page.attributes
    assert "but has written nothing since" in page.text
    assert "before this page was made: it may have been killed" in page.text
    assert "refresh" not in page.html.split("<title>")[0]
    assert "left done about" not in page.text


def test_a_slow_run_may_be_silent_for_longer(tmp_path: Path) -> None:
    folder = running(tmp_path / "slow", silent=11 * 60)
    lines = [line for line in metrics() if line["kind"] == "train"]
    now = time.time() - 11 * 60
    rewrite(folder, [line | {"time": now + 300 * (line["step"] - STEPS) / 10} for line in lines])
    assert is_running(read_run(folder), time.time())  # a line comes every five minutes


def test_skipped_steps_and_spikes_are_marked(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "spiky")
    lines = [line for line in metrics() if line["kind"] == "train"]
    rewrite(folder, [line | {"loss": line["loss"] + (3 if line["step"] in (210, 240) else 0)} for line in lines])
    append(
        folder,
        *({"kind": "event", "step": step, "name": "skipped step", "detail": "loss inf"} for step in (12, 87, 133)),
    )
    assert list(spikes(read_run(folder)).steps) == [210, 240]
    caption = Page(write_report(folder)).text
    assert "Skipped steps: 3, the last of them 133." in caption
    assert "Spikes, far above the lines before: 2, the last at step 240:" in caption
    assert not spikes(read_run(make_run(tmp_path / "smooth"))).steps.size


def test_the_published_runs_curve_has_one_spike_at_most() -> None:
    """A curve known to be healthy."""
    assert spikes(published_run()).steps.size <= 1


def test_its_steps_are_counted_as_ours() -> None:
    config = lf_llm_269m()
    optim, train = config.optim, [record for record in published_run().records if record["kind"] == "train"]
    for record in train[:20]:
        rate = optim.max_lr * min(1.0, record["step"] / config.warmup_steps)
        assert record["lr"] == pytest.approx(rate, rel=1e-3 if record["step"] <= config.warmup_steps else 0.01)
    assert train[-1]["step"] == config.total_steps


def published_row(step: int) -> list[str]:
    rows = (ROOT / "assets" / "data" / "published_run_269m.csv").read_text().splitlines()
    return next(row.split(",") for row in rows if row.startswith(f"{step},"))


def test_a_run_of_the_published_shape_has_its_curve_behind(tmp_path: Path) -> None:
    config = json.loads(json.dumps(to_dict(lf_llm_269m())))
    folder = make_run(tmp_path / "full", config=config)
    rewrite(folder, [line | {"tokens_seen": line["step"] * 524_288} for line in metrics()])
    append(folder, {"kind": "validation", "step": 301, "time": START, "loss": 5.0})
    theirs = float(published_row(300)[2])  # its log counts from 0
    text = Page(write_report(folder)).text
    assert f"At step 301 its validation loss was {theirs:.3f}, this run's 5.000 ({5 - theirs:+.3f})." in text
    config["model"]["n_layer"] = 4
    other = make_run(tmp_path / "other", config=config)
    rewrite(other, [line | {"tokens_seen": line["step"] * 314_572.8} for line in metrics()])
    assert "published" not in Page(write_report(other)).text
    # 250 of its steps have as many tokens as 150 of the published run's, between its validations after 101 and 201
    theirs = 0.51 * float(published_row(100)[2]) + 0.49 * float(published_row(200)[2])
    asked = Page(write_report(other, background="published")).text
    assert "Grey: published run, on 10B tokens of FineWeb-Edu." in asked
    assert f"At 78.64 million tokens its validation loss was {theirs:.3f}, this run's" in asked
    assert "Grey: published run" in Page(write_report(other)).text  # remembered


def test_another_run_is_drawn_behind_until_none_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    behind, folder = make_run(tmp_path / "behind"), make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    rewrite(behind, [line | ({"loss": line["loss"] + 1} if "loss" in line else {}) for line in metrics()])
    loss = [line["loss"] for line in metrics() if line["kind"] == "validation"][-1]
    words = f"Grey: behind. At step 250 its validation loss was {loss + 1:.3f}, this run's {loss:.3f} (-1.000)."
    assert words in Page(write_report(folder, background="./behind")).text
    monkeypatch.chdir("/")  # the page of a run that goes on is made elsewhere
    assert words in Page(write_report(folder)).text
    shutil.rmtree(behind)
    assert "Grey" not in Page(write_report(folder)).text  # a page without is better than none
    with pytest.raises(UserError, match="no run directory"):
        write_report(folder, background=str(behind))
    write_report(folder, background="none")
    assert json.loads((folder / "report.json").read_text()) == {"background": "none"}
