"""What tests of whole runs share: their length, their end, their records and weights."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import pretrain

STEPS = 12


def stop_after(steps: int) -> Callable[[], bool]:
    """Says stop when asked before step `steps` + 1; the run asks once or twice a step."""
    original, counted = pretrain.train_step, itertools.count(1)
    done = {"steps": 0}

    def counting_step(run, batches):
        done["steps"] = next(counted)
        return original(run, batches)

    pretrain.train_step = counting_step
    return lambda: done["steps"] >= steps


def metrics(run_dir: Path, kind: str | None = None) -> list[dict]:
    """The records, without what differs between two runs on one machine: times and sizes."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timing = {"time", "seconds", "held_up_seconds", "tokens_per_second", "step_ms", "memory_gb"}
    timing.add("bytes")  # state.json holds seconds
    kept = [{k: v for k, v in record.items() if k not in timing} for record in records]
    # a checkpoint's record comes whenever it is saved
    kept.sort(key=lambda record: (record["kind"] == "checkpoint", record["step"]))
    return [record for record in kept if kind in (None, record["kind"]) and record["kind"] != "event"]


def final_tensors(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:07d}"
    files = ("model", "optimizer", "rank_00000")
    # cloned, because the tensors are mapped from files that a test may damage
    return {f"{file}/{k}": v.clone() for file in files for k, v in load_file(folder / f"{file}.safetensors").items()}


def assert_same_bits(one: Path, other: Path, step: int = STEPS) -> None:
    a, b = final_tensors(one, step), final_tensors(other, step)
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
