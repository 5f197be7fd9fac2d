"""A small run again and again, each time killed at the next point where a save touches the disk, then started again.

    python -m tests.drills.checkpoint_sweep DATASET OUT

A point is before each fsync, rename and removal of a save, and before and in the middle of each file it writes. Prints
how many points there were. Each run is a forked process, because what a SIGKILL leaves must not be tidied up by the one
that was killed, and importing torch takes seconds.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the first optimizer of a process imports, once for all forks
from safetensors.torch import load_file

import pretrain
from src.data_processing.tokenizer import load_tokenizer
from src.model_utils import checkpoint_utils
from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, TrainConfig

STEPS = 3  # so that the last of three saves removes the first
PARTS = ("model", "optimizer", "rank_00000")


class Killer:
    """Counts what the thread that saves does to the disk, and kills the process at one point of it."""

    def __init__(self, point: int) -> None:
        self.left = point

    def here(self) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.here()
            return call(*arguments, **keywords)

        return counted

    def install(self) -> None:
        for owner, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree"), (pathlib.Path, "mkdir")):
            setattr(owner, name, self.before(getattr(owner, name)))
        save_file, write_text = checkpoint_utils.save_file, pathlib.Path.write_text

        def save_by_halves(tensors: dict[str, torch.Tensor], path: Path) -> None:
            self.here()
            save_file(tensors, path)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            self.here()
            path.write_bytes(whole)

        def write_by_halves(path: Path, text: str, **keywords: Any) -> None:
            self.here()
            write_text(path, text[: len(text) // 2], **keywords)
            self.here()
            write_text(path, text, **keywords)

        checkpoint_utils.save_file = save_by_halves
        pathlib.Path.write_text = write_by_halves  # type: ignore[assignment,method-assign]


def ends(config: Config, point: int = sys.maxsize) -> int:
    """How the run ends, killed at point number `point` if it comes so far."""
    child = os.fork()
    if child == 0:
        Killer(point).install()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                os._exit(pretrain.train(config).exit_code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[tuple[str, int]], list[tuple[str, int, str]]]:
    """The tensors of the last checkpoint, what was measured at which step, and name, step and detail of the events."""
    last = run_dir / "checkpoints" / f"step_{STEPS:07d}"
    tensors = {f"{part}/{k}": v.clone() for part in PARTS for k, v in load_file(last / f"{part}.safetensors").items()}
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    events = [(r["name"], r["step"], r["detail"]) for r in records if r["kind"] == "event"]
    return tensors, sorted((r["kind"], r["step"]) for r in records if r["kind"] != "event"), events


def names(run_dir: Path) -> list[str]:
    """Of everything in the folder of checkpoints, which may not be there yet."""
    folder = run_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def expected_events(run_dir: Path) -> list[tuple[str, int, str]]:
    """Name, step and detail of what the next start must record, by what a kill has left.

    Each leftover once, and that the run resumes from the newest checkpoint that verifies, unless all is done.
    """
    left = names(run_dir)
    whole = [
        name for name in left if "." not in name and checkpoint_utils.damage(run_dir / "checkpoints" / name) is None
    ]
    step = int(whole[-1].removeprefix("step_")) if whole else 0
    removed = [("checkpoints", step, f"removed {name}, left by an interrupted save") for name in left if "." in name]
    resumed = [("resume", step, f"from {whole[-1]} of {STEPS} steps")] if 0 < step < STEPS else []
    return removed + resumed


def main(dataset: Path, out: Path) -> None:
    pretrain.RUNS = out
    torch.set_num_threads(1)
    load_tokenizer()
    config = Config(
        run_name="whole",
        model=ModelConfig(n_vocab=300, n_ctx=16, n_embd=16, n_head=2, n_layer=1),
        data=DataConfig(dir=str(dataset)),
        train=TrainConfig(
            total_steps=STEPS, batch_tokens=64, micro_batch_size=4, precision="float32", device="cpu", log_every_steps=1
        ),
        eval=EvalConfig(val_tokens=64, hellaswag_items=0),
        checkpoint=CheckpointConfig(every_steps=1),
    )
    assert ends(config) == 0
    tensors, records, events = state(out / "whole")
    assert events == []

    def survived(point: int) -> bool:
        """False where there is no such point; asserts that a kill there changes nothing in the end."""
        killed = replace(config, run_name=f"killed_{point}")
        run_dir = out / killed.run_name
        end = ends(killed, point)
        if end == 0:
            return False
        assert end == -signal.SIGKILL, f"ended with {end} at point {point}"
        expected = expected_events(run_dir)
        assert ends(killed) == 0, f"did not resume after a kill at point {point}"
        tensors_now, records_now, events = state(run_dir)
        assert events == expected, f"recorded after a kill at point {point}: {events}, expected {expected}"
        assert records_now == records, f"other records after a kill at point {point}: {records_now}"
        assert all(torch.equal(tensors[name], tensors_now[name]) for name in tensors), f"other bits after point {point}"
        assert names(run_dir) == names(out / "whole"), f"left after a kill at point {point}: {names(run_dir)}"
        for path in (run_dir / "checkpoints").iterdir():
            assert checkpoint_utils.damage(path) is None
        return True

    point = 0
    while survived(point):
        point += 1
    print(point)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
