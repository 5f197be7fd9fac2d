"""Drill 14: a loss that is not a number on one of two ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import Commands
from tests.drills.pair import run_pair
from tests.drills.small_run import LONGER

# Rank 1's second micro-batch of the step after {first} completed ones, and of those that follow, up to {last}.
BAD_LOSS = """
from src.model import LLM
forward, seen = LLM.forward, {{"step": -1, "calls": 0}}

def spoiled(self, *inputs):
    loss = forward(self, *inputs)
    if self.training:
        seen["calls"] += 1
        if seen["calls"] == 2 and os.environ["RANK"] == "1" and {first} <= seen["step"] <= {last}:
            return loss * float("nan")
    return loss

LLM.forward = spoiled
"""
# Notes in which steps of this process any weight or moment changed.
WATCHED = """
import json, torch
from src.model_utils.adamw_opt import optimizer_tensors
train_step, changed = pretrain.train_step, []

def tensors(run):
    state = run.state.model.state_dict() | optimizer_tensors(run.state.model, run.state.optimizer)
    return {name: tensor.clone() for name, tensor in state.items()}

def watched(run, batches):
    step = run.state.progress.step
    if "seen" in globals():
        seen.update(step=step, calls=0)
    before = tensors(run)
    result = train_step(run, batches)
    after = tensors(run)
    if before.keys() != after.keys() or any(not torch.equal(before[name], after[name]) for name in before):
        changed.append(step)
        with open(os.path.join(folder, "changed_" + os.environ["RANK"]), "w") as file:
            json.dump(changed, file)
    return result

pretrain.train_step = watched
"""


def changed_steps(folder: Path) -> list[list[int]]:
    """The steps, by completed ones before them, that changed anything: of rank 0, of rank 1."""
    return [json.loads((folder / f"changed_{rank}").read_text()) for rank in (0, 1)]


def test_both_skip_the_step_and_its_samples_are_recorded(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    ended = run_pair(commands, tmp_path, BAD_LOSS.format(first=5, last=5) + WATCHED, data, *LONGER)
    assert ended.code == 0, ended.stderr
    assert changed_steps(tmp_path) == [[step for step in range(12) if step != 5]] * 2
    (event,) = [record for record in commands.metrics("drill", "event") if record["name"] == "skipped step"]
    assert event["step"] == 6
    assert "not finite: loss nan" in event["detail"]
    assert event["n_ctx"] == 16
    assert len(event["windows"]) == 2  # of the one micro-batch, not of all eight sequences
    options = ("--inspect", "--out", str(data), "--skipped", "drill")
    shown = commands.module("src.data_processing.data_downloader", *options)
    assert shown.returncode == 0, shown.stderr
    for shard, window in event["windows"]:
        assert shard in (1, 2)
        assert f"{window * 16:,}" in shown.stdout or str(window * 16) in shown.stdout


def test_too_many_in_a_row_end_the_run_with_what_was_good(
    commands: Commands, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    lines = BAD_LOSS.format(first=5, last=1000) + WATCHED
    ended = run_pair(commands, tmp_path, lines, data, *LONGER, "--train.total-steps", "40")
    assert ended.code == 3
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("the last 10 step(s), up to step 15, were skipped") == 1
    assert changed_steps(tmp_path) == [list(range(5))] * 2
    run_dir = commands.temp_data / "runs" / "drill"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_0000004"]
    for file in ("model", "optimizer"):
        tensors = load_file(run_dir / "checkpoints" / "step_0000004" / f"{file}.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 3
