"""Other programs to watch a run with: they get what metrics.jsonl has, each step once, and cannot harm the run."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from src.model_assessment import trackers as sinks
from src.model_assessment.trackers import require_packages
from src.model_assessment.watching import Watching
from src.utils.errors import UserError
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


def test_a_missing_package_is_refused_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    require_packages([])
    with pytest.raises(UserError, match="--report-to wandb needs the package wandb: pip install wandb"):
        require_packages(["wandb"])


def test_tensorboard_has_each_step_once_also_after_a_kill(tmp_path: Path):
    # what TensorBoard itself reads with
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator").EventAccumulator
    run_dir = tmp_path / "run"
    before, _ = watch(run_dir)  # what was measured before it was asked for
    some_steps(before, 1)
    killed, _ = watch(run_dir, "tensorboard")
    some_steps(killed, 2, 3, 4)  # and never closed
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

    def __init__(self, step: int = 0, fails: bool = False) -> None:
        super().__init__("wandb")
        self.step, self.fails = step, fails
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

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


def test_wandb_works_offline_where_there_is_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    wandb = fake(monkeypatch, FakeWandb())
    log, watching = watch(tmp_path / "run", "wandb")
    some_steps(log, 1, 2)
    log.metric("checkpoint", 1, bytes=5)  # of a save in the background
    watching.close()
    assert wandb.started["mode"] == "offline"
    assert "offline because there is no API key" in capsys.readouterr().err
    assert (wandb.started["project"], wandb.started["name"], wandb.started["resume"]) == ("lf-llm", "name", "allow")
    assert wandb.started["config"] == {"config": {"train": {"seed": 1}}}
    table = (["prompt", "text"], [["prompt", f"{HOSTILE} at 1"], ["prompt", " and more"]])
    assert wandb.logged[:3] == [
        (1, {"train/loss": 9.0, "train/memory_gb": 1.5}),
        (1, {"validation/perplexity": 2.5}),
        (1, {"samples": table}),
    ]
    assert [step for step, _ in wandb.logged] == [1, 1, 1, 2, 2, 2]
    assert wandb.finished == 1


def test_wandb_knows_the_run_again_and_gets_only_what_it_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
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


def test_wandb_is_offline_where_its_server_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    wandb = fake(monkeypatch, FakeWandb())
    start = wandb.init

    def unanswered(**started: Any) -> FakeWandb:
        if started["mode"] is None:
            raise OSError("deadline exceeded")
        return start(**started)

    monkeypatch.setattr(wandb, "init", unanswered)
    log, watching = watch(tmp_path / "run", "wandb")
    some_steps(log, 1)
    watching.close()
    assert len(wandb.logged) == 3
    assert "offline because the server does not answer (deadline exceeded)" in capsys.readouterr().err


def test_the_real_wandb_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("wandb")
    log, watching = watch(tmp_path / "run", "wandb")
    some_steps(log, 1, 2)
    watching.close()
    assert "left out" not in capsys.readouterr().err
    # Its own process fills the file, a busy machine's some time later.
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_a_folder_of_a_packages_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="pip install wandb"):
        require_packages(["wandb"])


@pytest.mark.parametrize("place", ["NETRC", "home"])
def test_a_key_of_wandb_login_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    path = tmp_path / (".netrc" if place == "home" else "elsewhere")
    path.write_text("machine other.test login user password x\n")
    path.chmod(0o600)
    if place == "NETRC":
        monkeypatch.setenv("NETRC", str(path))
    assert not sinks._has_wandb_key()
    path.write_text("machine api.wandb.ai login user password x\n")
    assert sinks._has_wandb_key()


def test_a_sink_that_fails_is_one_warning_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    failing = fake(monkeypatch, FakeWandb(fails=True))
    log, watching = watch(tmp_path / "run", "wandb")
    kept = FakeWandb()
    assert watching._sinks is not None
    other = watching._sinks._open["other"] = sinks.WeightsAndBiases.__new__(sinks.WeightsAndBiases)
    vars(other).update(_wandb=kept, _run=kept, _last=0)
    some_steps(log, 1, 2)
    watching.close()
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warned == ["warning: wandb is left out of this run from here on: no space left; metrics.jsonl has it all"]
    assert (len(kept.logged), failing.finished) == (6, 1)
    assert len(log.records()) == 9


def test_a_sink_that_cannot_be_opened_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    wandb = fake(monkeypatch, FakeWandb())
    monkeypatch.setattr(wandb, "init", lambda **started: sys.exit("wandb wants to end the program"))
    log, watching = watch(tmp_path / "run", "wandb", "wandb")
    some_steps(log, 1)
    watching.close()
    assert capsys.readouterr().err.count("wandb is left out of this run from here on: wandb wants to end") == 1


def test_other_processes_open_nothing(tmp_path: Path):
    log = RunLogger(tmp_path, is_main=False)
    watching = Watching(log, ["tensorboard", "wandb"], "name", {})
    watching.refresh()
    watching.close()
    assert list(tmp_path.iterdir()) == []
