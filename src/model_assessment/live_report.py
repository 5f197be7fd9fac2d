"""report.html while a run goes on: made anew now and then by a process of its own.

python -m src.model_assessment.live_report PARENT NICENESS RUN_DIR is what that one runs, until process PARENT is gone.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from src.utils.errors import exit_with
from src.utils.root import ROOT
from src.utils.stop_signals import follow_parent

EVERY_SECONDS = 60.0
SHARE = 0.01  # of one core, that reports may take; where one takes longer, the next comes later
END_SECONDS = 8.0  # for the last one, for which the run waits
LOWEST = 19  # as priorities are counted


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
            self._start(niceness=LOWEST)

    def close(self) -> None:
        """Ends a report under way, so that it does not come after a later one, and writes the last one if there is any.

        A run too short for its first report leaves none.
        """
        if self._process is not None:
            self._end_process()
        if (self._run_dir / "report.html").exists():
            self._start(niceness=0)
            if self._process is not None:
                try:
                    self._process.wait(END_SECONDS)
                    self._ended()
                except subprocess.TimeoutExpired:
                    self._fail(f"not done after {END_SECONDS:.0f} s")
                    self._end_process()

    def _start(self, niceness: int) -> None:
        try:
            self._words = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
            # A session of its own: Ctrl-C asks the run to stop, which then ends this process. Nothing of ours is open
            # in it, the run's lock least of all.
            self._process = subprocess.Popen(
                command(self._run_dir, niceness),
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
        unfinished = f"*.{self._process.pid}.tmp"
        self._process = None
        for path in (*self._run_dir.glob(unfinished), *self._run_dir.glob(f"plots/{unfinished}")):
            with suppress(OSError):
                path.unlink()

    def _fail(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"warning: report.html could not be made anew ({why}); training goes on")


def command(run_dir: Path, niceness: int) -> list[str]:
    """What makes the report, as a child of this process."""
    module = "src.model_assessment.live_report"
    return [sys.executable, "-m", module, str(os.getpid()), str(niceness), str(run_dir.absolute())]


def _children_cpu_seconds() -> float:
    """Of all child processes that have ended and been looked at."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_report(parent: int, niceness: int, run_dir: str) -> None:
    """The child's part."""
    os.nice(niceness)
    follow_parent(parent, signal.SIGKILL)  # it has nothing to save
    from src.model_assessment import report  # with matplotlib, which the run itself does without

    report.write_report(Path(run_dir))


if __name__ == "__main__":
    exit_with(lambda: run_report(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
