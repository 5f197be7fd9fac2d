"""The report says what the run's files say, whatever state they are in, and can do no harm."""

import base64
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from src.model_assessment import report_figures
from src.model_assessment.report import write_comparison, write_index, write_report
from src.model_assessment.run_history import Series, read_run
from src.model_configs.my_llm_config import debug
from src.utils import plot_style, root
from src.utils.errors import StorageError, UserError
from src.utils.root import ROOT
from tests.model_assessment.reported_runs import PLOTS, START, STEPS, Page, append, make_run, metrics, rewrite


def drawn(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "plots").iterdir()}


def running(folder: Path, silent: float, **settings: Any) -> Path:
    """A run at step 250 of 1,000 whose last line is `silent` seconds old."""
    make_run(folder, derived={"total_steps": 4 * STEPS}, **settings)
    late = time.time() - silent - max(line["time"] for line in metrics())
    rewrite(folder, [line | {"time": line["time"] + late} for line in metrics()])
    (folder / "status.json").write_text(json.dumps({"state": "running", "time": time.time() - silent}))
    return folder


@pytest.fixture(autouse=True, scope="module")
def _coarse_pictures() -> Iterator[None]:
    """Nobody looks at them here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_style, "_DOTS_PER_INCH", 40)
        yield


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longest."""
    monkeypatch.setattr(report_figures, "as_png", lambda figure: b"")
    monkeypatch.setattr(report_figures, "as_svg", lambda figure: b"")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run, reported."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "debug")
    write_report(folder)
    return folder


def test_the_page_says_what_the_metrics_say(finished: Path) -> None:
    page = Page(finished / "report.html")
    raw = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in raw if line["kind"] == "validation"][-1]
    *_, before, final = [line["loss"] for line in raw if line["kind"] == "train"]
    speeds = sorted(line["tokens_per_second"] for line in raw if line["kind"] == "train")
    for expected in (
        "with 17.1M parameters, trained from scratch on pydocs",
        "250 steps on 1.02M tokens in 3 min 21 s on Intel Xeon 2.80GHz",  # 250 x 4,096; 1 s + 250 x 0.8 s
        "The run is complete.",
        f"validation loss is {last['loss']:.3f} nats",
        f"Perplexity {math.exp(last['loss']):.1f}",
        f"Bits per byte {last['loss'] / math.log(2) / 3.1:.3f}",
        f"nats per token, {6.482 - last['loss']:.3f} below the unigram entropy",
        f"Training loss {(before + final) / 2:.3f} mean of the last 20 steps",
        "Held-out choice accuracy is 49.0% ± 5.0%; guessing gives 25%.",
        "stand-in items made from held-out validation documents; not HellaSwag",
        "Settings that differ from the preset debug setting this run debug",
        f"optim.max_lr 0.002 {debug().optim.max_lr}",
        "step 200, 819,200 tokens",
        f"{speeds[len(speeds) // 2]:,.0f} tokens/s, median",
        "Intel Xeon 2.80GHz",
        "optim",
        "clip_grad_norm",
        "50,257",
        "1e-05",
    ):
        assert expected in page.text, expected
    assert drawn(finished) == PLOTS
    assert all((finished / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    assert len(page.images()) == len(PLOTS)
    assert ("meta", "http-equiv", "refresh") not in page.attributes


@pytest.mark.usefixtures("no_pictures")
def test_a_model_no_better_than_token_frequencies_is_called_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bad", init_from={"path": "/runs/first", "step": 9})
    rewrite(folder, [{"kind": "validation", "step": 5, "time": START, "loss": 6.6, "unigram_entropy": 6.5}])
    page = Page(write_report(folder)).text
    assert "does not beat the unigram entropy of 6.500 yet" in page
    assert "trained from the weights of /runs/first on pydocs" in page


def test_samples_of_the_first_and_the_last_step_stand_side_by_side(finished: Path) -> None:
    page = Page(finished / "report.html")
    row = "The function returns a new list of the items gob lamps Vern 88"  # the prompt once, not in each text
    assert row in page.text
    assert "prompt step 250 step 0" in page.text
    assert "steps between: 1 step 125 prompt step 125 The function returns a new list of the items" in page.text


def test_the_page_refers_to_nothing_outside(finished: Path) -> None:
    page = Page(finished / "report.html")
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert not re.search(r"url\(|@import|https?://", page.html)
    assert "script" not in page.tags
    assert "link" not in page.tags


@pytest.mark.usefixtures("no_pictures")
def test_a_running_page_says_how_long_it_takes_and_reloads(tmp_path: Path) -> None:
    page = Page(write_report(running(tmp_path / "run", silent=5.0)))
    assert ("meta", "http-equiv", "refresh") in page.attributes
    assert ("i", "style", "width: 25.00%") in page.attributes
    assert "step 250 of 1,000, 25.0%" in page.text
    assert "The run was in progress when this page was made." in page.text
    left = re.search(r"(\d+) min (\d+) s left, done about (.{23})", page.text)
    assert left
    # 750 steps of 0.8 s, of which 5 s are gone
    assert 60 * int(left[1]) + int(left[2]) == pytest.approx(750 * 0.8 - 5, abs=3)
    end = datetime.strptime(left[3], "%Y-%m-%d %H:%M:%S %Z").replace(tzinfo=timezone.utc).timestamp()
    assert end == pytest.approx(time.time() + 595, abs=4)


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_run_is_not_called_running(tmp_path: Path) -> None:
    page = Page(write_report(running(tmp_path / "killed", silent=11 * 60)))
    assert ("b", "class", "silent") in page.attributes
    assert "status is running, but it has written nothing for 11 min 0 s: it may have been killed." in page.text
    assert ("meta", "http-equiv", "refresh") not in page.attributes
    assert "left, done about" not in page.text


@pytest.mark.parametrize(
    ("kinds", "plots"),
    [
        ({"event", "sample"}, set()),
        ({"validation"}, {"loss"}),
        ({"hellaswag"}, {"multiple_choice"}),
        ({"train"}, PLOTS - {"multiple_choice"}),
        (set(), {"loss", "learning_rate", "gradient_norm", "speed", "memory"}),  # a single line
    ],
)
def test_what_was_not_measured_is_not_drawn(tmp_path: Path, kinds: set[str], plots: set[str]) -> None:
    folder = make_run(tmp_path / "partial")
    for name in ("config.json", "status.json"):
        (folder / name).write_text('{"half')
    first = next(line for line in metrics() if line["kind"] == "train")
    rewrite(folder, [line for line in metrics() if line["kind"] in kinds] or [first])
    page = Page(write_report(folder))
    assert drawn(folder) == plots
    assert len(page.images()) == len(plots)
    assert "nan" not in page.text.replace("partial", "")


@pytest.mark.usefixtures("no_pictures")
def test_losses_that_are_not_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "diverged")
    broken = itertools.cycle([math.nan, math.inf, None, "?", 10**400])
    lines = [line | {"loss": next(broken)} if "loss" in line and line["step"] > 100 else line for line in metrics()]
    rewrite(folder, lines)
    status = {"state": "failed", "step": STEPS, "exit_code": 3, "message": "not finite for 20 steps in a row"}
    (folder / "status.json").write_text(json.dumps(status))
    page = Page(write_report(folder))
    assert "The run failed with exit code 3: not finite for 20 steps in a row." in page.text
    assert "The last validation loss is missing or not finite." in page.text
    assert len(page.images()) == len(PLOTS)
    rewrite(folder, [line | {"loss": next(broken)} if "loss" in line else line for line in lines])
    assert len(Page(write_report(folder)).images()) == len(PLOTS) - 1


@pytest.mark.usefixtures("no_pictures")
def test_runs_compared(finished: Path, tmp_path: Path) -> None:
    config = json.loads((finished / "config.json").read_text())["config"]
    other = make_run(tmp_path / "other $x^{$", config=config | {"optim": config["optim"] | {"max_lr": 0.001}})
    lines = [line | {"protocol": "HellaSwag"} if line["kind"] == "hellaswag" else line for line in metrics()]
    rewrite(other, [line | {"loss": line["loss"] - 1} if "loss" in line else line for line in lines])
    page = Page(write_comparison([finished, other, finished]))
    assert page.text.startswith("3 runs compared Pretraining, several runs")
    mine = [line["loss"] for line in metrics() if line["kind"] == "validation"][-1]
    other_value = f"{mine - 1:.3f} nats/token (-1.000)"
    assert f"Validation loss {mine:.3f} nats/token {other_value} {mine:.3f} nats/token (+0.000)" in page.text
    assert "setting debug (1) other $x^{$ debug (3) optim.max_lr 0.002 0.001 0.002 Key figures" in page.text
    assert "Do not compare accuracies of different protocols." in page.text
    assert len(page.images()) == len(PLOTS)
    assert "The function returns a new list of the items a new list of the items" in page.text
    assert Page(finished / "report.html").text.startswith("debug Pretraining report")
    assert not (other / "report.html").exists()
    with pytest.raises(UserError, match="more than 7 look alike"):
        write_comparison([finished] * 8)


@pytest.mark.usefixtures("no_pictures")
def test_a_stand_in_within_its_error_of_chance_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rewrite(folder, [line | {"acc_norm": 0.33} if line["kind"] == "hellaswag" else line for line in metrics()])
    text = Page(write_report(folder)).text
    assert "choice" not in text
    assert drawn(folder) == PLOTS - {"multiple_choice"}


def test_norms_by_layer_cost_and_values_at_each_place(tmp_path: Path) -> None:
    config = {"price_per_gpu_hour": 18.0}
    folder = make_run(tmp_path / "run \x1b\udcff", config=config, derived={"total_steps": 2 * STEPS, "world_size": 2})
    norms = {"layer_grad_norms": [0.25, 0.125, 7.5]}
    rewrite(folder, [line | norms if line["kind"] == "train" else line for line in metrics()])
    page = Page(write_report(folder))
    assert drawn(folder) == PLOTS | {"layer_gradient_norms"}
    assert "step 250, 1.02M tokens embedding 0.25 block 1 0.125 block 2 7.5" in page.text
    # 201 s of 2 GPUs, and as much again for the other half
    assert re.search(r"Cost \$2\.01 at 18\.00 per GPU-hour; about 4\.0\d for all steps", page.text)
    for _, name, value in page.attributes:
        if name == "src":
            ElementTree.fromstring(base64.b64decode(value.partition(",")[2]))  # or no browser shows it


def test_a_long_curve_keeps_its_spikes() -> None:
    steps: Any = np.arange(20_000.0)
    values: Any = np.sin(steps / 3_000)
    values[[777, 15_001]] = 9.0, -9.0
    points = report_figures.thinned(Series(steps, values))
    assert points.steps.size <= report_figures.MOST_POINTS
    assert {777.0, 15_001.0} <= set(points.steps)
    assert (np.diff(points.steps) > 0).all()


def test_the_index_lists_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "RUNS", tmp_path)
    make_run(tmp_path / "<b>old 50%")
    write_report(running(tmp_path / "new", silent=5.0))
    (tmp_path / "empty").mkdir()
    page = Page(write_index())
    assert page.html.count("<tr>") == 3  # the heading, and two runs with a step
    assert [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")] == ["./new/report.html"]
    assert "new running 250 of 1,000" in page.text
    assert "<b>old 50% done 250 of 250" in page.text
    assert page.text.index("new running") < page.text.index("<b>old")
    monkeypatch.setattr(root, "RUNS", tmp_path / "empty")
    with pytest.raises(UserError, match="none has made a step"):
        write_index()


@pytest.mark.usefixtures("no_pictures")
def test_events_are_marked_counted_and_cut_short(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "eventful")
    lines = [line for line in metrics() if line["kind"] == "train"]
    rewrite(folder, lines)
    event = {"kind": "event", "time": START, "name": "skipped step", "detail": "gradient norm is inf"}
    append(folder, *(event | {"step": step} for step in range(1, 501)))
    append(folder, {"kind": "event", "time": START, "step": 501, "name": "resume", "detail": "from step_0000100"})
    text = Page(write_report(folder)).text
    assert "The last 100 of 501." in text
    assert text.count("gradient norm is inf") == 99
    assert "Dotted: resumed here. Skipped steps: 500, the last 500." in text


@pytest.mark.usefixtures("no_pictures")
def test_the_published_run_can_be_compared(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine")
    page = Page(write_comparison([folder, tmp_path / "published"]))
    assert "published run done, step 19,073" in page.text
    assert "model.n_layer 4 16" in page.text
    assert "Tokens seen 1.02M 10.00B" in page.text
    with pytest.raises(UserError, match="does not exist"):
        write_comparison([folder, tmp_path / "nowhere"])


def test_runs_of_unequal_batches_are_compared_by_tokens(tmp_path: Path) -> None:
    run, other = (read_run(make_run(tmp_path / name)) for name in ("run", "other"))
    wide = [line | {"tokens_seen": line["step"] * 1e6} if line["kind"] == "train" else line for line in other.records]
    curve = report_figures.LOSSES[0]
    assert not report_figures.compared_by_tokens([run, other])
    other = replace(other, records=wide)
    assert report_figures.compared_by_tokens([run, other])
    assert report_figures.points_of(other, curve, by_tokens=True).steps[-1] == STEPS
    assert report_figures.points_of(run, curve, by_tokens=True).steps[-1] == pytest.approx(STEPS * 4_096 / 1e6)


@pytest.mark.usefixtures("no_pictures")
def test_a_page_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "plots").touch()
    with pytest.raises(StorageError, match="Cannot write"):
        write_report(folder)


# Of each kind that a damaged or hand-edited file may hold.
WRONG: tuple[Any, ...] = (None, True, -1, 0, 1e300, -1e25, 10**400, 1e-320, math.nan, "", "\ud800", "9")
WRONG += ([], [[1]], {}, {"a": {"b": [1]}})


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("seed", range(4))
def test_wrong_values_anywhere_do_not_crash_it(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    deep: Any = "end"
    for _ in range(900):
        deep = {"deep": deep} if chance.random() < 0.5 else [deep]

    def damaged(value: Any) -> Any:
        if chance.random() < 0.08:
            return chance.choice([*WRONG, deep])
        return {key: damaged(each) for key, each in value.items()} if isinstance(value, dict) else value

    folder = make_run(tmp_path / "run")
    status = {**json.loads((folder / "status.json").read_text()), "state": chance.choice(["running", "failed", None])}
    (folder / "status.json").write_text(json.dumps(damaged(status)))
    (folder / "config.json").write_text(json.dumps(damaged(json.loads((folder / "config.json").read_text()))))
    lines = [{key: damaged(each) for key, each in line.items()} for line in metrics()]
    rewrite(folder, [line | {"time": None} if seed == 0 else line for line in lines])
    page = write_report(folder).read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    write_comparison([folder, make_run(tmp_path / "good"), folder])


# As for a user id without a name, of which containers have some.
COMMAND = """
import pwd, runpy, sys
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
from src.utils import plot_style, root
plot_style._DOTS_PER_INCH = 40
sys.argv = ["report", *sys.argv[1:]]
runpy.run_module("src.model_assessment.report", run_name="report")["main"]()
assert not {"torch", "matplotlib.pyplot", "src.model"} & set(sys.modules), "imported needlessly"
"""


def test_command_needs_no_torch_no_home_and_no_settings_of_matplotlib(finished: Path, tmp_path: Path) -> None:
    expected = {picture.name: picture.read_bytes() for picture in (finished / "plots").iterdir()}
    settings = "text.usetex: True\nfont.family: nowhere\nlines.linewidth: 9\nsavefig.dpi: 7\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    hostile = {"MPLBACKEND": "module://of_a_notebook.that_is_not_installed", "MATPLOTLIBRC": str(tmp_path)}
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "MPLBACKEND", "MATPLOTLIBRC")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    environment = {**clean, **hostile, "TMPDIR": str(tmp_path)}
    folder = make_run(tmp_path / "debug")
    command = [sys.executable, "-c", COMMAND, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"report": str(folder / "report.html"), "plots": len(PLOTS)}
    assert {picture.name: picture.read_bytes() for picture in (folder / "plots").iterdir()} == expected
