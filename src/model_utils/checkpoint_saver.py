"""Checkpoints saved while training goes on: the loop waits for a copy of the tensors, a thread does the rest."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from src.model_utils import checkpoint_utils
from src.params import CheckpointConfig
from src.utils.errors import NonFiniteError

Parts = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk and was read back whole."""

    path: Path
    step: int
    bytes: int
    seconds: float
    """From when it was asked for to the last check; older checkpoints are removed after that."""
    held_up_seconds: float
    """What the training loop waited for: the save before, and the copy."""


class CheckpointSaver:
    """Saves and prunes under `root`, a run's checkpoints folder, one save at a time. For one process only.

    Holds a second copy of what it saves in the machine's memory, page-locked where it comes from a GPU.
    """

    def __init__(self, root: Path, settings: CheckpointConfig, before: Callable[[], None] = lambda: None) -> None:
        """`before` runs in the thread ahead of each save."""
        self.root, self.settings, self.before = root, settings, before
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Saved] | None = None
        self._verified: set[int] = set()
        self._copies: Parts = {}

    def start(self, step: int, parts: Parts, state: dict[str, Any]) -> list[Saved]:
        """Copies `parts`, file name to tensors, and starts to save them with `state` as the checkpoint of `step`.

        Waits for the save before it, and returns what `wait` returns. Nothing is done for a step that has one already.
        Raises as `wait` does.
        """
        started = time.perf_counter()
        saved = self.wait()
        if checkpoint_utils.step_dir(self.root, step).exists():
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
        """The save that came to its good end since the last call, if any."""
        return self.wait() if self._saving is not None and self._saving.done() and not self.failed else []

    def wait(self) -> list[Saved]:
        """Waits for the save under way; returns it, unless it was returned before.

        Raises StorageError where it could not be written, NonFiniteError where it held numbers that are not finite.
        """
        saving, self._saving = self._saving, None
        return [] if saving is None else [saving.result()]

    def close(self) -> None:
        """Waits for the save under way, whatever comes of it."""
        self._pool.shutdown()

    def _copy(self, parts: Parts) -> None:
        old, self._copies = self._copies, {}
        for part, tensors in parts.items():
            copies = self._copies[part] = {}
            for name, tensor in tensors.items():
                copy = old.get(part, {}).get(name)
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
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]
        if bad:
            raise NonFiniteError(
                f"the checkpoint of step {step} was not saved: {len(bad)} of its tensors hold infinities or NaN, first "
                f"{bad[0]}; earlier ones are untouched. Start again with a lower --optim.max-lr or a longer "
                "--optim.warmup-steps under another --run-name"
            )
        self.before()
        size = checkpoint_utils.save_checkpoint(self.root, step, self._copies, state)
        self._verified.add(step)
        seconds = held_up + time.perf_counter() - started
        checkpoint_utils.prune(self.root, self.settings.keep_last, self.settings.keep_every_steps, self._verified)
        return Saved(checkpoint_utils.step_dir(self.root, step), step, size, seconds, held_up)
