"""Views of a running training: TensorBoard, Weights & Biases, and report.html regenerated regularly.

All are optional extras. One that fails is dropped with a warning, and training continues.
"""

import importlib.util
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from src.utils.errors import UserError
from src.utils.logger import RunLogger
from src.utils.root import ROOT

Record = dict[str, Any]  # a line of metrics.jsonl
Tracker: TypeAlias = "TensorBoard | WeightsAndBiases"

REPORT_SECONDS = 120.0  # between two reports, each of which takes a few seconds of one core at the lowest priority
LAST_REPORT_SECONDS = 8.0  # how long the end of a run waits for its last report
WANDB_PROJECT = "lf-llm"
WANDB_START_SECONDS, WANDB_END_SECONDS = 30.0, 20.0  # a run must end although the network is gone
MEASURED = ("train", "validation", "hellaswag", "checkpoint")  # kinds of records that hold numbers


def require_packages(names: Iterable[str]) -> None:
    """Raises UserError if the package of a tracker is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a run's folder named wandb would pass as a package without files
            raise UserError(
                f"Cannot report to {name}: its package is not installed. "
                f"Run pip install {name}, or remove {name} from --report-to."
            )


class Watching:
    """Feeds the trackers in `report_to` from `log` and regenerates report.html, until `close`.

    Each start replays all of metrics.jsonl. So a tracker also has what was logged before it was requested, and after a
    resume from an earlier checkpoint TensorBoard has each step once. `settings`: the content of config.json. Processes
    other than the main one do nothing.
    """

    def __init__(self, log: RunLogger, report_to: Iterable[str], run_name: str, settings: dict[str, Any]) -> None:
        self._log = log
        self._trackers: dict[str, Tracker] = {}
        self._samples: list[Record] = []  # of the step that is being sampled
        self._report: subprocess.Popen[bytes] | None = None
        self._report_started = time.monotonic()
        self._report_failed = False
        self._is_open = log.is_main
        if not self._is_open:
            return
        for name in dict.fromkeys(report_to):
            try:
                if name == "tensorboard":
                    self._trackers[name] = TensorBoard(log.run_dir)
                else:
                    self._trackers[name] = WeightsAndBiases(log.run_dir, run_name, settings, log.info)
            except (Exception, SystemExit) as error:  # wandb may try to end the program
                self._drop(name, error)
        if self._trackers:
            for record in log.records():
                self._write(record)
            log.listeners.append(self._write)

    def refresh(self) -> None:
        """Starts to regenerate report.html if it is time. Does not wait for it."""
        if not self._is_open or (self._report and self._report.poll() is None):
            return
        self._check_report()
        if time.monotonic() >= self._report_started + REPORT_SECONDS:
            self._report_started = time.monotonic()
            self._start_report(niceness=19)

    def close(self) -> None:
        """Closes the trackers and brings an existing report.html up to date. A second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self._write_samples()
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()
        if self._report:
            self._report.kill()  # it would overwrite the last one
            self._report.wait()
            self._report = None
        if (self._log.run_dir / "report.html").exists():
            self._start_report(niceness=0)
            if self._report:
                with suppress(subprocess.TimeoutExpired):
                    self._report.wait(LAST_REPORT_SECONDS)
                    self._check_report()

    def _write(self, record: Record) -> None:
        """Hands on a record. Samples are kept until those of their step are together."""
        if self._samples and (record["kind"], record["step"]) != ("sample", self._samples[0]["step"]):
            self._write_samples()
        if record["kind"] == "sample":
            self._samples.append(record)
        elif record["kind"] in MEASURED:
            values = {
                f"{record['kind']}/{name}": float(value)
                for name, value in record.items()
                if name not in ("kind", "step", "time") and isinstance(value, int | float) and abs(value) < 1e300
            }
            self._each(lambda tracker: tracker.numbers(record, values))

    def _write_samples(self) -> None:
        samples, self._samples = self._samples, []
        if samples:
            self._each(lambda tracker: tracker.texts(samples[0]["step"], samples))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except (Exception, SystemExit) as error:
                del self._trackers[name]
                self._drop(name, error)
                with suppress(Exception, SystemExit):
                    tracker.close()

    def _drop(self, name: str, error: BaseException) -> None:
        cause = _first_line(error)
        self._log.info(f"warning: Cannot report to {name}: {cause}. Training continues; see metrics.jsonl.")

    def _start_report(self, niceness: int) -> None:
        # A separate process, because drawing takes seconds of CPU and must never crash training. Ctrl-C does not reach
        # it in its own session.
        command = ["nice", "-n", str(niceness), sys.executable, "-m", "src.model_assessment.report"]
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with suppress(OSError):  # too many processes, say: the next one may succeed
            run_dir = str(self._log.run_dir.absolute())
            self._report = subprocess.Popen([*command, run_dir], cwd=ROOT, start_new_session=True, **quiet)

    def _check_report(self) -> None:
        """Warns once if a report has failed."""
        code, self._report = self._report.returncode if self._report else 0, None
        if code and not self._report_failed:
            self._report_failed = True
            command = f"python -m src.model_assessment.report {self._log.run_dir}"
            self._log.info(f"warning: Cannot regenerate report.html: exit code {code}. Run `{command}` to see why.")


class TensorBoard:
    """Event files in the run's folder tensorboard, for `tensorboard --logdir`."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Purging from step 0 makes TensorBoard forget what earlier starts wrote. Their files stay: an open TensorBoard
        # would not find its way from a deleted file to the next.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=0, flush_secs=5)

    def numbers(self, record: Record, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, record["step"], walltime=record.get("time"))

    def texts(self, step: int, samples: list[Record]) -> None:
        # TensorBoard renders Markdown. Indented by four, every line is code, whatever it holds. Lines end where any
        # program may think so.
        lines = []
        for sample in samples:
            text = " | ".join(_prompt_and_rest(sample))
            lines += [*re.split(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", text), ""]
        markdown = "\n".join(f"    {line}" for line in lines)
        self._writer.add_text("samples", markdown, step, walltime=samples[0].get("time"))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases. Without a key or a server it is kept in the run's folder wandb, for `wandb sync`."""

    def __init__(self, run_dir: Path, run_name: str, settings: dict[str, Any], say: Callable[[str], None]) -> None:
        import wandb

        self._wandb = wandb
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT") or WANDB_PROJECT,
            "name": run_name,
            "id": _lasting_id(run_dir / "wandb" / "id.txt"),
            "resume": "allow",
            "dir": str(run_dir),
            "config": settings,
            "settings": wandb.Settings(
                console="off", silent=True, init_timeout=WANDB_START_SECONDS, finish_timeout=WANDB_END_SECONDS
            ),
        }
        try:
            # Without a key `init` would ask for one on the terminal.
            has_key = bool(os.environ.get("WANDB_MODE")) or wandb.login(prompt=False)
            cause = "" if has_key else "there is no API key (WANDB_API_KEY, or wandb login)"
            self._run = wandb.init(**options, mode=None if has_key else "offline")
        except Exception as error:
            cause = f"connecting failed ({_first_line(error)})"  # no network, or a wandb without `prompt`
            self._run = wandb.init(**options, mode="offline")
        self._last = self._run.step
        if self._run.offline:
            because = f" because {cause}" if cause else ""
            say(f"wandb: offline{because}; `wandb sync '{self._run.settings.sync_dir}'` sends it later")
        else:
            say(f"wandb: {self._run.url}")

    def numbers(self, record: Record, values: dict[str, float]) -> None:
        self._send(record["step"], values)

    def texts(self, step: int, samples: list[Record]) -> None:
        rows = [_prompt_and_rest(sample) for sample in samples]
        self._send(step, {"samples": self._wandb.Table(columns=["prompt", "text"], data=rows)})

    def close(self) -> None:
        self._run.finish()

    def _send(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._last:  # wandb refuses earlier steps: replayed ones, or a checkpoint saved in the background
            self._last = step
            self._run.log(values, step=step)


def _lasting_id(path: Path) -> str:
    """The id by which wandb recognises this run folder after a resume, even at another place."""
    with suppress(OSError):
        if existing := path.read_text(encoding="ascii").strip():
            return existing
    new = uuid.uuid4().hex[:12]
    path.parent.mkdir(exist_ok=True)
    path.write_text(new + "\n", encoding="ascii")
    return new


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _prompt_and_rest(sample: Record) -> list[str]:
    prompt = str(sample.get("prompt"))
    return [prompt, str(sample.get("text")).removeprefix(prompt)]
