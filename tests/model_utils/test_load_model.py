"""Models that --checkpoint may name: those of runs and of exports."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.model import LLM
from src.model_utils.hf_export import export
from src.model_utils.llama_format import EXPORT, HEAD, llama_tensors, our_tensors, read_export, read_weights
from src.model_utils.load_model import PackedLinear, load_model, pack_linears
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


@pytest.mark.parametrize("mistake", [None, 7, 300 * "x"])
def test_what_is_neither_a_name_nor_a_path_is_refused(mistake: Any):
    with pytest.raises(UserError, match=rf"Cannot load a checkpoint: .*/{mistake} does not exist"):
        load_model(mistake)


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
        read_weights(exported, read_export(exported))
    weights.pop("model.norm.weight")
    save_file(weights, exported / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight is missing, expected \(32,\)"):
        read_weights(exported, read_export(exported))


def test_another_programs_model_is_refused(exported: Path):
    (exported / EXPORT).unlink()
    with pytest.raises(UserError, match=r"hf/config\.json: it is another program's model, without export\.json"):
        load_model(exported, "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_export_that_changed_is_refused(exported: Path, name: str):
    content = bytearray((exported / name).read_bytes())
    place = content.index(b"1e-05") if name == "config.json" else len(content) - 1
    content[place] ^= 1
    (exported / name).write_bytes(content)
    with pytest.raises(UserError, match=f"hf/{name}: it is missing or differs from what was exported"):
        load_model(exported, "cpu")


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
        read_weights(exported, read_export(exported))
    weights.unlink()
    with pytest.raises(UserError, match=r"Cannot read .*model.safetensors"):
        read_weights(exported, read_export(exported))


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
    for name in (EXPORT, "model.gguf"):
        (tmp_path / "folder" / name).touch()
    with pytest.raises(UserError, match=r"it is GGUF, for llama.cpp"):
        load_model(tmp_path / "folder", "cpu")


def test_names_map_to_a_llama_and_back():
    model = small_model(replace(SHAPE, n_layer=3, ffn_mult=2))
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    theirs = llama_tensors(ours)
    assert theirs[HEAD].data_ptr() == ours["embedding.weight"].data_ptr()
    back = our_tensors(theirs, list(ours))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    half = our_tensors({name: tensor.bfloat16() for name, tensor in theirs.items()}, list(ours))
    assert all(torch.equal(half[name], ours[name].bfloat16().float()) for name in ours)


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bf16 kernels for this processor",
)
@torch.inference_mode()
def test_a_packed_model_gives_the_same_logits_to_the_bit():
    plain = small_model().bfloat16()
    packed = copy.deepcopy(plain)
    pack_linears(packed)
    assert isinstance(packed.head, PackedLinear)
    for shape in ((1, 1), (1, 7), (5, 33)):
        ids_BT = torch.randint(plain.config.n_vocab, shape)
        assert torch.equal(packed(ids_BT), plain(ids_BT))


def test_weights_in_float32_stay_plain(tiny_config: ModelConfig):
    model = LLM(tiny_config)
    pack_linears(model)
    assert not any(isinstance(part, PackedLinear) for part in model.modules())
