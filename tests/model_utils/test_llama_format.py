"""Our model under Llama's names and back, and which Llamas are not our model."""

from typing import Any

import pytest
import torch

from src.model_utils.llama_format import llama_settings, llama_tensors, model_config, our_tensors
from src.params import ModelConfig
from src.utils.errors import UserError
from tests.model_utils.exports import small_model

SHAPE = ModelConfig(
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


@pytest.fixture
def settings() -> dict[str, Any]:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **llama_settings(SHAPE)}


def test_there_and_back():
    ours: dict[str, torch.Tensor] = dict(small_model(SHAPE).named_parameters())
    back = our_tensors(llama_tensors(ours, SHAPE.n_layer), SHAPE.n_layer)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_half_precision_becomes_float32():
    ours = small_model(SHAPE).state_dict()
    theirs = {name: tensor.bfloat16() for name, tensor in llama_tensors(ours, SHAPE.n_layer).items()}
    for name, tensor in our_tensors(theirs, SHAPE.n_layer).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, ours[name].bfloat16().float()), name


def test_the_shape_from_our_settings(settings: dict[str, Any]):
    assert model_config(settings, "here") == SHAPE


def test_the_shape_from_what_transformers_saves(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**llama_settings(SHAPE), architectures=["LlamaForCausalLM"])
    assert model_config(config.to_dict(), "here") == SHAPE


def test_what_is_missing_is_as_in_transformers(settings: dict[str, Any]):
    transformers = pytest.importorskip("transformers")
    del settings["rope_theta"], settings["rms_norm_eps"]
    theirs = transformers.LlamaConfig(**settings)
    found = model_config(settings, "here")
    assert found.norm_eps == theirs.rms_norm_eps
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("model_type", "mistral"), ("architectures", ["LlamaForSequenceClassification"]), ("hidden_act", "gelu")),
        *(("attention_bias", False), ("mlp_bias", False), ("tie_word_embeddings", False), ("num_key_value_heads", 2)),
        *(("head_dim", 16), ("intermediate_size", 100), ("quantization_config", {"bits": 4}), ("vocab_size", "many")),
        *(("num_hidden_layers", 0), ("hidden_size", 4.5), ("max_position_embeddings", None), ("vocab_size", True)),
        *(("rms_norm_eps", "small"), ("rope_theta", -1), ("rope_theta", float("inf"))),
    ],
)
def test_another_model_is_refused_with_field_and_value(settings: dict[str, Any], field: str, value: Any):
    with pytest.raises(UserError) as refusal:
        model_config({**settings, field: value}, "a/config.json")
    assert f"a/config.json has {field} = {value!r}" in str(refusal.value)


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias", "tie_word_embeddings", "hidden_size"])
def test_a_field_that_must_be_there(settings: dict[str, Any], field: str):
    del settings[field]
    with pytest.raises(UserError, match=f"has {field} = None"):
        model_config(settings, "here")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_positions_are_refused(settings: dict[str, Any], key: str):
    for name in ("type", "rope_type"):
        with pytest.raises(UserError, match="rope_type = 'linear'"):
            model_config({**settings, key: {name: "linear", "factor": 2.0}}, "here")
    plain = {**settings, key: {"rope_type": "default", "rope_theta": 5e5}}
    assert model_config(plain, "here").rope_theta == 5e5


def test_an_impossible_shape_is_refused(settings: dict[str, Any]):
    with pytest.raises(UserError, match=r"here describes a model that cannot work: .* not divisible"):
        model_config({**settings, "num_attention_heads": 5, "num_key_value_heads": 5}, "here")
