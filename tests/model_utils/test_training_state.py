"""The checkpoints that a run resumes from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.model import LLM
from src.model_configs.my_llm_config import debug
from src.model_utils.adamw_opt import build_optimizers
from src.model_utils.checkpoint_utils import save_checkpoint
from src.model_utils.training_state import Progress, TrainingState, resume_point
from src.params import to_dict
from src.utils.errors import UserError
from src.utils.handle_ddp import Processes


def test_a_checkpoint_saved_before_a_setting_existed_has_its_default(tmp_path: Path):
    settings = to_dict(debug())
    del settings["optim"]["spike_z"]
    parts = {name: {"w": torch.ones(1)} for name in ("model", "optimizer")}
    save_checkpoint(tmp_path, 5, parts, {"config": settings, "dataset_sha256": "abc", "precision": "torch.float32"})
    checkpoint, notes = resume_point(tmp_path, debug(), "abc", torch.float32)
    assert checkpoint is not None
    assert (checkpoint.step, notes) == (5, [])

    skipping = replace(debug(), optim=replace(debug().optim, spike_z=6.0))
    with pytest.raises(UserError, match=r"another configuration:\n  - optim\.spike_z: checkpoint 0\.0, now 6\.0\n"):
        resume_point(tmp_path, skipping, "abc", torch.float32)


def test_dropout_has_a_seed_of_the_run_on_a_device_whose_state_was_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A checkpoint of a CPU has no GPU's state; seeding seeds all devices, and then comes what was saved."""
    config = replace(debug(), model=replace(debug().model, n_vocab=50, n_embd=8, n_head=2, n_layer=1, n_ctx=8))
    procs = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    model = LLM(config.model)
    state = TrainingState(model, build_optimizers(model, config.optim), Progress(step=7))
    torch.manual_seed(123)
    torch.rand(5)
    save_checkpoint(tmp_path, 7, state.parts(procs), state.plain(config, "abc", torch.float32, 1))
    expected = torch.rand(5)
    checkpoint, _ = resume_point(tmp_path, config, "abc", torch.float32)
    assert checkpoint is not None
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    state.restore(checkpoint, seed=4, procs=procs)
    assert len(set(seeds)) == 1
    assert torch.equal(torch.rand(5), expected)
    assert state.progress.step == 7
