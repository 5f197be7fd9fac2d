"""Trackers get what metrics.jsonl has, each step once, the report is regenerated, and none of it can harm the run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from src.model_assessment import trackers
from src.model_assessment.trackers import Watching
from src.utils.logger import RunLogger

HOSTILE = "a\n<script>alert(1)</script>\r# Title\u2028<img src=x onerror=alert(1)>\n\n[x](javascript:alert(1))"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def watch(run_dir: Path, *report_to: str) -> tuple[RunLogger, Watching]:
    run_dir.mkdir(exist_ok=True)
    log = RunLogger(run_dir, is_main=True)
    return log, Watching(log, report_to, "name", {"config": {"train": {"seed": 1}}})


def some_steps(log: RunLogger, *steps: int) -> None:
    for step in steps:
        log.metric("train", step, loss=10.0 - step, mfu=None, memory_gb=1.5)
        log.metric("validation", step, loss=float("nan"), perplexity=2.5)
        for text in (f"{HOSTILE} at {step}", "prompt and more"):
            log.metric("sample", step, prompt="prompt", text=text)
    log.metric("event", steps[-1], name="stop", detail="words", windows=[1])


def test_tensorboard_has_each_step_once_also_after_a_kill(tmp_path: Path):
    # what TensorBoard itself reads with
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator").EventAccumulator
    run_dir = tmp_path / "run"
    before, _ = watch(run_dir)  # what was measured before tracking began
    some_steps(before, 1)
    killed, open_writer = watch(run_dir, "tensorboard")
    some_steps(killed, 2, 3, 4)
    board = open_writer._trackers["tensorboard"]
    assert isinstance(board, trackers.TensorBoard)
    board._writer.flush()  # but never close
    looking_on = reader(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in looking_on.Tensors("train/loss")] == [1, 2, 3, 4]
    RunLogger(run_dir, is_main=True).forget_after(2)
    again, watching = watch(run_dir, "tensorboard")
    some_steps(again, 3)
    watching.close()
    for found in (looking_on.Reload(), reader(str(run_dir / "tensorboard")).Reload()):
        losses = [(event.step, event.tensor_proto.float_val[0]) for event in found.Tensors("train/loss")]
        assert losses == [(1, 9.0), (2, 8.0), (3, 7.0)]
        tags = {"train/loss", "train/memory_gb", "validation/perplexity", "samples/text_summary"}
        assert {*found.Tags()["tensors"]} == tags
        assert all([event.step for event in found.Tensors(tag)] == [1, 2, 3] for tag in tags)
    texts = found.Tensors("samples/text_summary")
    first = killed.records()[0]
    assert found.Tensors("train/loss")[0].wall_time == pytest.approx(first["time"])
    # as TensorBoard itself would show it
    shown = pytest.importorskip("tensorboard.plugin_util").markdown_to_safe_html(texts[0].tensor_proto.string_val[0])
    assert shown.count("<") == shown.count("<pre>") * 4  # <pre><code>...</code></pre> and nothing else
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "prompt |  and more" in shown


class FakeWandb(ModuleType):
    """Keeps what it is told. `step` and `fails` are for the test to set."""

    Settings = staticmethod(lambda **settings: settings)
    Table = staticmethod(lambda columns, data: (columns, data))

    def __init__(self, step: int = 0, fails: bool = False, has_key: bool = True) -> None:
        super().__init__("wandb")
        self.step, self.fails, self.has_key = step, fails, has_key
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def login(self, prompt: bool) -> bool:
        assert not prompt  # nobody may be there to answer
        return self.has_key

    def init(self, **started: Any) -> "FakeWandb":
        self.started = started
        self.offline, self.url = started["mode"] == "offline", "https://wandb.test/run"
        self.settings = SimpleNamespace(sync_dir="folder")
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fails:
            raise OSError("no space left\nand more")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def fake(monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_wandb_works_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    wandb = fake(monkeypatch, FakeWandb(has_key=False))
    log, watching = watch(tmp_path / "run", "wandb")
    some_steps(log, 1, 2)
    log.metric("checkpoint", 1, bytes=5)  # of a save in the background
    watching.close()
    assert wandb.started["mode"] == "offline"
    assert "wandb: offline; `wandb sync 'folder'` sends it later" in capsys.readouterr().err
    assert (wandb.started["project"], wandb.started["name"], wandb.started["resume"]) == ("lf-llm", "name", "allow")
    assert wandb.started["config"] == {"config": {"train": {"seed": 1}}}
    table = (["prompt", "text"], [("prompt", f"{HOSTILE} at 1"), ("prompt", " and more")])
    assert wandb.logged[:3] == [
        (1, {"train/loss": 9.0, "train/memory_gb": 1.5}),
        (1, {"validation/perplexity": 2.5}),
        (1, {"samples": table}),
    ]
    assert [step for step, _ in wandb.logged] == [1, 1, 1, 2, 2, 2]
    assert wandb.finished == 1


def test_wandb_knows_the_run_again_and_gets_only_what_it_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = fake(monkeypatch, FakeWandb())
    some_steps(watch(tmp_path / "run", "wandb")[0], 1, 2)
    second = fake(monkeypatch, FakeWandb(step=3))
    log, _ = watch(tmp_path / "run", "wandb")
    some_steps(log, 3)
    other = fake(monkeypatch, FakeWandb())
    watch(tmp_path / "other", "wandb")
    assert first.started["id"] == second.started["id"] != other.started["id"]
    assert second.started["mode"] is None  # as the environment and wandb's settings say
    assert {step for step, _ in second.logged} == {3}


def test_the_real_wandb_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("wandb")
    log, watching = watch(tmp_path / "run", "wandb")
    some_steps(log, 1, 2)
    watching.close()
    assert "Cannot report" not in capsys.readouterr().err
    # Its own process fills the file, a busy machine's some time later.
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_a_tracker_that_fails_is_one_warning_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    failing = fake(monkeypatch, FakeWandb(fails=True))
    log, watching = watch(tmp_path / "run", "wandb")
    kept = FakeWandb()
    other = watching._trackers["other"] = trackers.WeightsAndBiases.__new__(trackers.WeightsAndBiases)
    vars(other).update(_wandb=kept, _run=kept, _last=0)
    some_steps(log, 1, 2)
    watching.close()
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warned == ["warning: Cannot report to wandb: no space left. Training continues; see metrics.jsonl."]
    assert (len(failing.logged), len(kept.logged)) == (0, 6)
    assert len(log.records()) == 9


def test_damaged_records_stop_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = fake(monkeypatch, FakeWandb())
    (tmp_path / "run").mkdir()
    damaged = [{"kind": [], "step": 1}, {"kind": "sample", "step": 1}, {"kind": "train", "step": 2, "loss": 10**400}]
    text = "".join(json.dumps(record) + "\n" for record in damaged)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    watch(tmp_path / "run", "wandb")[1].close()
    assert [step for step, _ in wandb.logged] == [1, 2]


def test_a_tracker_that_cannot_be_opened_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    wandb = fake(monkeypatch, FakeWandb())
    monkeypatch.setattr(wandb, "init", lambda **started: sys.exit("wandb wants to end the program"))
    log, watching = watch(tmp_path / "run", "wandb")
    some_steps(log, 1)
    watching.close()
    assert capsys.readouterr().err.count("Cannot report to wandb: wandb wants to end") == 1


def test_other_processes_open_nothing(tmp_path: Path):
    log = RunLogger(tmp_path, is_main=False)
    watching = Watching(log, ["tensorboard", "wandb"], "name", {})
    watching.refresh()
    watching.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    record = {"kind": "train", "step": 1, "time": time.time(), "loss": 2.0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path / "run"


def instead(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """A Python program in place of the report's."""
    start = subprocess.Popen
    monkeypatch.setattr(
        trackers.subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", program], **options)
    )


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_report_is_made_by_a_process_that_is_in_nobodys_way(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "REPORT_SECONDS", 0.0)
    _, watching = watch(run_dir)
    watching.refresh()
    report = watching._report
    assert report
    wait_for(lambda: report.poll() is not None or os.getpriority(os.PRIO_PROCESS, report.pid) == 19)
    assert os.getsid(report.pid) == report.pid  # Ctrl-C in the terminal does not reach it
    watching.refresh()
    assert watching._report is report  # one at a time
    assert report.wait(60) == 0
    assert '<figure id="loss">' in (run_dir / "report.html").read_text()


def test_at_the_end_a_report_in_progress_makes_way_for_the_last_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "REPORT_SECONDS", 0.0)
    _, watching = watch(run_dir)
    instead(monkeypatch, "import time; time.sleep(60)")
    watching.refresh()
    slow = watching._report
    assert slow
    (run_dir / "report.html").write_text("before")
    monkeypatch.undo()
    instead(monkeypatch, f"open({str(run_dir / 'report.html')!r}, 'w').write('last')")
    watching.close()
    assert slow.returncode
    assert (run_dir / "report.html").read_text() == "last"


def test_a_short_run_leaves_no_report_and_a_slow_last_one_is_not_waited_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    instead(monkeypatch, "import time; time.sleep(5)")
    monkeypatch.setattr(trackers, "LAST_REPORT_SECONDS", 0.2)
    _, watching = watch(run_dir)
    watching.refresh()
    watching.close()
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]
    (run_dir / "report.html").write_text("before")
    _, watching = watch(run_dir)
    started = time.monotonic()
    watching.close()
    assert time.monotonic() - started < 4


def test_reports_that_fail_are_one_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(trackers, "REPORT_SECONDS", 0.0)
    instead(monkeypatch, "import sys; sys.exit(4)")
    _, watching = watch(run_dir)
    for _ in range(3):
        watching.refresh()
        assert watching._report
        watching._report.wait()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(trackers.subprocess, "Popen", fails)
    watching.refresh()
    watching.close()
    assert capsys.readouterr().err.count("warning: Cannot regenerate report.html: exit code 4. Run `python -m") == 1
