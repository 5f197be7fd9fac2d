"""Models that --checkpoint may name: those of runs and exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.model_utils.hf_export import export
from src.model_utils.llama_format import EXPORT, read_model_folder
from src.model_utils.load_model import load_model
from src.params import ModelConfig
from src.utils import root
from src.utils.errors import UserError
from tests.model_utils.exports import DATASET_SHA256, make_run, small_model

SHAPE = ModelConfig(n_vocab=512, n_ctx=32, n_embd=32, n_head=2, n_layer=2, residual_dropout=0.0, ffn_dropout=0.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "tiny", small_model(SHAPE))


@pytest.fixture
def exported(run: Path) -> Path:
    export(run, run.parent / "hf", "hf", "float32")
    return run.parent / "hf"


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_export_is_the_run_again(run: Path, exported: Path):
    ours, theirs = load_model(run, "cpu"), load_model(exported, "cpu")
    assert theirs.path == exported
    assert (theirs.step, theirs.dataset_sha256) == (40, DATASET_SHA256) == (ours.step, ours.dataset_sha256)
    assert theirs.config.model == ours.config.model
    assert theirs.config.train == ours.config.train
    assert not theirs.model.training
    weights = ours.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in theirs.model.state_dict().items())


def test_an_export_in_bf16_is_float32_in_memory(run: Path, tmp_path: Path):
    export(run, tmp_path / "half", "hf", "bf16")
    weights = load_model(run, "cpu").model.state_dict()
    for name, tensor in load_model(tmp_path / "half", "cpu").model.state_dict().items():
        assert torch.equal(tensor, weights[name].bfloat16().float()), name


def test_a_name_is_a_run_or_else_a_folder_here(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(root, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert load_model(Path("hf"), "cpu").path == exported
    make_run(tmp_path / "runs/hf", small_model(SHAPE))
    assert load_model(Path("hf"), "cpu").path == tmp_path / "runs/hf/checkpoints/step_0000040"
    assert load_model("./hf", "cpu").path == exported


def test_weights_that_do_not_fit(exported: Path):
    weights = load_file(exported / "model.safetensors")
    save_file({**weights, "lm_head.weight": torch.zeros(3)}, exported / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is \(3,\), expected missing"):
        read_model_folder(exported)
    weights.pop("model.norm.weight")
    save_file(weights, exported / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight is missing, expected \(32,\)"):
        read_model_folder(exported)


def test_another_programs_folder_is_refused(exported: Path):
    (exported / EXPORT).unlink()
    with pytest.raises(UserError, match=r"hf is not an export of ours: it has no export.json"):
        load_model(exported, "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_export_that_changed_is_refused(exported: Path, name: str):
    content = bytearray((exported / name).read_bytes())
    place = content.index(b"1e-05") if name == "config.json" else len(content) - 1
    content[place] ^= 1
    (exported / name).write_bytes(content)
    with pytest.raises(UserError, match=f"hf/{name}: it is missing or differs from what was exported"):
        load_model(exported, "cpu")


def test_an_export_without_a_sound_config_json(exported: Path):
    (exported / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"hf/config\.json: it is missing or differs from what was exported"):
        load_model(exported, "cpu")


def test_an_empty_name():
    with pytest.raises(UserError, match="--checkpoint is empty"):
        load_model("")


def test_a_changed_card_does_not_matter(exported: Path):
    (exported / "README.md").write_text("Mine")
    assert load_model(exported, "cpu").step == 40


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1, "step": "many"}'])
def test_a_damaged_export_json(exported: Path, content: str):
    (exported / EXPORT).write_text(content)
    with pytest.raises(UserError, match=r"Cannot read .*export\.json: "):
        load_model(exported, "cpu")


def test_unreadable_weights(exported: Path):
    weights = exported / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"Cannot read .*model.safetensors"):
        read_model_folder(exported)
    weights.unlink()
    with pytest.raises(UserError, match=r"Cannot read .*model.safetensors"):
        read_model_folder(exported)


def test_links_as_in_the_hubs_cache_are_followed(exported: Path, tmp_path: Path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in exported.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert load_model(snapshot, "cpu").step == 40


def test_gguf_is_named_as_what_it_is(run: Path, tmp_path: Path):
    (run / "model.gguf").write_bytes(b"GGUF")
    assert load_model(run, "cpu").step == 40  # a run in whose folder somebody put one
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "folder", tmp_path / "folder/model.gguf"):
        with pytest.raises(UserError, match=r"it is GGUF, for llama.cpp"):
            load_model(path, "cpu")
