"""The log of a run: metrics.jsonl for programs, the console and log.txt for people, status.json for scripts.

Only the main process writes. If the log cannot be written during training, for example on a full disk, the run
continues after one warning. To resume, it has to be readable and writable, or a step would be logged twice.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from src.utils.errors import StorageError, UserError, harmless, say
from src.utils.files import open_regular, read_json, replacing, storage_errors, sync


class RunLogger:
    """The log of one run directory. In processes other than the main one, methods that write do nothing."""

    def __init__(self, run_dir: Path, is_main: bool) -> None:
        self.run_dir = run_dir
        self.is_main = is_main
        self._warned = False
        self._held: dict[Path, int] = {}
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with each record of metrics.jsonl after it is written."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Creates the run's folders and keeps them open in the block, for `check_place`. For the main process."""
        with storage_errors(self.run_dir / "checkpoints", "make the folder"):
            (self.run_dir / "checkpoints").mkdir(exist_ok=True)
            for folder in (self.run_dir, self.run_dir / "checkpoints"):
                self._held[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield
        finally:
            while self._held:
                os.close(self._held.popitem()[1])

    def check_place(self) -> None:
        """Raises StorageError if the run's paths no longer lead to the folders that `held` opened.

        After an unmount they lead nowhere, or to folders below the mount point, which would fill up unnoticed.
        """
        if self._is_lost():
            raise StorageError(
                f"Cannot write in {self.run_dir}: the folder was moved, removed or unmounted during the run. Put it "
                "back and rerun to resume."
            )

    def info(self, text: str) -> None:
        """Writes a line for people to stderr and log.txt; control characters are escaped."""
        if self.is_main:
            say(text)
            text = harmless(text, keep="\n\t")  # a sample can hold any character
            self._append("log.txt", time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) + text)

    def metric(self, kind: str, step: int, **values: Any) -> None:
        """Appends an object to metrics.jsonl; a non-finite number becomes null."""
        if self.is_main:
            record = {"kind": kind, "step": step, "time": time.time(), **values}
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            self._append("metrics.jsonl", json.dumps(finite, ensure_ascii=False))
            for listener in self.listeners:
                listener(finite)

    def event(self, name: str, step: int, detail: str, **values: Any) -> None:
        """Logs something unusual for people and programs; `values` are for programs only."""
        self.info(f"{name}: {detail}")
        self.metric("event", step, name=name, detail=detail, **values)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Replaces a file of the run directory atomically."""
        if self.is_main:
            with self._one_warning():
                self._replace(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_status(self, state: str, step: int, total_steps: int, exit_code: int | None, message: str) -> None:
        """Writes status.json: the state of the run for scripts, with a message for people."""
        status = {"state": state, "step": step, "total_steps": total_steps, "exit_code": exit_code, "message": message}
        self.write_json("status.json", {**status, "time": time.time()})

    def status(self) -> dict[str, Any]:
        """The content of status.json; empty if it is missing or damaged."""
        return self._read("status.json")

    def settings(self) -> dict[str, Any]:
        """The content of config.json, from the last start; empty if it is missing or damaged."""
        return self._read("config.json")

    def records(self) -> list[dict[str, Any]]:
        """All complete records of metrics.jsonl. Raises StorageError if the file cannot be read."""
        path, records = self.run_dir / "metrics.jsonl", list[dict[str, Any]]()
        with storage_errors(path, "read"):
            content = b""
            if os.path.lexists(path):
                with open_regular(path, os.O_RDONLY | os.O_NOFOLLOW) as file:
                    content = file.read()
        for line in content.splitlines():
            with suppress(ValueError, RecursionError, TypeError, KeyError):  # a line cut off by a kill
                record = json.loads(line.decode("utf-8", "replace"))
                if isinstance(record["kind"], str) and isinstance(record["step"], int):
                    records.append(record)
        return records

    def recorded(self) -> set[tuple[str, int]]:
        """Kind and step of everything in metrics.jsonl."""
        return {(record["kind"], record["step"]) for record in self.records()}

    def forget_after(self, step: int) -> None:
        """Drops the records of later steps, the training line of a stop, and a half-written last line.

        So a resumed run has the lines of one that never stopped. Raises StorageError if the file cannot be rewritten.
        """
        path = self.run_dir / "metrics.jsonl"
        kept = [record for record in self.records() if record["step"] <= step and not record.get("stopped")]
        with storage_errors(path):
            if self.is_main and path.exists():
                self._replace(path.name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))

    def before_save(self) -> None:
        """Syncs metrics.jsonl, so that it survives a power cut like the next checkpoint. Raises StorageError."""
        self.check_place()
        if self.is_main and (self.run_dir / "metrics.jsonl").exists():
            with self._one_warning():
                sync(self.run_dir / "metrics.jsonl")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.run_dir / name)
        except (OSError, UserError):
            return {}

    def _is_lost(self) -> bool:
        try:
            # fstat of the open folders, because some network file systems renumber inodes.
            return not all(os.path.samestat(os.fstat(held), os.stat(folder)) for folder, held in self._held.items())
        except OSError:
            return True

    def _replace(self, name: str, text: str) -> None:
        if self._is_lost():
            return
        path, content = self.run_dir / name, text.encode("utf-8", errors="replace")
        try:
            with replacing(path) as file:
                file.write(content)
        except OSError:
            if name == "status.json":  # even a full disk can overwrite the old file, and scripts rely on it
                with suppress(OSError), open_regular(path, os.O_RDWR | os.O_NOFOLLOW) as file:
                    file.truncate(file.write(content) or 0)
            raise

    def _append(self, name: str, line: str) -> None:
        if self._is_lost():
            return
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW  # a link could lead to one of the user's files
        with self._one_warning(), open_regular(self.run_dir / name, flags) as file:
            end, rest = file.seek(0, os.SEEK_END), memoryview((line + "\n").encode("utf-8", errors="replace"))
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)  # half a line would spoil the next one, once there is room
                raise

    @contextmanager
    def _one_warning(self) -> Iterator[None]:
        """Turns the first OSError in such a block into a warning, and drops the others."""
        try:
            yield
        except OSError as error:
            if self._warned:
                return
            self._warned = True
            say(f"warning: Cannot write the log in {self.run_dir}: {error.__cause__ or error}. Training continues.")
