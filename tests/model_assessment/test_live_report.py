"""The report of a run that goes on: made beside it, now and then, and never in its way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from src.model_assessment import live_report
from src.model_assessment.live_report import LiveReport
from src.utils.root import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")


@pytest.fixture
def words() -> list[str]:
    return []


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "time": time.time(), "loss": 2.0}))
    (tmp_path / "metrics.jsonl").open("a").write("\n")
    return tmp_path


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_report, "EVERY_SECONDS", 0.0)


def instead(monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """Python programs in place of the report's, one after the other; they start in the run's folder."""
    left = iter(programs)
    monkeypatch.setattr(
        live_report,
        "command",
        lambda run_dir, niceness: [sys.executable, "-c", f"import os; os.chdir({str(run_dir)!r})\n{next(left)}"],
    )


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def child_of(report: LiveReport) -> "subprocess.Popen[bytes]":
    assert report._process is not None
    return report._process


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@linux
def test_the_page_is_made_by_a_process_that_is_in_nobodys_way(run_dir: Path, words: list[str], at_once: None):
    report = LiveReport(run_dir, words.append)
    with open(run_dir / "lock", "w") as held:
        os.set_inheritable(held.fileno(), True)
        report.refresh()
        pid = child_of(report).pid
        wait_for(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 19)
        assert os.getsid(pid) == pid  # no Ctrl-C of ours
        assert held.name not in [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        report.refresh()
        assert child_of(report).pid == pid  # one at a time
    child_of(report).wait(60)
    assert "Training loss: 2.000" in (run_dir / "report.html").read_text()
    report.close()
    assert words == []


def test_the_first_comes_after_a_minute_and_the_next_when_they_take_a_hundredth(
    run_dir: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
):
    now, used = 1_000.0, 0.0
    monkeypatch.setattr(live_report.time, "monotonic", lambda: now)
    monkeypatch.setattr(live_report, "_children_cpu_seconds", lambda: used)
    instead(monkeypatch, "", "")
    started = []
    report = LiveReport(run_dir, words.append)
    for second in range(300):
        now = 1_000.0 + second
        before = report._process
        if before is not None:
            before.wait()
            poll = before.poll

            def took(poll: Callable[[], int | None] = poll) -> int | None:
                nonlocal used
                used += 1.5
                return poll()

            before.poll = took  # type: ignore[method-assign]
        report.refresh()
        if report._process is not None and report._process is not before:
            started.append(second)
    assert started == [60, 210]  # 1.5 s are a hundredth of 150 s
    assert words == []


def test_at_the_end_a_page_under_way_is_given_up_and_the_last_one_made(
    run_dir: Path, words: list[str], at_once: None, monkeypatch: pytest.MonkeyPatch
):
    slow = "open(f'report.html.{os.getpid()}.tmp', 'w').write('half'); import time; time.sleep(60)"
    instead(monkeypatch, slow, "open('report.html', 'w').write('last')")
    (run_dir / "report.html").write_text("before")
    report = LiveReport(run_dir, words.append)
    report.refresh()
    first = child_of(report).pid
    wait_for((run_dir / f"report.html.{first}.tmp").exists)
    report.close()
    assert not is_alive(first)
    assert (run_dir / "report.html").read_text() == "last"
    assert not list(run_dir.glob("*.tmp"))
    assert words == []


def test_a_last_page_that_takes_too_long_is_given_up(run_dir: Path, words: list[str], monkeypatch: pytest.MonkeyPatch):
    instead(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(live_report, "END_SECONDS", 0.2)
    (run_dir / "report.html").write_text("before")
    started = time.monotonic()
    LiveReport(run_dir, words.append).close()
    assert time.monotonic() - started < 10
    assert words == ["warning: report.html could not be made anew (not done after 0 s); training goes on"]


def test_a_short_run_leaves_no_page(run_dir: Path, words: list[str]):
    report = LiveReport(run_dir, words.append)
    report.refresh()
    report.close()
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


def test_pages_that_fail_are_one_warning(
    run_dir: Path, words: list[str], at_once: None, monkeypatch: pytest.MonkeyPatch
):
    instead(monkeypatch, *["import sys; print('first'); sys.exit('no room')"] * 2)
    report = LiveReport(run_dir, words.append)
    for _ in range(2):
        report.refresh()
        child_of(report).wait()
        monkeypatch.setattr(report, "_started", -1e9)
    report.close()
    assert words == ["warning: report.html could not be made anew (no room); training goes on"]


def test_a_page_that_cannot_be_started_is_one_warning(
    run_dir: Path, words: list[str], at_once: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(live_report, "command", lambda run_dir, niceness: [str(run_dir / "nothing")])
    report = LiveReport(run_dir, words.append)
    report.refresh()
    report.refresh()
    report.close()
    assert len(words) == 1
    assert "training goes on" in words[0]


@linux
def test_it_dies_with_the_run(run_dir: Path):
    child = (
        "import os, time; from src.model_assessment import live_report as l, report\n"
        "report.write_report = lambda run_dir: time.sleep(60)\nl.run_report(os.getppid(), 19, '.')"
    )
    run = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    run += "print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_for(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 19)
        time.sleep(0.3)  # until it sleeps
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not is_alive(pid), 5.0)
