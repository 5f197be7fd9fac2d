"""Runs that are watched by trackers and by a report that is regenerated during training."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain import train
from src.model_assessment import trackers
from src.params import Config
from src.utils.errors import UserError
from tests.whole_runs.records import STEPS, assert_same_bits, metrics, stop_after


def test_a_watched_run_is_the_same_and_is_seen_during_training_and_after_a_resume(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator").EventAccumulator
    monkeypatch.setattr(trackers, "REPORT_SECONDS", 0.0)
    page, run_dir = tmp_path / "runs" / config.run_name / "report.html", tmp_path / "runs" / config.run_name
    watched = replace(config, report_to=("tensorboard",))
    stop, seen = stop_after(7), list[str]()

    def look_on() -> bool:
        """After the first line, waits until there is a page: such a short run would be over before."""
        if not seen and (run_dir / "metrics.jsonl").exists() and metrics(run_dir, "train"):
            end = time.monotonic() + 60
            while not page.exists():
                assert time.monotonic() < end
                time.sleep(0.05)
            seen.append(page.read_text(encoding="utf-8"))
        return stop()

    assert train(watched, look_on).exit_code == 143
    assert 'http-equiv="refresh"' in seen[0]
    assert f"step 3 of {STEPS}" in seen[0]
    assert "The run was stopped with exit code 143" in page.read_text(encoding="utf-8")
    assert train(watched).run_dir == run_dir
    last = page.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in last
    assert "The run is complete." in last
    assert sorted(path.suffix for path in run_dir.iterdir() if path.name.startswith("report")) == [".html"]
    shown = reader(str(run_dir / "tensorboard")).Reload()
    for kind in ("train", "validation"):
        losses = [(event.step, event.tensor_proto.float_val[0]) for event in shown.Tensors(f"{kind}/loss")]
        assert losses == [(r["step"], pytest.approx(r["loss"])) for r in metrics(run_dir, kind)]
    # Watching changes nothing.
    assert_same_bits(run_dir, train(replace(config, run_name="unwatched")).run_dir)


def test_a_missing_package_is_reported_before_anything_is_written(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Run pip install wandb, or remove wandb from --report-to"):
        train(replace(config, report_to=("wandb",)))
    assert not (tmp_path / "runs").exists()
