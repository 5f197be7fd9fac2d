"""The pictures of a run show what its log says, and are of that run alone."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.lines import Line2D

from assets import published_curve
from assets.curves import hellaswag, loss, main, read_metrics, training_metrics, write_pictures
from src.model_assessment.hellaswag import HELD_OUT_PROTOCOL
from src.model_assessment.run_history import published_run
from src.utils.errors import UserError
from src.utils.plot_style import STYLE
from src.utils.root import ROOT

PNG = b"\x89PNG\r\n"


def records(steps: int) -> list[dict[str, Any]]:
    """A run that logs each step, one gradient norm and one speed far off the others."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        train = {"loss": 3 + 8 / step, "lr": 1e-3 * step / steps, "grad_norm": 50.0 if step == 1 else 0.5}
        speed = {"tokens_per_second": 10.0 if step == 7 else 2_000.0, "tokens_seen": 512 * step}
        lines.append({"kind": "train", "step": step, "time": float(step), **train, **speed})
    for step in (0, steps):
        lines.append({"kind": "validation", "step": step, "time": 0.0, "loss": 3.5 + 7 * (step == 0)})
    return lines


def answers(protocol: str) -> list[dict[str, Any]]:
    common = {"kind": "hellaswag", "time": 0.0, "total": 10_042, "stderr": 0.005, "protocol": protocol}
    return [{**common, "step": 0, "acc_norm": 0.25}, {**common, "step": 400, "acc_norm": 0.3125}]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def drawn(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xydata(), dtype=np.float64)


def test_command_takes_a_metrics_file_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = write(tmp_path / "best.jsonl", records(40) + answers("hellaswag-mean-logprob"))
    monkeypatch.setattr(sys, "argv", ["curves", str(file), "--out", str(tmp_path / "out")])
    main()
    made = json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"]
    assert made == ["loss.png", "training_metrics.png", "hellaswag.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(PNG) for name in made)


def test_losses_as_logged_and_the_end_in_numbers(tmp_path: Path):
    figure = loss(read_metrics(write(tmp_path / "metrics.jsonl", records(20)).parent))
    assert figure
    training, validation = figure.axes[0].lines
    np.testing.assert_allclose(drawn(training)[:, 1], 3 + 8 / np.arange(1, 21))
    assert drawn(validation).tolist() == [[0, 10.5], [20, 3.5]]
    assert training.get_label() == "training, 3.400 at the end"
    assert validation.get_label() == "validation, 3.500 at the end"
    assert figure.axes[0].get_xlabel() == "step of 512 tokens"


def test_long_runs_are_smoothed_and_their_start_does_not_flatten_them(tmp_path: Path):
    lines = records(400)
    lines[199]["loss"] = 9.0  # one spike
    run = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    losses, metrics = loss(run), training_metrics(run)
    assert losses
    assert metrics
    raw, smoothed, _ = losses.axes[0].lines
    assert drawn(raw)[199, 1] == 9.0
    assert 3 < drawn(smoothed)[199, 1] < 3.1
    assert losses.axes[0].get_ylim()[1] < 11  # of 11 at the first step
    rate, norm, speed = metrics.axes
    np.testing.assert_allclose(drawn(rate.lines[0])[:, 1], 1e-3 * np.arange(1, 401) / 400)  # nothing to smooth
    assert norm.get_ylim()[1] < 1
    assert speed.get_ylim() == (0, pytest.approx(1.08 * 2_000))


@pytest.mark.parametrize(
    ("protocol", "title"),
    [
        ("hellaswag-mean-logprob", "HellaSwag accuracy"),
        (HELD_OUT_PROTOCOL, "Multiple choice, a stand-in for HellaSwag"),
    ],
)
def test_only_hellaswag_is_called_so(protocol: str, title: str, tmp_path: Path):
    with matplotlib.rc_context(STYLE):
        figure = hellaswag(read_metrics(write(tmp_path / "metrics.jsonl", answers(protocol))))
    assert figure
    assert figure.axes[0].get_title(loc="left") == title
    assert figure.axes[0].get_ylabel() == "accuracy, 10,042 items"
    assert "31.25% at the end" in figure.axes[0].get_legend_handles_labels()[1]


def test_the_published_curve_ends_as_its_log_and_the_small_run_is_called_another_size():
    """The reference's last validation loss is 2.8063 (its log)."""
    with matplotlib.rc_context(STYLE):
        published, small = published_curve.draw(published_run(), read_metrics(ROOT / "assets" / "showcase")).axes
    tokens, loss = drawn(published.lines[1])[-1]
    assert (round(tokens / 1e9, 1), round(loss, 4)) == (10.0, 2.8063)
    assert small.get_title(loc="left") == "Another size on other data"
    assert "5.27" in [text.get_text() for text in small.texts]


def test_pictures_of_another_run_do_not_stay(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hellaswag.png").write_bytes(b"of another run")
    run = read_metrics(write(tmp_path / "metrics.jsonl", records(3)))
    assert write_pictures(run, tmp_path / "out") == ["loss.png", "training_metrics.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"loss.png", "training_metrics.png"}


def test_a_run_without_numbers_is_refused(tmp_path: Path):
    write(tmp_path / "metrics.jsonl", [{"kind": "event", "step": 0, "time": 0.0, "name": "start", "detail": ""}])
    with pytest.raises(UserError, match="no losses"):
        write_pictures(read_metrics(tmp_path), tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "nowhere")
