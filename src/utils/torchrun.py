"""torchrun as the launcher starts it: it ends with the launcher and with the exit code of its processes.

    python -m src.utils.torchrun [torchrun's options] pretrain.py PRESET [overrides]

Plain torchrun exits with 1 whatever its processes' exit codes, prints a traceback, and at a second signal kills
processes that are still saving.
"""

from src.utils.stop_signals import STOP_SIGNALS, end_at_once_on_ctrl_c, follow_launcher, heeded_signals

if __name__ == "__main__":  # before the seconds that importing torch takes
    end_at_once_on_ctrl_c()
    follow_launcher()

import glob
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from src.utils.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    FINAL_CODES,
    patient_streams,
    recorded_exit_code,
    say,
)

EXIT_LOST_MACHINE = 69  # the launcher reports it as 1; a restart would wait for that machine again
_stopped_at: list[float] = []


def main() -> int:
    patient_streams()
    os.chdir(os.environ.get("STARTED_IN") or ".")  # settings may hold relative paths
    os.environ["LAUNCHER_PID"] = str(os.getpid())  # the processes follow this one
    logging.disable(logging.CRITICAL)  # torchrun's own lines; the processes still print theirs
    for number in heeded_signals():
        signal.signal(number, _stop_once)
    signal.signal(signal.SIGUSR2, _quit)
    with tempfile.NamedTemporaryFile(prefix="exit-code-") as file:
        os.environ["EXIT_CODE_FILE"] = file.name
        try:
            run.main(["--signals-to-handle", "SIGQUIT", *sys.argv[1:]])
        except SignalException:
            if (code := recorded_exit_code()) is not None:
                return code
            if time.monotonic() - _stopped_at[0] < float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")):
                return EXIT_STOPPED  # before there was anything to save
            say("The processes were killed before they had saved. Rerun to resume from the last checkpoint.")
            return EXIT_FAILED
        except ChildFailedError as error:
            ends = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return exit_code(ends, recorded_exit_code())
        except DistError as error:
            reason = str(error).splitlines()[0]
            say(f"Cannot reach all machines: {reason}. Start the same command on all of them again.")
            return EXIT_LOST_MACHINE
    return EXIT_DONE


def exit_code(ends: Mapping[int, int], recorded: int | None) -> int:
    """Returns the exit code of a run whose ranks ended with these codes. Prints them if none is final.

    `recorded`: the result of `recorded_exit_code`, None if the disk was too full to record it.
    """
    final = next((code for code in (recorded, *ends.values()) if code in FINAL_CODES), None)
    crashed = any(end < 0 and -end not in STOP_SIGNALS for end in ends.values())
    if final and not (final == EXIT_STOPPED and crashed):  # torchrun stops the others after a crash
        return final
    if all(-end in STOP_SIGNALS for end in ends.values()):
        return EXIT_STOPPED  # by a signal that came before its handler was set
    for rank, end in sorted(ends.items(), key=lambda item: item[1] >= 0):  # crashes first: they cause the rest
        say(f"process {rank} " + (f"ended with exit code {end}" if end > 0 else f"died of {signal.Signals(-end).name}"))
    return EXIT_FAILED


def _stop_once(number: int, _: object) -> None:
    """Makes torchrun pass on the first signal, wait for the processes to save, and ignore later signals."""
    _stopped_at.append(time.monotonic())
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SignalException(f"stopped by {signal.Signals(number).name}", signal.Signals(number))


def _quit(*_: object) -> None:
    """Ends this process and its children at once: the launcher passes on a second Ctrl-C as SIGUSR2."""
    for path in glob.glob("/proc/self/task/*/children"):
        with suppress(OSError), open(path) as file:
            for child in file.read().split():
                os.kill(int(child), signal.SIGKILL)
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
