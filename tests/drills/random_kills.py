"""A run of two processes, one of which is killed at ten random moments; the launcher starts them again each time.

    python -m tests.drills.random_kills OUT [--steps 400] [--kills 10] [--seed 0]

Prints, as one JSON object, at which steps and from which checkpoints, and whether the run ended in the same bits as one
that was left alone. OUT is a new folder.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from src.utils.root import ROOT
from tests.conftest import write_dataset
from tests.drills.small_run import SETTINGS, assert_same_run


def launch(out: Path, data: Path, name: str, steps: int, restarts: int) -> subprocess.Popen[bytes]:
    run = ["--run-name", name, "--data.dir", str(data), "--train.total-steps", str(steps), *SETTINGS]
    run += ["--model.n-vocab", "50257"]  # the launcher samples at the end
    often = ("--checkpoint.every-steps", "20", "--eval.val-every-steps", "50", "--model.ffn-dropout", "0.2")
    return subprocess.Popen(
        [str(ROOT / "run_pre_training_e2e.sh"), *run, *often],
        cwd=ROOT,
        env={**os.environ, "TEMP_DATA_DIR": str(out), "OMP_NUM_THREADS": "1"}
        | {"PYTHON": sys.executable, "DEBUG_MODE": "True", "NPROC": "2", "MAX_RESTARTS": str(restarts)},
        stderr=open(out / f"{name}.log", "wb"),
    )


def last_step(run_dir: Path) -> int:
    """Of the training lines; 0 before the first."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if '"train"' in line and line.endswith("}")), default=0)


def ranks(launcher: int) -> list[int]:
    """Process ids of the run's processes: the children of torchrun, which is the launcher's child."""
    for torchrun in children(launcher):
        if found := children(torchrun):
            return found
    return []


def children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out, rng = args.out.absolute(), random.Random(args.seed)
    out.mkdir(parents=True)
    data = write_dataset(out / "data", [7_000, 9_000], 2_000, 300)
    assert launch(out, data, "whole", args.steps, 0).wait() == 0
    run_dir, kills = out / "runs" / "killed", []
    with launch(out, data, "killed", args.steps, args.kills) as process:
        for target in sorted(rng.sample(range(1, args.steps), args.kills)):
            while last_step(run_dir) < target and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)  # anywhere in a step, a validation or a save
            assert process.poll() is None, f"the run ended by itself with {process.returncode}"
            kills.append(last_step(run_dir))
            os.kill(rng.choice(ranks(process.pid)), signal.SIGKILL)
            while last_step(run_dir) >= target and process.poll() is None:  # until the log is cut back, or grows
                time.sleep(0.002)
                if last_step(run_dir) > kills[-1]:
                    break
        code = process.wait()
    assert code == 0, (out / "killed.log").read_text()
    assert_same_run(out / "runs" / "whole", run_dir, steps=args.steps)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    resumed = [record["step"] for record in records if record["kind"] == "event" and record["name"] == "resume"]
    print(json.dumps({"steps": args.steps, "killed_after": kills, "resumed_from": resumed, "same_bits": True}))


if __name__ == "__main__":
    main()
