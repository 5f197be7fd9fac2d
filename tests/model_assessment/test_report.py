"""The report says what the run's files say, whatever state they are in, and can do no harm."""

import itertools
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.model_assessment.report import write_comparison, write_report
from src.model_assessment.report_data import read_run
from src.model_assessment.report_text import summary
from src.utils import plot_style
from src.utils.errors import UserError
from src.utils.root import ROOT
from tests.model_assessment.reported_runs import PLOTS, START, STEPS, Page, append, make_run, metrics, rewrite


def drawn(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "plots").iterdir()}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "src.model_assessment.report", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at them here."""
    monkeypatch.setattr(plot_style, "_DOTS_PER_INCH", 40)


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
    speeds = sorted(line["tokens_per_second"] for line in raw if line["kind"] == "train")
    for expected in (
        "17.1M parameters (4.22M of them outside the embedding)",
        "250 steps on 1.02M tokens",  # 250 x 4,096
        "3 min 21 s",  # 1 s until step 0, then 250 x 0.8 s
        "on Intel Xeon 2.80GHz in 2 processes",
        "The run is complete.",
        f"validation loss is {last['loss']:.3f} nats",
        f"perplexity of {math.exp(last['loss']):.1f}",
        f"{last['loss'] / math.log(2) / 3.1:.3f} bits per byte",
        f"would give 6.482 (the unigram entropy); the model is {6.482 - last['loss']:.3f} nats better",
        "34.0% ± 4.7% of 100 items, where guessing gives 25% (a difference within two standard errors)",
        "stand-in items made from held-out validation documents; not HellaSwag",
        f"{speeds[len(speeds) // 2]:,.0f} tokens a second, median",
        "6 checkpoints were saved",
        "250 2025-06-15 15:10:01 UTC 200.0 MB 0.4 s — checkpoints/step_0000250",
        "Intel Xeon 2.80GHz",
        "optim",
        "clip_grad_norm",
        "50,257",
        "1e-05",
    ):
        assert expected in page.text, expected


def test_the_lowest_validation_loss_is_named_where_the_last_is_higher(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "overfit")
    append(folder, {"kind": "validation", "step": 260, "time": START + 300, "loss": 5.5, "perplexity": math.exp(5.5)})
    page = Page(write_report(folder))
    lowest = min(line["loss"] for line in metrics() if line["kind"] == "validation")
    assert "validation loss is 5.500 nats a token (a perplexity of 244.7) after 10.9" in page.text
    assert f"the lowest was {lowest:.3f} at step 250" in page.text


def test_a_model_no_better_than_token_frequencies_is_called_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bad")
    rewrite(folder, [{"kind": "validation", "step": 5, "time": START, "loss": 6.6, "unigram_entropy": 6.5}])
    assert "would give 6.500 (the unigram entropy); the model does not beat that yet" in Page(write_report(folder)).text


def test_pictures_are_in_the_page_and_beside_it(finished: Path) -> None:
    page = Page(finished / "report.html")
    assert drawn(finished) == PLOTS
    assert all((finished / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    assert len(page.images()) == len(PLOTS)
    first = next(line for line in metrics() if line["kind"] == "train")
    assert any(f"Training loss goes from {first['loss']:.3f} to" in alt for alt in page.images())


def test_samples_of_the_first_and_the_last_step_stand_side_by_side(finished: Path) -> None:
    page = Page(finished / "report.html")
    row = "The function returns gob lamps Vern 88 a new list of the items"  # the prompt once, not in each text
    assert row in page.text
    assert "step 0 step 250" in page.text


def test_the_page_refers_to_nothing_outside(finished: Path) -> None:
    page = Page(finished / "report.html")
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"url\(|@import|https?://", page.html)
    assert "script" not in page.tags
    assert "link" not in page.tags


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    hostile = "\"'><script>alert(1)</script><img src=http://x.test/a onerror=alert(1)>$x^$ \u202e\ud800\x00"
    config = {"run_name": hostile, hostile: {hostile: hostile}, "optim": [hostile]}
    folder = make_run(tmp_path / "hostile", config=config, **{hostile: {hostile: [hostile, {hostile: 1}]}})
    last = {"step": STEPS, "time": START + 300}
    append(
        folder,
        {"kind": "sample", **last, "prompt": hostile, "text": hostile},
        {"kind": "event", **last, "name": hostile, "detail": {hostile: hostile}},
        {"kind": "checkpoint", **last, "path": hostile},
        {"kind": "hellaswag", **last, "acc_norm": 0.3, "stderr": 0.05, "total": 100, "protocol": hostile},
    )
    (folder / "status.json").write_text(json.dumps({"state": hostile, "message": hostile}))
    for page in (Page(write_report(folder)), Page(write_comparison([folder, folder]))):
        assert "script" not in page.tags
        assert page.tags.count("img") == len(PLOTS)
        assert not any(name.startswith("on") for _, name, _ in page.attributes)
        assert "<script>alert(1)</script>" in page.text  # as words to read
        assert not set("\u202e\x00") & set(page.html)


def test_a_source_of_several_paths_is_named_once(tmp_path: Path) -> None:
    names = ["pydocs", "files", "files", "files"]
    dataset = {"name": "mine", "sources": [{"name": name} for name in names], "documents": 506, "tokens": 2_817_311}
    run = read_run(make_run(tmp_path / "run", dataset=dataset))
    assert "on mine (source pydocs and files, 506 documents, 2.82M tokens)." in summary(run, START)


def test_a_run_in_progress_with_its_last_line_cut_off(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "running")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"kind": "train", "step": 251, "lo')
    status = {"state": "running", "step": 250, "total_steps": 900, "time": time.time()}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "config.json").unlink()
    page = Page(write_report(folder))
    assert "The run was going on, at step 250 of 900" in page.text
    assert "could not be read" not in page.text
    (folder / "metrics.jsonl").write_text('{"kind": "tra\0\0\n[1, 2]\n' + whole)
    assert "2 lines of metrics.jsonl could not be read" in Page(write_report(folder)).text


def test_a_finished_run_is_not_loaded_again(finished: Path) -> None:
    page = Page(finished / "report.html")
    assert ("meta", "http-equiv", "refresh") not in page.attributes
    assert not [value for _, name, value in page.attributes if value == "progressbar"]


def test_all_samples_of_a_run_are_on_its_page(finished: Path) -> None:
    text = Page(finished / "report.html").text
    assert "1 step between step 125 prompt step 125 The function returns a new list of the items" in text


def test_more_runs_than_can_be_told_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compare at most 7 at a time"):
        write_comparison([tmp_path] * 8)


def test_a_pause_before_a_resume_is_not_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "resumed")
    before = [line for line in metrics() if line["step"] <= 100]
    resume = {"kind": "event", "step": 100, "time": START + 9_000, "name": "resume", "detail": "from step_0000100"}
    again = [line | {"time": line["time"] + 9_000 - 81} for line in metrics() if line["step"] > 100]
    rewrite(folder, [*before, resume, *again])
    steps, losses = read_run(folder).series("train", "loss")
    assert list(steps) == list(range(10, STEPS + 1, 10))
    assert losses.max() < 11
    page = Page(write_report(folder))
    # 81 s to step 100, none of the hours until the resume, and 120 s from there to step 250.
    assert "3 min 21 s" in page.text
    assert "it was resumed once" in page.text
    assert "100 resume from step_0000100" in page.text


@pytest.mark.parametrize(
    ("kinds", "plots"),
    [
        ({"event"}, set()),
        ({"sample"}, set()),
        ({"validation"}, {"loss"}),
        ({"hellaswag"}, {"multiple_choice"}),
        ({"train"}, PLOTS - {"multiple_choice"}),
        ({"checkpoint"}, set()),
    ],
)
def test_what_was_not_measured_is_not_drawn(tmp_path: Path, kinds: set[str], plots: set[str]) -> None:
    folder = make_run(tmp_path / "partial")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(b"of an earlier report")
    for name in ("config.json", "status.json"):
        (folder / name).write_text('{"half')
    rewrite(folder, [line for line in metrics() if line["kind"] in kinds])
    page = Page(write_report(folder))
    assert drawn(folder) == plots
    assert len(page.images()) == len(plots)
    assert "nan" not in page.text.replace("partial", "")


def test_one_line_is_enough(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "short")
    rewrite(folder, [next(line for line in metrics() if line["kind"] == "train")])
    page = Page(write_report(folder))
    assert drawn(folder) == {"loss", "learning_rate", "gradient_norm", "speed", "memory"}
    assert "There is no validation loss." in page.text


def test_losses_that_are_no_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "diverged")
    broken = itertools.cycle([math.nan, math.inf, None, "?", 10**400])
    lines = [line | {"loss": next(broken)} if "loss" in line and line["step"] > 100 else line for line in metrics()]
    rewrite(folder, lines)
    status = {"state": "failed", "step": STEPS, "exit_code": 3, "message": "not finite for 20 steps in a row"}
    (folder / "status.json").write_text(json.dumps(status))
    page = Page(write_report(folder))
    assert "The run failed at step 250 of 250 with exit code 3: not finite for 20 steps in a row." in page.text
    assert "The last validation loss, at step 250, is not a finite number; the lowest was" in page.text
    assert "the training loss was not a finite number in 15 of 25 lines" in page.text
    rewrite(folder, [line | {"loss": next(broken)} if "loss" in line else line for line in lines])
    assert "No validation loss was a finite number." in Page(write_report(folder)).text
    assert "loss" not in drawn(folder)


def test_runs_compared(finished: Path, tmp_path: Path) -> None:
    config = json.loads((finished / "config.json").read_text())["config"]
    other = make_run(
        tmp_path / "other", config=config | {"run_name": "$x^{$ other", "optim": config["optim"] | {"max_lr": 0.001}}
    )
    better = [
        line | {"loss": line["loss"] - 1, "protocol": "HellaSwag"} if "loss" in line else line for line in metrics()
    ]
    rewrite(other, [line | {"protocol": "HellaSwag"} if line["kind"] == "hellaswag" else line for line in better])
    (other / "report.html").write_text("its own")
    page = Page(write_comparison([finished, other, finished]))
    assert page.text.startswith("3 runs compared Pretraining, several runs")
    mine = [line["loss"] for line in metrics() if line["kind"] == "validation"][-1]
    assert f"Validation loss {mine:.3f} {mine - 1:.3f} {mine:.3f}" in page.text
    assert "setting debug (1) $x^{$ other debug (3)" in page.text  # no formula, not in the pictures either
    assert "optim.max_lr 0.002 0.001 0.002" in page.text
    assert page.text.index("optim.max_lr 0.002") < page.text.index("Key figures") < page.text.index("Curves")
    assert "train.seed" not in page.text  # is the same
    assert "run_name" not in page.text  # says nothing more than the names
    assert "But in $x^{$ other: HellaSwag. So do not compare the two runs by it." in page.text
    assert len(page.images()) == len(PLOTS)
    assert "The function returns a new list of the items a new list of the items" in page.text
    assert Page(finished / "report.html").text.startswith("debug Pretraining report")
    assert (other / "report.html").read_text() == "its own"


def test_a_run_whose_settings_are_lost_hides_no_difference_of_the_others(finished: Path, tmp_path: Path) -> None:
    config = json.loads((finished / "config.json").read_text())["config"]
    other = make_run(tmp_path / "other", config=config | {"train": config["train"] | {"seed": 7}})
    lost = make_run(tmp_path / "lost")
    (lost / "config.json").write_text("rubbish")
    text = Page(write_comparison([finished, other, lost])).text
    assert "Not known, for want of a readable config.json: those of lost." in text
    assert "train.seed 42 7" in text
    assert "optim.max_lr" not in text


def test_many_events_are_cut_short(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "eventful")
    event = {"kind": "event", "time": START, "name": "skipped step", "detail": "gradient norm is inf"}
    append(folder, *(event | {"step": step} for step in range(1, 501)))
    page = Page(write_report(folder))
    assert "401 more" in page.text  # of 500 and the start, 100 are shown
    assert page.text.count("gradient norm is inf") == 99
    assert "steps were skipped 500 times" in page.text


def test_command_says_where_the_page_is_and_needs_no_torch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "debug")
    code = (
        "import runpy, sys; sys.argv = ['report', *sys.argv[1:]]\n"
        "runpy.run_module('src.model_assessment.report', run_name='report')['main']()\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules), 'imported needlessly'\n"
        "ours = {name for name in sys.modules if name.startswith('src.') and 'report' not in name}\n"
        "allowed = 'src.model_assessment src.utils'.split()\n"
        "allowed += ['src.params', *(f'src.utils.{name}' for name in ('errors', 'root', 'terminal', 'plot_style'))]\n"
        "assert ours <= {*allowed}, ours\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"report": str(folder / "report.html"), "plots": len(PLOTS)}


def test_command_ends_with_2_where_there_is_nothing_to_report(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (["no-such-run"], "no run directory"),
        ([str(tmp_path / "empty")], "has no metrics.jsonl"),
        ([], "required: RUN"),
    ):
        result = command(*arguments)
        assert result.returncode == 2
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_a_run_without_a_complete_line_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "new")
    (folder / "metrics.jsonl").write_text('{"kind": "ev')
    with pytest.raises(UserError, match="no complete line yet"):
        write_report(folder)


def test_a_long_run_is_reported_in_seconds(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long")
    line = next(line for line in metrics() if line["kind"] == "train")
    rewrite(
        folder, [line | {"step": step, "loss": 4 + step % 7, "tokens_seen": 4_096 * step} for step in range(20_000)]
    )
    begin = time.perf_counter()
    write_report(folder)
    assert time.perf_counter() - begin < 20  # about 2 s where nothing else runs
