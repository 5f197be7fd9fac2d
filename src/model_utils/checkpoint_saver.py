"""Saving checkpoints during training, and the disk space they need.

The training loop waits for a copy of the tensors; a thread writes and verifies them.
"""

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from src.model import LLM
from src.model_utils import checkpoint_utils
from src.model_utils.adamw_opt import is_hidden_matrix
from src.model_utils.checkpoint_utils import checkpoint_steps, step_dir
from src.params import CheckpointConfig, Config
from src.utils.errors import NonFiniteError, StorageError
from src.utils.files import bytes_below, free_bytes, size_text
from src.utils.handle_ddp import outside_environment

Parts = dict[str, dict[str, torch.Tensor]]

# How long the end of a run waits for the command after the last save. Less after a stop, which often has a time limit.
AFTER_SAVE_SECONDS, AFTER_STOP_SECONDS = 600.0, 30.0
_HEADER_BYTES = 140  # of a tensor in a safetensors file: name, type, shape and place
_SMALL_FILES_BYTES = 12_000  # a process's random states, state.json and manifest.json
MAKE_ROOM = (
    "free some space, set TEMP_DATA_DIR to another disk, or keep fewer checkpoints with --checkpoint.keep-last and "
    "--checkpoint.keep-every-steps"
)


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, verified by reading it back."""

    path: Path
    step: int
    bytes: int
    seconds: float
    """Time until the last check passed. Older checkpoints are removed after that."""
    held_up_seconds: float
    """The training loop's wait for the previous save and for the copy."""


class CheckpointSaver:
    """Saves and prunes under `root`, a run's checkpoints folder, one save at a time. For one process only.

    Keeps a copy of the saved tensors in CPU memory, page-locked if they come from a GPU.
    """

    def __init__(self, root: Path, settings: CheckpointConfig, before: Callable[[], None] = lambda: None) -> None:
        """`before` runs in the saving thread before each save."""
        self.root, self.settings, self.before = root, settings, before
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Saved] | None = None
        self._verified: set[int] = set()
        self._copies: Parts = {}

    def start(self, step: int, parts: Parts, state: dict[str, Any]) -> list[Saved]:
        """Copies `parts` (file name to tensors) and starts saving them with `state` as the checkpoint of `step`.

        First waits for the previous save; returns and raises like `wait`. Does nothing if the step has a checkpoint.
        """
        started = time.perf_counter()
        saved = self.wait()
        if step_dir(self.root, step).exists():
            return saved
        self._copy(parts)
        held_up = time.perf_counter() - started
        self._saving = self._pool.submit(self._save, step, state, held_up)
        return saved

    @property
    def failed(self) -> bool:
        """True once a save has failed; `wait` raises its error."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def finished(self) -> list[Saved]:
        """The save that succeeded since the last call, if any; does not wait."""
        return self.wait() if self._saving is not None and self._saving.done() and not self.failed else []

    def wait(self) -> list[Saved]:
        """Waits for the current save and returns it, unless it was returned before.

        Raises StorageError if it could not be written, NonFiniteError if it held infinities or NaN.
        """
        saving, self._saving = self._saving, None
        return [] if saving is None else [saving.result()]

    def close(self) -> None:
        """Waits for the current save and ignores its result."""
        self._pool.shutdown()

    def _copy(self, parts: Parts) -> None:
        old, self._copies = self._copies, {}
        for part, tensors in parts.items():
            copies = self._copies[part] = {}
            for name, tensor in tensors.items():
                copy = old.get(part, {}).get(name)  # reused, because page-locking memory is slow
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _save(self, step: int, state: dict[str, Any], held_up: float) -> Saved:
        started = time.perf_counter()
        bad = [
            f"{part}: {name}"
            for part, tensors in self._copies.items()
            for name, tensor in tensors.items()
            # Not torch.isfinite, which would start a second team of OpenMP threads. With more threads than cores, the
            # teams stop spinning between operations: every later step of a small model took 15 to 20% longer.
            if tensor.is_floating_point() and not np.isfinite(tensor.numpy()).all()
        ]
        if bad:
            raise NonFiniteError(
                f"Cannot save the checkpoint of step {step}: {len(bad)} of its tensors hold infinities or NaN, first "
                f"{bad[0]}. Earlier ones are untouched. Restart with a lower --optim.max-lr or a longer "
                "--optim.warmup-steps under another --run-name."
            )
        self.before()  # here, in the thread, so that the loop does not wait for a slow disk
        size = checkpoint_utils.save_checkpoint(self.root, step, self._copies, state)
        self._verified.add(step)
        seconds = held_up + time.perf_counter() - started
        checkpoint_utils.prune(self.root, self.settings.keep_last, self.settings.keep_every_steps, self._verified)
        return Saved(step_dir(self.root, step), step, size, seconds, held_up)


class AfterSave:
    """Runs the user's command after each save, one at a time; training waits for it only at the end.

    If saves end while the command runs, it runs again afterwards, for the newest save only.
    """

    def __init__(self, command: str, run_dir: Path, warn: Callable[[str], None]) -> None:
        self.command, self.run_dir, self.warn = command, run_dir, warn
        self._next: Saved | None = None
        self._thread: Thread | None = None
        self._warnings: list[str] = []  # from the thread, for the log, which only the loop writes

    def add(self, saves: list[Saved]) -> None:
        """Queues the newest save for `poll`."""
        if saves and self.command:
            self._next = saves[-1]

    def poll(self) -> None:
        """Logs the warnings of finished commands, and starts one for the newest save if none is running."""
        while self._warnings:
            self.warn(self._warnings.pop(0))
        if self._next and not self._runs():
            # A daemon, so that a command that hangs cannot keep the run from ending.
            self._thread = Thread(target=self._serve, args=(self._next,), daemon=True)
            self._next = None
            self._thread.start()

    def close(self, seconds: float) -> None:
        """Waits up to `seconds` for the commands of all saves. One that still runs then is left running."""
        end = time.monotonic() + seconds
        self.poll()
        if self._runs():
            self.warn(f"waiting at most {seconds:g} s for the command after the save")
        while self._thread and self._runs() and time.monotonic() < end:
            self._thread.join(end - time.monotonic())
            self.poll()
        if self._runs():
            self.warn("warning: the command after the save still runs; it is left running")

    def _runs(self) -> bool:
        return bool(self._thread and self._thread.is_alive())

    def _serve(self, saved: Saved) -> None:
        names = {"CHECKPOINT": f"checkpoints/{saved.path.name}", "STEP": str(saved.step), "RUN_NAME": self.run_dir.name}
        options: dict[str, Any] = {"cwd": self.run_dir, "env": outside_environment() | names}
        options |= {"stdin": subprocess.DEVNULL, "stdout": 2}  # stderr; stdout is for results
        try:
            # A separate session, so that Ctrl-C and a stop of the run don't interrupt a copy.
            code = subprocess.call(["sh", "-c", self.command], start_new_session=True, **options)
        except (OSError, ValueError) as error:
            self._warnings.append(f"warning: Cannot start the command after the save: {error}. Training continues.")
            return
        if code:
            end = f"exit code {code}" if code > 0 else f"signal {-code}"
            self._warnings.append(f"warning: the command after the save failed with {end}: {self.command}")


def checkpoint_bytes(config: Config) -> int:
    """Approximate bytes of one checkpoint: float32 weights, the optimizer's moments, and small files."""
    with torch.device("meta"):
        weights = dict(LLM(config.model).named_parameters())
    has_muon = config.optim.optimizer == "muon"
    tensors = sum(w.nbytes * (2 if has_muon and is_hidden_matrix(name) else 3) for name, w in weights.items())
    # Headers for each weight, its two moments and its step count.
    return tensors + 4 * len(weights) * _HEADER_BYTES + _SMALL_FILES_BYTES


def checkpoints_need(config: Config, root: Path) -> int:
    """Bytes that the run will need under `root`, its checkpoints folder, in addition to those there now.

    The maximum that the folder will hold at once, including the checkpoint being written, minus what it holds now.
    Checkpoints that the run sets aside, to resume from an earlier step, stay.
    """
    size, resume, every = checkpoint_bytes(config), config.resume, config.checkpoint.every_steps
    now = {step: bytes_below(step_dir(root, step)) for step in checkpoint_steps(root) if resume != "never"}
    if resume.isdecimal():
        now = {step: held for step, held in now.items() if step <= int(resume)}
    start = max(now, default=0)
    planned = [*range(start - start % every + every, config.total_steps, every)]
    planned += [config.total_steps] if start < config.total_steps else []
    if not planned:
        return 0
    # Each save leaves at least as many as before, except the first one if the run is to keep fewer than until now.
    before, last, multiple = [*now, *planned[:-1]], config.checkpoint.keep_last, config.checkpoint.keep_every_steps
    kept = [step for step in before[:-last] if multiple and step % multiple == 0] + before[-last:]
    more_at_last_save = sum(now.get(step, size) for step in kept) + size - sum(now.values())
    leftovers = sum(bytes_below(path) for path in root.glob("step_*.*-*") if ".set-aside-" not in path.name)
    return max(0, max(size, more_at_last_save) - leftovers)


def refuse_full_disk(config: Config, run_dir: Path) -> None:
    """Raises StorageError if the run's checkpoints cannot fit on the disk of `run_dir`."""
    root = run_dir / "checkpoints"  # may be a mount point or a link to another disk
    needed, free = checkpoints_need(config, root), free_bytes(root)
    if needed > free:
        raise StorageError(
            f"Cannot hold the run's checkpoints on the disk of {root}: they need {needed:,} bytes more, {free:,} "
            f"are free, and one takes {size_text(checkpoint_bytes(config))}. Choose one: {MAKE_ROOM}."
        )
