"""What the drills of losses and gradients that are not finite share."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import Commands
from tests.drills.pair import fork_pair
from tests.drills.small_run import LONGER

# Rank 1's second micro-batch of the step after {first} completed ones, and of those that follow, up to {last}. Notes
# its token ids.
BAD_LOSS = """
import json
from src.model import LLM
forward, seen = LLM.forward, {{"step": -1, "calls": 0}}

def spoiled(self, *inputs):
    loss = forward(self, *inputs)
    if self.training:
        seen["calls"] += 1
        if seen["calls"] == 2 and os.environ["RANK"] == "1" and {first} <= seen["step"] <= {last}:
            with open(os.path.join(folder, "spoiled"), "w") as file:
                json.dump(inputs[0].tolist(), file)
            return loss * float("nan")
    return loss

LLM.forward = spoiled
"""
# Rank 1's gradient of one parameter, in the same steps.
BAD_GRADIENT = """
def spoil(run):
    gain, progress = run.state.model.norm.weight, run.state.progress
    spoiled = lambda gradient: gradient * float("inf") if {first} <= progress.step <= {last} else gradient
    gain.register_hook(spoiled)
at_step({first}, 1, spoil)
"""
# Notes in which steps of this process any weight or moment changed. Before BAD_GRADIENT, after BAD_LOSS.
WATCHED = """
import json, torch
from src.model_utils.adamw_opt import optimizer_tensors
train_step, changed = pretrain.train_step, []

def tensors(run):
    state = dict(run.state.model.named_parameters()) | optimizer_tensors(run.state.model, run.state.optimizers)
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


def assert_given_up(commands: Commands, folder: Path, lines: str, data: Path) -> None:
    """Runs with `lines`, which spoil every step after 5, and asserts that the run ends with what was good."""
    ended = fork_pair(commands, folder, lines, data, *LONGER, "--train.total-steps", "40")
    assert ended.code == 3
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("the last 10 step(s), up to step 15, were skipped") == 1
    assert changed_steps(folder) == [list(range(5))] * 2
    run_dir = commands.temp_data / "runs" / "drill"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_0000004"]
    for file in ("model", "optimizer"):
        tensors = load_file(run_dir / "checkpoints" / "step_0000004" / f"{file}.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 3
