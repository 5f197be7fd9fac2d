"""Prepares a dataset again and again, each time killed at the next point where it touches the disk, then completed.

    python -m tests.data_processing.crash_sweep FILE OUT {same,other,repair}

`same`: the preparation is killed and started again. `other`: it is killed half-way, one with another seed takes the
folder over and is killed at each point, then the first is started again. `repair`: a repair is killed and started
again. Prints how many points there were. Each preparation is a forked process, because what a kill leaves must not be
tidied up by the one that was killed.
"""

import contextlib
import io
import os
import pathlib
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.data_processing import document_shuffle
from src.data_processing.data_downloader import prepare, repair
from src.data_processing.shards import read_manifest
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


def ends(point: int, action: Callable[[], Any]) -> int:
    """How a process ends that does `action` and is killed at disk operation number `point`, if it comes so far."""
    child = os.fork()
    if child == 0:
        left = [point]
        os.fsync = lambda fd: None  # a kill loses nothing that was written, and the disk's answer takes its time
        for owner, name in ((os, "fsync"), (os, "replace"), (pathlib.Path, "unlink"), (os, "rmdir"), (os, "unlink")):
            setattr(owner, name, dying(getattr(owner, name), left))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(DONE)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(path: Path, out: Path, kind: str) -> None:
    document_shuffle.FLUSH_TOKENS = 400
    load_tokenizer()

    def prepared(seed: int = 42) -> None:
        prepare(request(path, tokens_per_shard=400, drop_duplicates=True, seed=seed), out, 1)

    assert ends(sys.maxsize, prepared) == DONE
    expected = contents(out)
    shard = read_manifest(out).train[0].file
    point = 0
    while True:
        if kind == "repair":
            (out / shard).unlink()
            end = ends(point, lambda: repair(out, 1))
            assert ends(sys.maxsize, lambda: repair(out, 1)) == DONE, f"no repair after a kill at operation {point}"
        else:
            shutil.rmtree(out)
            if kind == "other":
                assert ends(30, prepared) == KILLED
            end = ends(point, lambda: prepared(43 if kind == "other" else 42))
            if kind == "other" and (out / "manifest.json").exists():
                break  # the folder is the other's
            assert ends(sys.maxsize, prepared) == DONE, f"did not resume after a kill at operation {point}"
        assert contents(out) == expected, f"other bytes after a kill at operation {point}"
        if end == DONE:
            break
        assert end == KILLED
        point += 1 if kind == "same" else 3
    print(point)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
