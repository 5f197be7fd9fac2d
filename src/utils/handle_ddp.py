"""The processes of a run: their start and end, who is who, and decisions that all of them share.

One process needs no launcher. Under torchrun, RANK is this process among all of them and decides the
data; LOCAL_RANK is its place on this machine and decides the device, and who reads what only the machine has.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed

from src.utils.errors import LostPeerError, PeerError, StoppedError, UserError
from src.utils.hardware import choose_device
from src.utils.stop_signals import follow_parent
from src.utils.watchdog import Watchdog

# Of the backend itself. The watchdog's limit, which names what was being done, is over long before.
COLLECTIVE_TIMEOUT = timedelta(hours=6)
# For all processes to come, before there is a watchdog: importing PyTorch from a cold network disk takes minutes.
MEETING_SECONDS = 600.0
SIGN_SECONDS = 1.0  # between signs of life, where one process works for long

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among its peers. All of them together call a method, but for `doing` and `leave`."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        """True in exactly one process of the run, the one that writes files."""
        return self.rank == 0

    @property
    def is_machines_first(self) -> bool:
        """True in one process of each machine, the one that looks after what may be the machine's own: its disks."""
        return self.local_rank == 0

    def doing(self, what: str) -> None:
        """Says, in words, what this process does from now on: what a time-out names."""
        if self.watchdog:
            self.watchdog.doing(what)

    def leave(self) -> None:
        """From now on this process ends by itself: nobody waits for it, and the others may be gone before it is."""
        if self.watchdog:
            self.watchdog.close()

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Around anything that waits for all processes. Raises LostPeerError where one of them does not answer."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                raise
            where = self.watchdog.what if self.watchdog else "a collective"
            raise LostPeerError(
                f"another process ended or does not answer, in {where} ({str(error).splitlines()[0]}). Its own message "
                "comes before this one, if it had time for any; the same command goes on from the last checkpoint"
            ) from None
        if self.watchdog:
            self.watchdog.alive()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        with self.collective():
            sums = torch.tensor(values, dtype=torch.float64)
            torch.distributed.all_reduce(sums)
            return sums.tolist()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all processes of a scalar on the device, where it stays: the program does not wait for it."""
        if self.world_size > 1:
            with self.collective():
                torch.distributed.all_reduce(value)
        return value / self.world_size

    def any(self, flag: bool) -> bool:
        """True where `flag` is true in any process."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.collective():
            torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """The main process's value, everywhere."""
        if self.world_size == 1:
            return value
        values = [value]
        with self.collective():
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def tensors_from_main(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The main process's tensors, everywhere, on the CPU; only its argument counts."""
        if self.world_size == 1:
            return tensors
        kinds = self.from_main({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        received = {}
        for name, (shape, dtype) in kinds.items():
            with self.collective():
                tensor = tensors[name] if self.is_main else torch.empty(shape, dtype=dtype)
                on_device = tensor.to(self.device)
                torch.distributed.broadcast(on_device, src=0)
                received[name] = on_device.cpu()
        return received

    def main_only(self, action: Callable[[], T], for_long: bool = False) -> T:
        """Runs `action` in the main process; all get its result. If it fails, all of them raise.

        `for_long`: as `together_for_long` does.
        """
        together = self.together_for_long if for_long else self.together
        return cast(T, self.from_main(together(lambda: action() if self.is_main else None)))

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` in every process; if any fails, all raise.

        Each distinct error is raised as itself by the first process that met it. All others raise a PeerError, which
        ends them in the same way and in silence.
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

    def together_for_long(self, action: Callable[[], T]) -> T:
        """As `together`, for what may take some processes hours, such as reading a dataset: the others wait as long.

        It runs in a thread; meanwhile the processes answer each other, so one that is stopped is still missed.
        """
        if self.world_size == 1:
            return action()
        job: Future[T] = Future()

        def work() -> None:
            try:
                job.set_result(action())
            except BaseException as error:
                job.set_exception(error)

        Thread(target=work, name="work", daemon=True).start()  # a daemon: after a lost peer nobody waits for its end
        while self.any(not wait([job], SIGN_SECONDS).done):
            pass
        return self.together(job.result)


@contextmanager
def processes(device: str, timeout_s: float, stop: Callable[[], object] = lambda: False) -> Iterator[Processes]:
    """Joins the process group that torchrun describes in the environment, if any, and leaves it at the end.

    `device` is auto, cpu, cuda or mps. `timeout_s`: the longest that anything the processes are `doing` together may
    go without a sign of life. Raises UserError for a device that isn't there, LostPeerError where a process does not
    come, StoppedError once `stop()` is true while it is waited for.
    """
    rank, local_rank, n_processes = _from_environment("RANK", 0), _from_environment("LOCAL_RANK", 0), world_size()
    _stop_with_launcher()
    chosen, backend = device_and_backend(device, local_rank, n_processes)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if n_processes == 1:
        yield Processes(rank, local_rank, n_processes, chosen)
        return
    # The store outlives the processes. Started again, they would find the addresses of the dead.
    store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=MEETING_SECONDS)))
    store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    watchdog = Watchdog(rank, _meet(store, rank, n_processes, stop), timeout_s)
    procs = Processes(rank, local_rank, n_processes, chosen, watchdog)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    # Leaving the group waits for the others. After an error they may be stuck in a collective that this process
    # will never join, so then it just ends, and the launcher ends them.
    try:
        with procs.collective():
            torch.distributed.init_process_group(
                backend, store=store, rank=rank, world_size=n_processes, timeout=COLLECTIVE_TIMEOUT
            )
        yield procs
        procs.any(False)  # nobody leaves, and is missed, before the last has done its work
    finally:
        watchdog.close()
    torch.distributed.destroy_process_group()


def device_and_backend(asked: str, local_rank: int, n_processes: int) -> tuple[torch.device, str]:
    """The device of process `local_rank` of its machine, and the backend that connects it with the others.

    `asked` is auto, cpu, cuda or mps. Raises UserError for a device that isn't there.
    """
    if n_processes > 1 and asked in ("auto", "mps") and torch.backends.mps.is_available():
        if asked == "mps":
            raise UserError(f"device mps serves one process, not {n_processes}; start one, or use --train.device cpu")
        asked = "cpu"  # no backend connects several processes through MPS
    device = choose_device(asked, local_rank)
    # gradients through NCCL; decisions through gloo, on the CPU, so that they do not wait for what a GPU has to do
    return device, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _stop_with_launcher() -> None:
    """Where Linux can, SIGTERM for this process once its launcher dies; else it would train on, and hold the run."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow_parent(_from_environment("LAUNCHER_PID", os.getppid()), signal.SIGTERM)


def world_size() -> int:
    """How many processes the environment says there are; one without torchrun."""
    return _from_environment("WORLD_SIZE", 1)


def _meet(store: torch.distributed.Store, rank: int, n_processes: int, stop: Callable[[], object]) -> dict[int, int]:
    """Waits for all processes; returns rank and process id of the others that the same launcher started.

    Looks again and again rather than wait in the store, where signals are not heard.
    """
    machine = [socket.gethostname(), os.environ.get("GROUP_RANK")]
    store.set(f"there/{rank}", json.dumps([machine, os.getpid()]))
    deadline = time.monotonic() + MEETING_SECONDS
    missing = list(range(n_processes))
    while missing := [other for other in missing if not store.check([f"there/{other}"])]:
        if stop():
            raise StoppedError("stopped on request before anything was trained")
        if time.monotonic() > deadline:
            raise LostPeerError(
                f"after {MEETING_SECONDS:g} s process {', '.join(map(str, missing))} of {n_processes} has not come: it "
                "is stuck or stopped, or its machine cannot be reached; start the same command again"
            )
        time.sleep(0.05)
    everyone = [json.loads(store.get(f"there/{other}")) for other in range(n_processes)]
    return {other: pid for other, (place, pid) in enumerate(everyone) if place == machine and other != rank}


def processes_here() -> int:
    """How many of them are to run on this machine: torchrun says so, or the launcher's variable NPROC, else all."""
    return _from_environment("LOCAL_WORLD_SIZE", _from_environment("NPROC", world_size()))


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} is {value!r}, not a number; torchrun sets it, or unset it")
    return int(value)
