"""Our model under a Llama's names and back, and exports as earlier versions wrote them."""

from pathlib import Path

import pytest
import torch

from src.model import LLM
from src.model_utils.llama_format import (
    HEAD,
    is_model_folder,
    llama_tensors,
    our_tensors,
    read_model_folder,
    read_origin,
)
from src.params import ModelConfig
from src.utils.errors import UserError
from tests.model_utils.exports import DATASET_SHA256, SHAPE, small_model

OTHER_SHAPE = ModelConfig(
    n_vocab=311,
    n_ctx=32,
    n_embd=48,
    n_head=4,
    n_layer=3,
    ffn_mult=2,
    norm_eps=3e-6,
    rope_theta=777.0,
    residual_dropout=0.0,
    ffn_dropout=0.0,
)


def weights(model: LLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_names_map_to_a_llama_and_back():
    ours = weights(small_model(OTHER_SHAPE))
    theirs = llama_tensors(ours)
    assert theirs[HEAD].data_ptr() == ours["embedding.weight"].data_ptr()
    back = our_tensors(theirs, list(ours))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    half = our_tensors({name: tensor.bfloat16() for name, tensor in theirs.items()}, list(ours))
    assert all(torch.equal(half[name], ours[name].bfloat16().float()) for name in ours)


def test_an_export_is_read(tiny_export: Path):
    assert is_model_folder(tiny_export)
    config, tensors = read_model_folder(tiny_export)
    assert config == SHAPE
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in weights(small_model()).items())
    origin = read_origin(tiny_export, "config.json", "model.safetensors")
    assert origin is not None
    assert (origin.step, origin.dataset_sha256) == (40, DATASET_SHA256)


def test_other_folders_are_not_exports(tiny_run: Path, tmp_path: Path):
    assert not is_model_folder(tiny_run)
    assert not is_model_folder(tmp_path)
    assert read_origin(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert is_model_folder(tmp_path)
    with pytest.raises(UserError, match=r"vocab_size is missing"):
        read_model_folder(tmp_path)
