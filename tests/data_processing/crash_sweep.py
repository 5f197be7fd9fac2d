"""Prepares a dataset again and again, each time killed at the next point where it touches the disk, then goes on.

    python -m tests.data_processing.crash_sweep FILE OUT

Prints how many points there were. Each preparation is a forked process, because what a kill leaves must not be
tidied up by the one that was killed.
"""

import contextlib
import io
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.data_processing import preparation
from src.data_processing.preparation import prepare
from src.data_processing.tokenizer import load_tokenizer
from tests.data_processing.documents import contents, request

KILLED, DONE = 9, 0


def dying(call: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            os._exit(KILLED)
        return call(*arguments, **keywords)

    return counted


def prepared_until(point: int, path: Path, out: Path) -> int:
    """How a process ends that is killed at disk operation number `point`, if it comes so far."""
    child = os.fork()
    if child == 0:
        left = [point]
        for owner, name in ((os, "fsync"), (os, "replace"), (pathlib.Path, "unlink"), (os, "rmdir"), (os, "unlink")):
            setattr(owner, name, dying(getattr(owner, name), left))
        with contextlib.redirect_stderr(io.StringIO()):
            prepare(request(path, tokens_per_shard=6_000, drop_duplicates=True), out, 1)
        os._exit(DONE)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(path: Path, out: Path) -> None:
    preparation.RUN_TOKENS = 4_000
    load_tokenizer()
    assert prepared_until(sys.maxsize, path, out) == DONE
    expected = contents(out)
    point = 0
    while True:
        shutil.rmtree(out)
        if prepared_until(point, path, out) == DONE:
            break
        assert prepared_until(sys.maxsize, path, out) == DONE, f"did not go on after a kill at operation {point}"
        assert contents(out) == expected, f"other bytes after a kill at operation {point}"
        point += 1
    print(point)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
