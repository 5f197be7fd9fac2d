"""report.html while a run goes on: made anew now and then by a process of its own, of the lowest priority.

python -m src.utils.live_report PARENT RUN_DIR      what that process runs: the report, until process PARENT is gone
"""

import ctypes
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from src.utils.root import ROOT

EVERY_SECONDS = 60.0
SHARE = 0.01  # of one core, that reports may take; where one takes longer, the next comes later
END_SECONDS = 60.0  # for the last one


class LiveReport:
    """Refreshes the report of `run_dir`; `warn` hears of the first failure. For one thread."""

    def __init__(self, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._warn = warn
        self._warned = False
        self._started = time.monotonic()
        self._wait = EVERY_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        self._words: IO[bytes] | None = None
        """What the process says."""

    def refresh(self) -> None:
        """Starts a process that writes the report, if it is time and none is under way; does not wait for it."""
        if self._process is not None:
            cpu_seconds = _children_cpu_seconds()
            if self._process.poll() is None:
                return
            self._wait = max(EVERY_SECONDS, (_children_cpu_seconds() - cpu_seconds) / SHARE)
            self._ended()
        if time.monotonic() >= self._started + self._wait:
            self._started = time.monotonic()
            self._start()

    def close(self) -> None:
        """Ends a report under way, so that it does not come after a later one, and writes the last one if there is any.

        A run too short for its first report leaves none.
        """
        if self._process is not None:
            self._end_process()
        if (self._run_dir / "report.html").exists():
            self._start()
            if self._process is not None:
                try:
                    self._process.wait(END_SECONDS)
                    self._ended()
                except subprocess.TimeoutExpired:
                    self._fail(f"not done after {END_SECONDS:.0f} s")
                    self._end_process()

    def _start(self) -> None:
        try:
            self._words = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
            # A session of its own: Ctrl-C asks the run to stop, which then ends this process. Nothing of ours is open
            # in it, the run's lock least of all.
            self._process = subprocess.Popen(
                command(self._run_dir),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._words,
                start_new_session=True,
            )
        except OSError as error:
            self._process = None
            self._fail(str(error))

    def _ended(self) -> None:
        """Looks at how the process has ended."""
        assert self._process is not None
        assert self._words is not None
        if self._process.returncode:
            self._words.seek(0)
            said = self._words.read().decode("utf-8", "replace").strip().splitlines()
            self._fail(said[-1] if said else f"exit code {self._process.returncode}")
        self._words.close()
        self._process = None

    def _end_process(self) -> None:
        assert self._process is not None
        self._process.kill()  # it has nothing to save
        self._process.wait()
        self._process = None
        for unfinished in (*self._run_dir.glob("report.html.tmp"), *self._run_dir.glob("plots/*.tmp")):
            with suppress(OSError):
                unfinished.unlink()

    def _fail(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"warning: report.html could not be made anew ({why}); training goes on")


def command(run_dir: Path) -> list[str]:
    """What makes the report, as a child of this process."""
    return [sys.executable, "-m", "src.utils.live_report", str(os.getpid()), str(run_dir.absolute())]


def _children_cpu_seconds() -> float:
    """Of all child processes that have ended and been looked at."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_report(parent: int, run_dir: str) -> None:
    """The child's part."""
    os.nice(19)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # gone before that
        return
    sys.argv = ["report", run_dir]
    runpy.run_module("src.model_assessment.report", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_report(int(sys.argv[1]), sys.argv[2])
