"""Other programs that a run can be watched with: TensorBoard and Weights & Biases, installed by those who want them.

They are fed from the records of metrics.jsonl, at each start all of them again: so they also have what was measured
before they were asked for. TensorBoard then holds each step once, whatever a kill or going back to a checkpoint did;
wandb takes no step again, so that after going back it keeps the first figures of a step. One that fails is worth a
warning and is then left out; the run goes on.
"""

import importlib.util
import os
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from src.utils.errors import UserError

Record = dict[str, Any]

PROJECT = "lf-llm"  # the runs' place at Weights & Biases; WANDB_PROJECT names another
# A run must end though its network is gone. What was not sent then lies in its folder, for `wandb sync`.
WANDB_START_SECONDS, WANDB_END_SECONDS = 30.0, 20.0
MEASURED = ("train", "validation", "hellaswag", "checkpoint")  # kinds of records that hold numbers


class Sink(Protocol):
    """One such program. Any of its methods may raise anything."""

    def numbers(self, step: int, values: dict[str, float], time: float) -> None:
        """Quantities by names such as train/loss."""

    def texts(self, step: int, samples: Sequence[tuple[str, str]], time: float) -> None:
        """What the model wrote at a step: prompts, and the texts that begin with them."""

    def flush(self) -> None:
        """What it was given is on the disk or on its way, or it raises."""

    def close(self) -> None:
        """Nothing comes after this."""


def require_packages(names: Iterable[str]) -> None:
    """Raises UserError where a package is not installed that `Sinks.open` would need for one of `names`."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # wandb's own folder here would do for a package without files
            raise UserError(f"--report-to {name} needs the package {name}: pip install {name}, or leave {name} out")


class Sinks:
    """Those of one run. `warn` hears of each that fails."""

    def __init__(self, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._warn = warn
        self._open: dict[str, Sink] = {}
        self._samples: list[Record] = []
        """Of one step, not handed on yet."""
        self._is_live = False

    def open(self, names: Iterable[str], run_name: str, settings: dict[str, Any], past: Iterable[Record]) -> None:
        """Opens those in `names` and hands them the records that the run has so far. `settings`: its config.json."""
        for name in dict.fromkeys(names):
            try:
                if name == "tensorboard":
                    self._open[name] = TensorBoard(self._run_dir)
                else:
                    self._open[name] = WeightsAndBiases(self._run_dir, run_name, settings, self._warn)
            except (Exception, SystemExit) as error:  # wandb may end the program
                self._drop(name, error)
        if self._open:
            for record in past:
                self.write(record)
            self._each(lambda sink: sink.flush())
            self._is_live = True

    def write(self, record: Record) -> None:
        """Hands on a record, or keeps it until the samples of its step are together."""
        if not self._open:
            return
        if self._samples and (record["kind"], record["step"]) != ("sample", self._samples[0]["step"]):
            self._write_samples()
        if record["kind"] == "sample":
            self._samples.append(record)
            return
        if record["kind"] in MEASURED:
            values = {
                f"{record['kind']}/{name}": float(value)
                for name, value in record.items()
                if name not in ("kind", "step", "time") and isinstance(value, int | float)
            }
            self._each(lambda sink: sink.numbers(record["step"], values, record["time"]))
            self._flush()

    def close(self) -> None:
        self._write_samples()
        self._each(lambda sink: sink.close())
        self._open.clear()

    def _write_samples(self) -> None:
        if self._samples:
            samples, self._samples = self._samples, []
            texts = [(sample["prompt"], sample["text"]) for sample in samples]
            self._each(lambda sink: sink.texts(samples[-1]["step"], texts, samples[-1]["time"]))
            self._flush()

    def _flush(self) -> None:
        """After each record, so that a failure shows and a kill loses nothing; not while earlier ones are repeated."""
        if self._is_live:
            self._each(lambda sink: sink.flush())

    def _each(self, action: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            try:
                action(sink)
            except (Exception, SystemExit) as error:
                del self._open[name]
                self._drop(name, error)
                with suppress(Exception, SystemExit):
                    sink.close()

    def _drop(self, name: str, error: BaseException) -> None:
        words = f"{name} is left out of this run from here on: {_first_line(error)}"
        self._warn(f"warning: {words}; metrics.jsonl has it all")


class TensorBoard:
    """Event files in the run's folder tensorboard, for `tensorboard --logdir`."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets what earlier starts of this run wrote, since all of it is written again. Their files stay:
        # one that is looking on would not find the way from a deleted file to the next.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=0)

    def numbers(self, step: int, values: dict[str, float], time: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)

    def texts(self, step: int, samples: Sequence[tuple[str, str]], time: float) -> None:
        # TensorBoard shows Markdown. Indented, all of it is code, and nothing in it markup.
        lines = [line for prompt, text in samples for line in (*_lines(f"{prompt} | {_rest(prompt, text)}"), "")]
        self._writer.add_text("samples", "\n".join(f"    {line}" for line in lines), step, walltime=time)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, or its files in the run's folder wandb, where `wandb sync` finds them."""

    def __init__(self, run_dir: Path, run_name: str, settings: dict[str, Any], say: Callable[[str], None]) -> None:
        import wandb

        self._wandb = wandb
        # It would ask for a key on the terminal.
        without_key = not os.environ.get("WANDB_MODE") and not _has_wandb_key()
        start = partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run_name,
            id=_lasting_id(run_dir / "wandb" / "id.txt"),
            resume="allow",
            dir=str(run_dir),
            config=settings,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=WANDB_START_SECONDS,
                finish_timeout=WANDB_END_SECONDS,
            ),
        )
        why = " because there is no API key (WANDB_API_KEY, or wandb login)" if without_key else ""
        try:
            self._run = start(mode="offline" if without_key else None)
        except Exception as error:
            if without_key:
                raise
            why = f" because the server does not answer ({_first_line(error)})"
            self._run = start(mode="offline")
        self._last = self._run.step
        """Earlier steps it has from before, and would refuse."""
        if self._run.offline:
            say(f"wandb: offline{why}; `wandb sync '{self._run.settings.sync_dir}'` sends it later")
        else:
            say(f"wandb: {self._run.url}")

    def numbers(self, step: int, values: dict[str, float], time: float) -> None:
        self._log(step, values)

    def texts(self, step: int, samples: Sequence[tuple[str, str]], time: float) -> None:
        rows = [[prompt, _rest(prompt, text)] for prompt, text in samples]
        self._log(step, {"samples": self._wandb.Table(columns=["prompt", "text"], data=rows)})

    def flush(self) -> None:
        pass  # a process of its own sends what it is given

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._last:  # it takes no earlier ones, such as those of a checkpoint saved in the background
            self._last = step
            self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _has_wandb_key() -> bool:
    """Whether there is a key for the server, where wandb looks for one; nothing of it is kept."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with suppress(OSError, NetrcParseError):
            if netrc(os.path.expanduser(path)).authenticators(host):
                return True
    return False


def _lasting_id(path: Path) -> str:
    """The name by which wandb knows this run folder again, also once it lies elsewhere."""
    with suppress(OSError):
        if known := path.read_text(encoding="ascii").strip():
            return known
    new = uuid.uuid4().hex[:12]
    path.parent.mkdir(exist_ok=True)
    path.write_text(new + "\n", encoding="ascii")
    return new


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rest(prompt: str, text: str) -> str:
    return text.removeprefix(prompt)


def _lines(text: str) -> list[str]:
    """Whatever anybody takes for the end of a line: none may begin without its indent."""
    return re.split(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", text)
