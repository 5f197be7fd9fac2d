"""The processes of a run: their ranks, and the decisions they make together.

A single process needs no launcher. Under torchrun, RANK numbers this process among all of them and decides its share of
the data. LOCAL_RANK numbers it on its machine and decides its GPU.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from src.utils.errors import LostPeerError, PeerError, UserError
from src.utils.hardware import choose_device
from src.utils.stop_signals import end_at_once

HEARTBEAT_SECONDS = 1.0  # during an action that may take hours

_ended_groups: list[dist.ProcessGroup | None] = []

T = TypeVar("T")


@dataclass
class Processes:
    """This process among its peers. All processes call its methods in the same order, as most are collectives."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    activity: str = "the start"
    """The current activity, named when a collective fails."""

    @property
    def is_main(self) -> bool:
        """True in exactly one process of the run, the one that writes files."""
        return self.rank == 0

    @property
    def is_machines_first(self) -> bool:
        """True in one process of each machine, which checks that machine's disks."""
        return self.local_rank == 0

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Wraps anything that waits for other processes. Raises LostPeerError if one of them does not answer."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise LostPeerError(
                f"Cannot finish {self.activity}: another process ended or hangs ({str(error).splitlines()[0]}). Its "
                "own message, if any, comes before this one. Rerun the same command to resume from the last checkpoint."
            ) from None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        with self.collective():
            sums = torch.tensor(values, dtype=torch.float64)
            dist.all_reduce(sums)
            return sums.tolist()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a scalar over all processes, on its device, without waiting for the device."""
        if self.world_size > 1:
            with self.collective():
                dist.all_reduce(value)
        return value / self.world_size

    def any(self, flag: bool) -> bool:
        """True if `flag` is true in any process."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.collective():
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Returns the main process's value in every process."""
        if self.world_size == 1:
            return value
        values = [value]
        with self.collective():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def tensors_from_main(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the main process's tensors, on the CPU, in every process; the others' argument is ignored."""
        if self.world_size == 1:
            return tensors
        kinds = self.from_main({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        received = {}
        for name, (shape, dtype) in kinds.items():
            with self.collective():
                tensor = tensors[name] if self.is_main else torch.empty(shape, dtype=dtype)
                on_device = tensor.to(self.device)  # NCCL, the backend of GPUs, cannot send from a CPU
                dist.broadcast(on_device, src=0)
                received[name] = on_device.cpu()
        return received

    def main_only(self, action: Callable[[], T], activity: str = "") -> T:
        """Runs `action` in the main process, like `together_for_long`. All get its result; if it fails, all raise."""
        return cast(T, self.from_main(self.together_for_long(lambda: action() if self.is_main else None, activity)))

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` in every process; if it fails in any, all raise.

        The first process to meet an error raises that error. The others raise a PeerError, which ends them with the
        same exit code and without a message.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as raised:
            error = raised
        failure = None if error is None else (str(error), getattr(error, "exit_code", None))
        failures = self.gather(failure)
        if error is not None and failure not in failures[: self.rank]:  # the same message is printed once
            raise error
        for peer_failure in filter(None, failures):
            raise PeerError(*peer_failure)
        return cast(T, result)

    def together_for_long(self, action: Callable[[], T], activity: str = "") -> T:
        """Does the same as `together` for an action that may take hours, such as reading a dataset.

        It runs in a thread. The processes exchange a heartbeat every second, so the time-out of the process group
        covers that second and not the action. A process that hangs is still noticed. `activity` names the action.
        """
        self.activity = activity or self.activity
        if self.world_size == 1:
            return action()
        job: Future[T] = Future()

        def work() -> None:
            try:
                job.set_result(action())
            except BaseException as error:
                job.set_exception(error)

        Thread(target=work, name="work", daemon=True).start()  # a daemon, so that nothing waits for it after an error
        while self.any(not wait([job], HEARTBEAT_SECONDS).done):
            pass
        return self.together(job.result)


ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@contextmanager
def processes(device: str, timeout_s: float) -> Iterator[Processes]:
    """Joins the process group that torchrun describes in the environment, if any, and leaves it at the end.

    `device` is auto, cpu, cuda or mps. `timeout_s`: seconds that any collective may take. Raises UserError for a
    missing device, LostPeerError if a process does not join.
    """
    rank, local_rank, n_processes = _from_environment("RANK", 0), _from_environment("LOCAL_RANK", 0), world_size()
    if n_processes > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"Cannot start: WORLD_SIZE is {n_processes}, but torchrun is not in use. Unset it, or use torchrun."
        )
    chosen, backend = device_and_backend(device, local_rank, n_processes)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    procs = Processes(rank, local_rank, n_processes, chosen)
    if n_processes == 1:
        yield procs
        return
    # Python's signal handlers don't run inside this call, so a stop ends the process at once. Nothing is lost yet.
    with procs.collective(), end_at_once():
        bound = chosen if chosen.type == "cuda" else None  # otherwise NCCL guesses the GPU at the first collective
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=bound)
    yield procs
    # Only after success: leaving waits for the others, which may hang in another collective after an error.
    procs.any(False)
    # Kept alive: freeing the group joins gloo's thread while holding the GIL, which that thread may need: a deadlock.
    _ended_groups.append(dist.group.WORLD)
    dist.destroy_process_group()


def device_and_backend(requested: str, local_rank: int, n_processes: int) -> tuple[torch.device, str]:
    """The device of process `local_rank` on its machine, and the backend that connects it with the others.

    `requested` is auto, cpu, cuda or mps. Raises UserError for a missing device.
    """
    if n_processes > 1 and requested in ("auto", "mps") and torch.backends.mps.is_available():
        if requested == "mps":
            raise UserError(
                f"Cannot start {n_processes} processes on mps: it serves one. Start one, or use --train.device cpu."
            )
        requested = "cpu"
    device = choose_device(requested, local_rank)
    # NCCL reduces gradients. Decisions use gloo on the CPU, so that they don't wait for work queued on a GPU.
    return device, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def world_size() -> int:
    """The number of processes according to the environment; 1 without torchrun."""
    return _from_environment("WORLD_SIZE", 1)


def processes_here() -> int:
    """The number of processes on this machine: from torchrun, or from the launcher's variable NPROC, else all."""
    return _from_environment("LOCAL_WORLD_SIZE", _from_environment("NPROC", world_size()))


def outside_environment() -> dict[str, str]:
    """The environment for a program that the run starts, without the variables that would make it a rank of the run."""
    hidden = ("EXIT_CODE_FILE", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or len(value) > 9 or int(value) < min(default, 1):  # at least one process, from rank 0 on
        raise UserError(
            f"Cannot use the environment variable {name}: {value[:40]!r} is not a number of processes. Unset it."
        )
    return int(value)
