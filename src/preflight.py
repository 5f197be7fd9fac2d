"""Whether a start of training can work, found in seconds and all at once, before hours are spent on it.

    python -m src.preflight PRESET [overrides as of pretrain.py]

Trains and fetches nothing and leaves no file behind but a dataset's stamp. stderr gets a line a check, stdout one JSON
object. The launcher says by variables what it will start: WORLD_SIZE processes, NPROC of them on this machine, in the
folder STARTED_IN; with PREPARES_DATA=yes it prepares the dataset first, from what DATA_SOURCE, DATA_PATH and
DATA_MAX_TOKENS say.
"""

import src  # noqa: F401 (before torch: see there)
from src.utils.stop_signals import end_at_once_on_ctrl_c

if __name__ == "__main__":
    end_at_once_on_ctrl_c()  # before the seconds that importing torch takes

import json
import os
import sys
import time

from src import preflight_checks as checks
from src.model_configs.command_line import config_from_command_line
from src.params import ConfigError
from src.preflight_checks import Preparation, Start
from src.utils.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STORAGE, BusyError, UserError, exit_with
from src.utils.handle_ddp import processes_here, world_size

# In the order in which a reader would ask.
CHECKS = {
    "python": checks.python,
    "torch": checks.pytorch,
    "processes": checks.processes,
    "device": checks.device,
    "backend": checks.backend,
    "precision": checks.precision,
    "compiler": checks.compiler,
    "watching": checks.watching,
    "memory": checks.memory,
    "tokenizer": checks.tokenizer,
    "HellaSwag": checks.hellaswag,
    "dataset": checks.dataset,
    "data folder": checks.data_folder,
    "run folder": checks.run_folder,
    "disk": checks.disk,
    "clock": checks.clock,
}
_WIDTH = len("FAIL  ") + max(map(len, CHECKS)) + len(":  ")


def check_all(start: Start) -> tuple[dict[str, dict[str, str]], int]:
    """Makes and prints all checks; returns status and words of each, and the exit code.

    The code is 0, or the one that all failures have in common (4: storage, 5: the run is held), or 2.
    """
    results: dict[str, dict[str, str]] = {}
    codes: set[int] = set()
    reasons: set[str] = set()
    for name, check in CHECKS.items():
        try:
            found = check(start)
        except (ConfigError, UserError, BusyError, OSError) as error:  # StorageError is an OSError
            words = "; ".join(error.problems) if isinstance(error, ConfigError) else str(error)
            if words in reasons:  # several checks need the device
                continue
            reasons.add(words)
            codes.add(getattr(error, "exit_code", EXIT_STORAGE))
            results[name] = {"status": "FAIL", "found": words}
        else:
            if found is None:
                continue
            results[name] = {"status": "warn" if found.is_doubtful else "ok", "found": found.words}
        _print(name, **results[name])
    if not codes:
        return results, EXIT_DONE
    return results, codes.pop() if len(codes) == 1 else EXIT_BAD_INPUT


def main() -> int:
    started = time.perf_counter()
    os.chdir(os.environ.get("STARTED_IN") or ".")  # what relative paths are relative to
    config = config_from_command_line(
        "Say whether a start of pretrain.py with these settings can work, for as many processes as the environment "
        "variable WORLD_SIZE says (NPROC of them on this machine). Exit codes: 0 yes, 2 no, 4 no for storage alone, "
        "5 no because another process is training in the run's folder.",
        prog="python -m src.preflight",
    )
    results, code = check_all(Start(config, world_size(), processes_here(), _preparation()))
    failed, warnings = ([name for name in results if results[name]["status"] == bad] for bad in ("FAIL", "warn"))
    if failed:
        print(f"\nnot started, because {len(failed)} check(s) failed: {', '.join(failed)}", file=sys.stderr)
    seconds = round(time.perf_counter() - started, 3)
    summary = {"exit_code": code, "failed": failed, "warnings": warnings, "checks": results, "seconds": seconds}
    print(json.dumps(summary))
    return code


def _preparation() -> Preparation | None:
    """What the launcher says that it will do."""
    if os.environ.get("PREPARES_DATA") != "yes":
        return None
    paths = tuple(filter(None, os.environ.get("DATA_PATH", "").splitlines()))
    max_tokens = os.environ.get("DATA_MAX_TOKENS")
    return Preparation(os.environ["DATA_SOURCE"], paths, int(max_tokens) if max_tokens else None)


def _print(name: str, status: str, found: str) -> None:
    """One line, further ones below it."""
    head = f"{status:<6}{name}:"
    print(f"{head:<{_WIDTH}}{found}".replace("\n", "\n" + " " * _WIDTH), file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main)
