"""The processes of a run: their start and end, who is who, and decisions that all of them share.

One process needs no launcher. Under torchrun, RANK is this process among all of them and decides the
data; LOCAL_RANK is its place on this machine and decides the device, and who reads what only the machine has.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed

from src.utils.errors import PeerError, UserError
from src.utils.hardware import choose_device

# Longer than any single step or save, short enough to notice a lost process the same hour.
COLLECTIVE_TIMEOUT = timedelta(minutes=20)

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among its peers. Every method must be called by all of them together."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in exactly one process of the run, the one that writes files."""
        return self.rank == 0

    @property
    def is_machines_first(self) -> bool:
        """True in one process of each machine, the one that looks after what may be the machine's own: its disks."""
        return self.local_rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """True where `flag` is true in any process."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """The main process's value, everywhere."""
        if self.world_size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def main_only(self, action: Callable[[], T]) -> T:
        """Runs `action` in the main process; all get its result. If it fails, all of them raise."""
        return cast(T, self.from_main(self.together(lambda: action() if self.is_main else None)))

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` in every process. If it fails in any, all raise: an error that several have met, in one only.

        The others, and those where it went well, raise a PeerError that ends them in the same way.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as raised:
            error = raised
        failure = None if error is None else (str(error), getattr(error, "exit_code", None))
        failures = self.gather(failure)
        if error is not None and failure not in failures[: self.rank]:
            raise error
        for foreign in failures:
            if foreign is not None:
                raise PeerError(*foreign)
        return cast(T, result)


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Joins the process group that torchrun describes in the environment, if any, and leaves it at the end.

    `device` is auto, cpu, cuda or mps. Raises UserError for a device that isn't there.
    """
    rank, local_rank, n_processes = _from_environment("RANK", 0), _from_environment("LOCAL_RANK", 0), world_size()
    _stop_with_launcher()
    if n_processes > 1 and device in ("auto", "mps") and torch.backends.mps.is_available():
        if device == "mps":
            raise UserError(f"device mps serves one process, not {n_processes}; start one, or use --train.device cpu")
        device = "cpu"  # no backend connects several processes through MPS
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if n_processes > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        # The store outlives the processes. Started again, they would find the addresses of the dead.
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=n_processes, timeout=COLLECTIVE_TIMEOUT
        )
    # Leaving the group waits for the others. After an error they may be stuck in a collective that this process
    # will never join, so then it just ends, and the launcher ends them.
    yield Processes(rank, local_rank, n_processes, chosen)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _stop_with_launcher() -> None:
    """Where Linux can, SIGTERM for this process once its launcher dies; else it would train on, and hold the run."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def world_size() -> int:
    """How many processes the environment says there are; one without torchrun."""
    return _from_environment("WORLD_SIZE", 1)


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} is {value!r}, not a number; torchrun sets it, or unset it")
    return int(value)
