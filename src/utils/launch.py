"""Starts the processes of a run on this machine and ends with their exit code; a run that dies is started again.

python -m src.utils.launch --processes 8 pretrain.py lf_llm_269m [...]

torchrun's own agent does the work. Left out are its tracebacks, and added is what its two ways of connecting
machines lack (LOG.md): an end for good is final, also for the other machines; all of them start again together,
with the ranks they had; and one that is lost is waited for only so long.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from src import available_cores
from src.utils.stop_signals import STOP_SIGNALS, end_at_once_on_ctrl_c, heeded_signals

if __name__ == "__main__":
    # Until there are processes that could save, a signal ends this one at once, in the midst of waiting for a machine.
    end_at_once_on_ctrl_c()
    # PyTorch's C++ would add a page to our line about a machine that is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

import torch.distributed
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from src.utils import errors as terminal
from src.utils.errors import EXIT_STOPPED, FINAL_CODES, recorded_exit_code

# For finishing a step and saving; then the processes are killed.
STOP_SECONDS = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120"))
RESTART_SECONDS = min(30, STOP_SECONDS)  # for ending by themselves, where others have failed
END_SECONDS = 10  # for processes with nothing to save, and for the other machines to read how the run ended
POLL_SECONDS = 0.2
ENDED = "ended"  # the key in the store of the machines
STOPPED_IN_VAIN = "stopped before there was anything to save, or without saving"


class EndedError(Exception):
    """The run ended for good, here or on another machine."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the run ended with exit code {code}")
        self.code = code


class LostMachineError(Exception):
    """Another machine did not come, or cannot be reached any more."""


class Agent(LocalElasticAgent):
    """Starts, watches and restarts this machine's processes, together with the agents of the other machines.

    They share a store that lives on the first machine: `ended` holds the exit code of a run that must not start
    again, `failed/N` says that attempt N did, `ready/N` counts the machines that are ready for attempt N.
    """

    def __init__(self, spec: WorkerSpec, wait_seconds: float) -> None:
        super().__init__(spec, DefaultLogsSpecs(), exit_barrier_timeout=END_SECONDS)
        self._shutdown_timeout = STOP_SECONDS
        self.wait_seconds = wait_seconds
        self.attempt = -1

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.attempt += 1
        machines = machines_of(worker_group)
        store = store_of(worker_group)
        ready = self._meet(worker_group, f"ready/{self.attempt}", self.wait_seconds, until=ENDED)
        if store.check([ENDED]):  # another machine, which found the end later than this one the failure
            raise EndedError(int(store.get(ENDED)))
        if ready < machines:
            raise LostMachineError(
                f"{ready} of {machines} machines are there after {self.wait_seconds:.0f} s; see "
                "what keeps the others, then start the same command on all of them again"
            )
        started = super()._start_workers(worker_group)
        # Where one fails, PyTorch ends the others itself, with 30 s for those that hear nothing.
        context = cast(Any, self._pcontext)
        close = context.close
        context.close = lambda number=None, timeout=RESTART_SECONDS: close(number, timeout)
        return started

    def _stop_workers(self, worker_group: WorkerGroup, *_: object) -> None:
        self._end_processes(RESTART_SECONDS)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = STOP_SECONDS) -> None:
        """Called by torchrun for a signal, and at the end."""
        for number in STOP_SIGNALS:  # one more would leave processes that are saving alone
            signal.signal(number, signal.SIG_IGN)
        self._end_processes(timeout, death_sig)

    def _end_processes(self, seconds: int, number: signal.Signals = signal.SIGTERM) -> None:
        if self._pcontext is not None:  # PyTorch 2.11's own has no time to set
            self._pcontext.close(number, seconds)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        stopped = self._was_stopped()  # before torchrun ends the others in the same way
        result = super()._monitor_workers(worker_group)
        store, failed = store_of(worker_group), f"failed/{self.attempt}"
        code = None
        if result.state == WorkerState.FAILED:  # a full disk may not have taken the record
            ends = [failure.exitcode for failure in result.failures.values()]
            code = recorded_exit_code() or next((end for end in ends if end in FINAL_CODES), None)
        if stopped and code is None:
            say(STOPPED_IN_VAIN)
            code = EXIT_STOPPED
        if code is not None:
            code = agreed_end(store, code)
        elif store.check([ENDED]):
            code = int(store.get(ENDED))
        if code is not None:
            self._end_processes(STOP_SECONDS)  # one may be at the end of a save
            raise EndedError(code)
        if result.state == WorkerState.FAILED:
            self._tell(result)
            store.set(failed, "")
        elif result.state == WorkerState.HEALTHY and store.check([failed]):
            return RunResult(WorkerState.UNHEALTHY)  # ours may wait for a process of another machine for long
        return result

    def _was_stopped(self) -> bool:
        """Whether a request to stop has ended a process, which did not come so far as to heed it."""
        return any(-end in STOP_SIGNALS for end in self._ends() if end is not None)

    def all_ended_well(self) -> bool:
        """Whether this machine's processes were started, and each has done all that it had to do."""
        ends = self._ends()
        return bool(ends) and all(end == 0 for end in ends)

    def _ends(self) -> list[int | None]:
        """How this machine's processes ended: exit codes, less than 0 for signals, None for those that go on."""
        if self._pcontext is None:
            return []
        return [handler.proc.poll() for handler in cast(Any, self._pcontext).subprocess_handlers.values()]

    def _tell(self, result: RunResult) -> None:
        # Those that a signal killed come first: the others may have ended because of them, in the same moment.
        failures = sorted(result.failures.items(), key=lambda item: item[1].exitcode >= 0)
        ends = ", ".join(f"process {rank} {how_it_ended(failure)}" for rank, failure in failures)
        restarts = self.get_worker_group().spec.max_restarts
        what = f"starting again, {self.attempt + 1} of {restarts} times" if self.attempt < restarts else "giving up"
        say(f"{ends}; {what}")

    def leave(self, code: int) -> int:
        """The exit code of the run, of which a machine may know more than this one; all of them agree on it here.

        A machine which has no final code waits for the others' word, the first one also until all have heard it:
        the store ends with it.
        """
        group = self.get_worker_group()
        if self.attempt < 0 or machines_of(group) == 1:
            return code
        store = store_of(group)
        if code in FINAL_CODES:
            agreed_end(store, code)
        self._meet(group, "ending", END_SECONDS, until=ENDED)
        if store.check([ENDED]):
            code = int(store.get(ENDED))
        if cast(int, group.group_rank) == 0:
            self._meet(group, "left", END_SECONDS)
        else:
            store.add("left", 1)
        return code

    def _meet(self, worker_group: WorkerGroup, name: str, seconds: float, until: str = "") -> int:
        """How many machines have come to the point called `name`, once all have or the time is over.

        `until`: a key of the store that makes waiting needless.
        """
        store, deadline = store_of(worker_group), time.monotonic() + seconds
        there = store.add(name, 1)
        while there < machines_of(worker_group) and time.monotonic() < deadline:
            if until and store.check([until]):
                break
            time.sleep(POLL_SECONDS)  # rather than wait in the store, where signals are not heard
            there = store.add(name, 0)
        return there


def store_of(worker_group: WorkerGroup) -> torch.distributed.Store:
    return cast(torch.distributed.Store, worker_group.store)  # torch leaves it to types to guess


def agreed_end(store: torch.distributed.Store, code: int) -> int:
    """The final exit code of the run: the first that a machine has said."""
    return int(store.compare_set(ENDED, "", str(code)))


def machines_of(worker_group: WorkerGroup) -> int:
    return cast(int, worker_group.group_world_size)


def main() -> int:
    args = _parser().parse_args()
    heeded = heeded_signals()
    os.chdir(args.folder)
    if os.environ.get("TORCH_CPP_LOG_LEVEL") == "FATAL":  # ours, read by now, and not meant for the processes
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    logging.disable(logging.CRITICAL)  # torchrun's own words; those of the processes come from them
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in heeded)
    os.environ.setdefault("LAUNCH_ID", uuid.uuid4().hex)  # by which a run knows that it is started again
    os.environ["LAUNCHER_PID"] = str(os.getpid())
    # Processes share this machine's cores; each would start as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // max(1, args.processes))))
    with tempfile.NamedTemporaryFile(prefix="exit-code-") as file:
        os.environ["EXIT_CODE_FILE"] = file.name
        return run(args)


def run(args: argparse.Namespace) -> int:
    """The exit code of the run: what a process left for good, else 0, 143 for a stop, or 1."""
    agent, code = None, 1
    try:
        agent = make_agent(args)
        code = int(agent.run().state != WorkerState.SUCCEEDED)
    except SignalException:
        if agent is not None and agent.all_ended_well():
            code = 0  # it came too late to stop anything
        else:
            code = EXIT_STOPPED
            if recorded_exit_code() is None:
                say(STOPPED_IN_VAIN)
    except EndedError as end:
        code = end.code
    except LostMachineError as error:
        say(f"error: {error}")
    except torch.distributed.DistError as error:
        where = f"the first machine, {args.master_addr}:{args.master_port}, cannot be reached, or not any more"
        what = where if args.machine else "not all machines have come"
        # The first machine may be gone because the run has ended, and our processes know how.
        if recorded_exit_code() is None:
            say(f"error: {what}: {str(error).splitlines()[0]}; start the same command on all of them again")
    code = recorded_exit_code() or code
    if agent is not None:
        with suppress(torch.distributed.DistError):
            code = agent.leave(code)
    return code


def make_agent(args: argparse.Namespace) -> Agent:
    """Connects with the other machines. Raises DistError where the first cannot be reached."""
    # The machines of one run meet under its name, so that one which another run sends here by mistake waits in vain.
    shared = {"run_id": run_name(args.command), "min_nodes": args.machines, "max_nodes": args.machines}
    if args.machines == 1:  # on a free port, so that two runs don't meet
        place = RendezvousParameters("c10d", "127.0.0.1:0", local_addr="127.0.0.1", **shared)
    else:
        endpoint = f"{args.master_addr}:{args.master_port}"
        place = RendezvousParameters("static", endpoint, rank=args.machine, timeout=args.wait_seconds, **shared)
    spec = WorkerSpec(
        role="train",
        local_world_size=args.processes,
        rdzv_handler=get_rendezvous_handler(place),
        entrypoint=sys.executable,
        args=("-u", *args.command),
        max_restarts=args.max_restarts,
        monitor_interval=POLL_SECONDS,
        master_addr=args.master_addr,
        master_port=args.master_port,
    )
    return Agent(spec, args.wait_seconds)


def run_name(command: list[str]) -> str:
    """What the command says after --run-name, or its script's name."""
    words = [word for part in command for word in part.split("=", 1)]
    named = [after for before, after in pairwise(words) if before in ("--run-name", "--run_name")]
    return named[-1] if named else Path(command[0]).stem


def how_it_ended(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"ended with exit code {failure.exitcode}"


def say(words: str) -> None:
    terminal.say(f"launch: {words}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m src.utils.launch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="on this machine (default: 1)")
    parser.add_argument("--machines", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--machine", type=int, default=0, metavar="N", help="this one's number, from 0 (default: 0)")
    parser.add_argument("--master-addr", metavar="HOST", help="of machine 0; needed for several machines")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="likewise")
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the command runs (default: here)")
    parser.add_argument(
        "--wait-seconds", type=int, default=600, metavar="N", help="for the other machines (default: 600)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a Python file and its arguments")
    return parser


if __name__ == "__main__":
    sys.exit(main())
