"""Views of a run during training: TensorBoard, Weights & Biases, and a regularly regenerated report.html.

All are optional. If one fails, it is dropped with a warning and training continues.
"""

import importlib.util
import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from src.model_assessment.run_history import Record, number
from src.utils.errors import UserError
from src.utils.handle_ddp import outside_environment
from src.utils.logger import RunLogger
from src.utils.root import ROOT

REPORT_SECONDS = 120.0  # between two reports, each of which takes a few seconds of one core at the lowest priority
LAST_REPORT_SECONDS = 8.0  # how long the end of a run waits for its last report
WANDB_START_SECONDS, WANDB_END_SECONDS = 30.0, 20.0  # so that a run ends even if the network is down
MEASURED = ("train", "validation", "hellaswag", "checkpoint")  # kinds of records that hold numbers


def require_packages(names: Iterable[str]) -> None:
    """Raises UserError if the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"Cannot report to {name}: its package is not installed. "
                f"Run pip install {name}, or remove {name} from --report-to."
            )


class Watching:
    """Feeds the trackers in `report_to` from `log` and regenerates report.html, until `close`.

    Each start replays all of metrics.jsonl. So a tracker also gets records from before it was requested, and after a
    resume from an earlier checkpoint TensorBoard has each step once. `settings`: the content of config.json. Processes
    other than the main one do nothing.
    """

    def __init__(self, log: RunLogger, report_to: Iterable[str], run_name: str, settings: dict[str, Any]) -> None:
        self._log = log
        self._trackers: dict[str, TensorBoard | WeightsAndBiases] = {}
        self._samples: list[Record] = []  # of the current step
        self._report: subprocess.Popen[bytes] | None = None
        self._report_due = time.monotonic() + REPORT_SECONDS
        self._report_failed = False
        self._is_open = log.is_main
        if not self._is_open:
            return
        for name in report_to:
            with self._may_fail(name):
                if name == "tensorboard":
                    self._trackers[name] = TensorBoard(log.run_dir)
                else:
                    self._trackers[name] = WeightsAndBiases(log.run_dir, run_name, settings, log.info)
        if self._trackers:
            for record in log.records():
                self._write(record)
            log.listeners.append(self._write)

    def refresh(self) -> None:
        """Starts regenerating report.html if it is due. Does not wait for it."""
        if not self._is_open or time.monotonic() < self._report_due or (self._report and self._report.poll() is None):
            return
        if self._report and self._report.returncode and not self._report_failed:
            self._report_failed = True
            command = f"python -m src.model_assessment.report {self._log.run_dir}"
            cause = f"exit code {self._report.returncode}"
            self._log.info(f"warning: Cannot regenerate report.html: {cause}. Run `{command}` to see why.")
        self._report_due = time.monotonic() + REPORT_SECONDS
        with suppress(OSError):  # perhaps too many processes; the next attempt may succeed
            self._report = self._start_report()

    def close(self) -> None:
        """Closes the trackers and updates an existing report.html. A second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self._write_samples()
        self._each(lambda tracker: tracker.close())
        if self._report:
            self._report.kill()  # it would overwrite the last report
            self._report.wait()
        if (self._log.run_dir / "report.html").exists():
            with suppress(OSError, subprocess.TimeoutExpired):
                self._start_report().wait(LAST_REPORT_SECONDS)

    def _write(self, record: Record) -> None:
        """Sends a record to the trackers. Samples are kept until their step is complete."""
        if self._samples and (record["kind"], record["step"]) != ("sample", self._samples[0]["step"]):
            self._write_samples()
        if record["kind"] == "sample":
            self._samples.append(record)
        elif record["kind"] in MEASURED:
            measured = {name: number(record[name]) for name in record if name not in ("kind", "step", "time")}
            values = {f"{record['kind']}/{name}": value for name, value in measured.items() if math.isfinite(value)}
            self._each(lambda tracker: tracker.numbers(record, values))

    def _write_samples(self) -> None:
        samples, self._samples = self._samples, []
        if samples:
            rows = [(str(s.get("prompt")), str(s.get("text")).removeprefix(str(s.get("prompt")))) for s in samples]
            self._each(lambda tracker: tracker.texts(samples[0], rows))

    def _each(self, action: Callable[["TensorBoard | WeightsAndBiases"], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._may_fail(name):
                action(tracker)

    @contextmanager
    def _may_fail(self, name: str) -> Iterator[None]:
        """Drops the tracker with a warning if the block fails."""
        try:
            yield
        except (Exception, SystemExit) as error:  # wandb may try to end the program
            self._trackers.pop(name, None)
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._log.info(f"warning: Cannot report to {name}: {cause}. Training continues; see metrics.jsonl.")

    def _start_report(self) -> subprocess.Popen[bytes]:
        # A separate process, because drawing takes seconds of CPU and could crash. In a separate session, Ctrl-C does
        # not reach it.
        command = ["nice", "-n", "19", sys.executable, "-m", "src.model_assessment.report"]
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        run_dir = str(self._log.run_dir.absolute())
        env = outside_environment() | {"OMP_NUM_THREADS": "1"}
        env.pop("PYTHONSAFEPATH", None)  # it looks for its module in the current folder
        return subprocess.Popen([*command, run_dir], cwd=ROOT, env=env, start_new_session=True, **quiet)


class TensorBoard:
    """Event files in the run's folder tensorboard, for `tensorboard --logdir`."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Purging from step 0 makes TensorBoard forget what earlier starts wrote. Their files stay, because an open
        # TensorBoard does not continue from a deleted file to the next.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=0, flush_secs=5)

    def numbers(self, record: Record, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, record["step"], walltime=record.get("time"))

    def texts(self, record: Record, rows: list[tuple[str, str]]) -> None:
        # TensorBoard renders Markdown. Indented by four, every line is code, whatever it contains.
        lines = [line for row in rows for line in [*" | ".join(row).splitlines(), ""]]
        markdown = "\n".join(f"    {line}" for line in lines)
        self._writer.add_text("samples", markdown, record["step"], walltime=record.get("time"))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases. Without a key, it is stored in the run's folder wandb for `wandb sync`."""

    def __init__(self, run_dir: Path, run_name: str, settings: dict[str, Any], say: Callable[[str], None]) -> None:
        import wandb

        self._wandb = wandb
        # With this id, wandb recognises the run folder after a resume, even if it was moved.
        id_file = run_dir / "wandb" / "id.txt"
        id_file.parent.mkdir(exist_ok=True)
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="ascii")
        # Without a key `init` would ask for one on the terminal.
        has_key = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lf-llm"),
            name=run_name,
            id=id_file.read_text(encoding="ascii").strip(),
            resume="allow",
            dir=str(run_dir),
            config=settings,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=WANDB_START_SECONDS, finish_timeout=WANDB_END_SECONDS
            ),
            mode=None if has_key else "offline",
        )
        self._last = self._run.step
        sync = f"offline; `wandb sync '{self._run.settings.sync_dir}'` sends it later"
        say(f"wandb: {sync if self._run.offline else self._run.url}")

    def numbers(self, record: Record, values: dict[str, Any]) -> None:
        if record["step"] >= self._last:  # wandb refuses earlier steps, such as replayed ones
            self._last = record["step"]
            self._run.log(values, step=self._last)

    def texts(self, record: Record, rows: list[tuple[str, str]]) -> None:
        self.numbers(record, {"samples": self._wandb.Table(columns=["prompt", "text"], data=rows)})

    def close(self) -> None:
        self._run.finish()
