"""What --checkpoint may name: runs, exports, and other programs' models of our architecture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.model_utils.export_folder import EXPORT
from src.model_utils.hf_export import export
from src.model_utils.llama_format import llama_settings, llama_tensors
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


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """As transformers itself saves it, in several files."""
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_settings(SHAPE)))
    llama.load_state_dict(llama_tensors(small_model(SHAPE).state_dict(), SHAPE.n_layer))
    llama.save_pretrained(tmp_path / "foreign", max_shard_size="100KB")
    assert len(list((tmp_path / "foreign").glob("*.safetensors"))) > 1
    return tmp_path / "foreign"


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


def test_another_programs_llama(foreign: Path):
    loaded = load_model(foreign, "cpu")
    assert (loaded.step, loaded.dataset_sha256, loaded.config.model) == (0, "", SHAPE)
    ids_BT = torch.randint(SHAPE.n_vocab, (2, SHAPE.n_ctx))
    with torch.no_grad():
        assert torch.equal(loaded.model(ids_BT), small_model(SHAPE)(ids_BT))


def test_a_name_is_a_run_or_else_a_folder_here(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(root, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert load_model(Path("hf"), "cpu").path == exported
    make_run(tmp_path / "runs/hf", small_model(SHAPE))
    assert load_model(Path("hf"), "cpu").path == tmp_path / "runs/hf/checkpoints/step_0000040"
    assert load_model("./hf", "cpu").path == exported


def test_a_llama_of_another_architecture_is_refused(foreign: Path):
    change(foreign / "config.json", num_key_value_heads=1)
    with pytest.raises(UserError, match=r"foreign/config.json has num_key_value_heads = 1; our model has 2"):
        load_model(foreign, "cpu")


def test_weights_that_do_not_fit(foreign: Path):
    change(foreign / "config.json", intermediate_size=64)
    with pytest.raises(UserError, match=r"layers.0.mlp.down_proj.weight: expected \(32, 64\), found \(32, 128\)"):
        load_model(foreign, "cpu")
    change(foreign / "config.json", intermediate_size=128, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"layers.2.input_layernorm.weight: expected \(32,\), found nothing"):
        load_model(foreign, "cpu")


def test_a_head_of_its_own_is_refused(exported: Path):
    (exported / EXPORT).unlink()
    tensors = load_file(exported / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, exported / "model.safetensors")
    assert load_model(exported, "cpu").step == 0
    head[3, 5] += 1
    save_file({**tensors, "lm_head.weight": head}, exported / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight: differs"):
        load_model(exported, "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_export_that_changed_is_refused(exported: Path, name: str):
    content = bytearray((exported / name).read_bytes())
    place = content.index(b"1e-05") if name == "config.json" else len(content) - 1
    content[place] ^= 1
    (exported / name).write_bytes(content)
    with pytest.raises(UserError, match=f"hf/{name} is missing or not as it was exported"):
        load_model(exported, "cpu")


def test_an_export_without_a_sound_config_json(exported: Path):
    (exported / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"hf/config.json is missing or not as it was exported"):
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
    with pytest.raises(UserError, match=r"export.json is damaged \("):
        load_model(exported, "cpu")


def test_missing_cut_off_and_pickled_weights(exported: Path):
    weights = exported / "model.safetensors"
    (exported / EXPORT).unlink()
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors"):
        load_model(exported, "cpu")
    weights.unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        load_model(exported, "cpu")
    (exported / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"pytorch_model.bin is pickled, and is not opened"):
        load_model(exported, "cpu")


def test_an_index_that_leads_elsewhere(foreign: Path):
    change(foreign / "model.safetensors.index.json", weight_map={"model.norm.weight": "../elsewhere.safetensors"})
    with pytest.raises(UserError, match=r"lists '../elsewhere.safetensors', which is no file in this folder"):
        load_model(foreign, "cpu")


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
