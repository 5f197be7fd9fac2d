"""What a run says: metrics.jsonl for programs, the console and log.txt for people, status.json for scripts.

Only the main process writes. A log that cannot be written (a full disk) is worth one warning, not the run.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.utils.errors import console_may_fail, harmless, say
from src.utils.files import sync


class RunLogger:
    """The log of one run directory. In processes other than the main one, methods that write do nothing."""

    def __init__(self, run_dir: Path, is_main: bool) -> None:
        self.run_dir = run_dir
        self.is_main = is_main
        self._bar: tqdm | None = None
        self._warned = False
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Get each record of metrics.jsonl after it was written."""

    def info(self, text: str) -> None:
        """A line for people, on stderr and in log.txt; control characters are escaped."""
        if not self.is_main:
            return
        text = harmless(text, keep="\n\t")  # a sample's words are the model's
        with console_may_fail():
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()
        self._append("log.txt", time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) + text)

    def metric(self, kind: str, step: int, **values: Any) -> None:
        """One object in metrics.jsonl; a number that is not finite becomes null."""
        if self.is_main:
            record = {"kind": kind, "step": step, "time": time.time(), **values}
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            self._append("metrics.jsonl", json.dumps(finite, ensure_ascii=False))
            for listener in self.listeners:
                listener(finite)

    def event(self, name: str, step: int, detail: str, **values: Any) -> None:
        """Something out of the ordinary, for people and programs; `values` are for programs only."""
        self.info(f"{name}: {detail}")
        self.metric("event", step, name=name, detail=detail, **values)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A whole file of the run directory, replaced at once."""
        if self.is_main:
            self._replace(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_status(self, state: str, step: int, total_steps: int, exit_code: int | None, message: str) -> None:
        """status.json: how the run is, for scripts and in words."""
        status = {"state": state, "step": step, "total_steps": total_steps, "exit_code": exit_code, "message": message}
        self.write_json("status.json", {**status, "time": time.time()})

    def status(self) -> dict[str, Any]:
        """What status.json says; nothing where it is missing or damaged."""
        return self._read("status.json")

    def settings(self) -> dict[str, Any]:
        """What config.json says, of the last start; nothing where it is missing or damaged."""
        return self._read("config.json")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.run_dir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def start_bar(self, step: int, total_steps: int) -> None:
        """A progress bar, on a terminal only."""
        if self.is_main and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def advance_bar(self, **shown: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            with console_may_fail():
                self._bar.update()

    def close_bar(self) -> None:
        if self._bar is not None:
            with console_may_fail():
                self._bar.close()
            self._bar = None

    def recorded(self) -> set[tuple[str, int]]:
        """Kind and step of everything in metrics.jsonl."""
        return {(record["kind"], record["step"]) for record in self.records()}

    def forget_after(self, step: int) -> None:
        """Drops the records of later steps and a half-written last line, so that a resumed run repeats none."""
        if not self.is_main or not (self.run_dir / "metrics.jsonl").exists():
            return
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in self.records() if r["step"] <= step]
        self._replace("metrics.jsonl", "".join(lines), lasting=True)

    def records(self) -> list[dict[str, Any]]:
        """All that metrics.jsonl holds."""
        records = []
        try:
            with open(self.run_dir / "metrics.jsonl", encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    try:
                        record = json.loads(line)
                    except ValueError:  # a line cut off by a kill
                        continue
                    if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record:
                        records.append(record)
        except FileNotFoundError:
            pass
        return records

    def sync(self) -> None:
        """Makes metrics.jsonl survive a power cut, as the checkpoint that follows it will."""
        if self.is_main:
            try:
                sync(self.run_dir / "metrics.jsonl")
            except FileNotFoundError:
                pass  # a run that stops before its first line
            except OSError as error:
                self._warn(error)

    def _replace(self, name: str, text: str, lasting: bool = False) -> None:
        """`lasting`: a power cut leaves the old content or the new one, not an empty file."""
        temporary = self.run_dir / f"{name}.tmp"
        try:
            temporary.write_text(text, encoding="utf-8", errors="replace")
            if lasting:
                sync(temporary)
            os.replace(temporary, self.run_dir / name)
            if lasting:
                sync(self.run_dir)
        except OSError as error:
            self._warn(error)
            with suppress(OSError):
                temporary.unlink()
            if name == "status.json":  # in the room that it has: a full disk is what it should tell of
                with suppress(OSError), open(self.run_dir / name, "r+", encoding="utf-8") as file:
                    file.write(text)
                    file.truncate()

    def _append(self, name: str, line: str) -> None:
        try:
            with open(self.run_dir / name, "ab", buffering=0) as file:
                end, rest = file.tell(), memoryview((line + "\n").encode("utf-8", errors="replace"))
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(end)  # half a line would spoil the next one, once there is room
                    raise
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            say(f"warning: the log in {self.run_dir} cannot be written ({error}); training goes on")
