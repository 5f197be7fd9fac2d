"""Which checkpoints a run goes on from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.model_configs.my_llm_config import debug
from src.model_utils.checkpoint_utils import save_checkpoint
from src.model_utils.training_state import resume_point
from src.params import to_dict
from src.utils.errors import UserError


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
