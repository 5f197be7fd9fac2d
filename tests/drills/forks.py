"""Commands in forks of one process that has imported them, which saves every start the seconds of importing PyTorch.

    python -m tests.drills.forks

reads jobs from stdin, a JSON object a line, and answers each with the exit codes of its processes.
"""

import ctypes
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from src.utils.root import ROOT


def run_forks(
    code: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], mounts_of: int | None = None
) -> tuple[list[int], CompletedProcess[str]]:
    """Runs Python `code` in one process for each of the environments, at once.

    `mounts_of`: a process whose mounts they share. Returns their exit codes, and the first one with the output of all.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        job: dict[str, Any] = {
            "code": code,
            "arguments": arguments,
            "environments": [dict(each) for each in environments],
        }
        job |= {"mounts_of": mounts_of, "files": [os.devnull, str(out), str(err)]}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return codes, CompletedProcess(list(arguments), codes[0], out.read_text(), err.read_text())


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """The process to fork; it ends when this one does, which closes its stdin."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "tests.drills.forks"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve() -> None:
    import torch._dynamo  # noqa: F401 (the first optimizer of a process imports it)

    import src.preflight  # noqa: F401 (and with it most of the project)
    from src.data_processing.tokenizer import load_tokenizer
    from src.model_configs.my_llm_config import config_from_command_line

    load_tokenizer()
    sys.argv = ["pretrain.py", "debug"]
    config_from_command_line("")  # its parser is slow the first time
    gc.freeze()  # or every fork would copy the memory of all objects as it ends, which takes half a second
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for environment in job["environments"]:
            child = os.fork()
            if child == 0:
                become(job, environment)
                return
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def become(job: dict[str, Any], environment: dict[str, str]) -> None:
    """Makes this process what a new one would be that runs the job's code."""
    import pretrain
    from src.utils import root

    signal.alarm(240)  # no drill waits for a process that hangs
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(job["files"]):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if job["mounts_of"]:
        for kind in ("user", "mnt"):
            namespace = os.open(f"/proc/{job['mounts_of']}/ns/{kind}", os.O_RDONLY)
            assert ctypes.CDLL(None).setns(namespace, 0) == 0
        os.chdir(ROOT)
    root.TEMP_DATA = Path(environment["TEMP_DATA_DIR"])
    root.DATASETS, root.RUNS = root.TEMP_DATA / "datasets", root.TEMP_DATA / "runs"
    pretrain.RUNS = root.RUNS
    sys.argv = ["-c", *job["arguments"]]
    exec(compile(job["code"], "<drill>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    serve()
