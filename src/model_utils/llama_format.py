"""The same model under the names of transformers' Llama, which has our architecture once its biases are turned on."""

import math
from typing import Any

import torch

from src.params import ModelConfig
from src.utils.errors import UserError


def llama_settings(config: ModelConfig) -> dict[str, Any]:
    """The fields of a transformers.LlamaConfig of this shape. Llama has no dropout where ours is."""
    return {
        "vocab_size": config.n_vocab,
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    }


def llama_tensors(ours: dict[str, torch.Tensor], n_layer: int) -> dict[str, torch.Tensor]:
    """An LLM's state dict under the names of LlamaForCausalLM; the tensors are views of ours."""
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    theirs["lm_head.weight"] = ours["embedding.weight"]
    for layer in range(n_layer):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        theirs[there + "input_layernorm.weight"] = ours[here + "attn_norm.weight"]
        theirs[there + "post_attention_layernorm.weight"] = ours[here + "ffn_norm.weight"]
        for kind in ("weight", "bias"):
            qkv = ours[f"{here}attn.qkv_proj.{kind}"].chunk(3)
            for name, part in zip("qkv", qkv, strict=True):
                theirs[f"{there}self_attn.{name}_proj.{kind}"] = part
            value, gate = ours[f"{here}ffn.in_proj.{kind}"].chunk(2)
            theirs[f"{there}self_attn.o_proj.{kind}"] = ours[f"{here}attn.out_proj.{kind}"]
            theirs[f"{there}mlp.up_proj.{kind}"] = value
            theirs[f"{there}mlp.gate_proj.{kind}"] = gate
            theirs[f"{there}mlp.down_proj.{kind}"] = ours[f"{here}ffn.out_proj.{kind}"]
    return theirs


def model_config(settings: dict[str, Any], origin: object) -> ModelConfig:
    """The inverse of `llama_settings`: the shape that the config.json of a LlamaForCausalLM means, without dropout.

    Sizes must be there; another field that is missing has the value that transformers then takes. Raises UserError
    naming `origin`, and the field and value that our architecture does not have.
    """
    for field, if_missing, ours in (
        ("model_type", None, "llama"),
        ("architectures", ["LlamaForCausalLM"], ["LlamaForCausalLM"]),
        ("hidden_act", "silu", "silu"),
        ("attention_bias", False, True),
        ("mlp_bias", False, True),
        ("tie_word_embeddings", False, True),
        ("quantization_config", None, None),
    ):
        _require(settings.get(field, if_missing) == ours, settings, field, ours, origin)
    width, hidden, heads, n_layer, n_vocab, n_ctx = (
        _whole(settings, field, origin)
        for field in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_hidden_layers",
            "vocab_size",
            "max_position_embeddings",
        )
    )
    _require(settings.get("num_key_value_heads") in (None, heads), settings, "num_key_value_heads", heads, origin)
    _require(settings.get("head_dim") in (None, width // heads), settings, "head_dim", width // heads, origin)
    _require(hidden % width == 0, settings, "intermediate_size", f"a multiple of hidden_size, {width},", origin)
    config = ModelConfig(
        n_vocab=n_vocab,
        n_ctx=n_ctx,
        n_embd=width,
        n_head=heads,
        n_layer=n_layer,
        ffn_mult=hidden // width,
        norm_eps=_positive(settings.get("rms_norm_eps", 1e-6), "rms_norm_eps", origin),
        rope_theta=_rope_theta(settings, origin),
        residual_dropout=0.0,
        ffn_dropout=0.0,
    )
    if problems := config.problems():
        raise UserError(f"{origin} describes a model that cannot work: {'; '.join(problems)}")
    return config


def our_tensors(theirs: dict[str, torch.Tensor], n_layer: int) -> dict[str, torch.Tensor]:
    """The inverse of `llama_tensors`, in float32: what was float32 and needs no joining is a view of theirs."""
    ours = {"embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    for layer in range(n_layer):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        ours[here + "attn_norm.weight"] = theirs[there + "input_layernorm.weight"]
        ours[here + "ffn_norm.weight"] = theirs[there + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            qkv = [theirs[f"{there}self_attn.{name}_proj.{kind}"].float() for name in "qkv"]
            value_and_gate = [theirs[f"{there}mlp.{name}_proj.{kind}"].float() for name in ("up", "gate")]
            ours[f"{here}attn.qkv_proj.{kind}"] = torch.cat(qkv)
            ours[f"{here}attn.out_proj.{kind}"] = theirs[f"{there}self_attn.o_proj.{kind}"]
            ours[f"{here}ffn.in_proj.{kind}"] = torch.cat(value_and_gate)
            ours[f"{here}ffn.out_proj.{kind}"] = theirs[f"{there}mlp.down_proj.{kind}"]
    return {name: tensor.float() for name, tensor in ours.items()}


def _require(holds: bool, settings: dict[str, Any], field: str, ours: Any, origin: object) -> None:
    if not holds:
        raise UserError(f"{origin} has {field} = {settings.get(field)!r}; our model has {ours}, so it cannot be it")


def _whole(settings: dict[str, Any], field: str, origin: object) -> int:
    value = settings.get(field)
    if type(value) is not int or value < 1:
        raise UserError(f"{origin} has {field} = {value!r}; it must be a whole number above 0")
    return value


def _positive(value: Any, field: str, origin: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{origin} has {field} = {value!r}; it must be a number above 0")
    return float(value)


def _rope_theta(settings: dict[str, Any], origin: object) -> float:
    """Of plain rotary positions, in any of the ways in which transformers has written them (5: rope_parameters)."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict) or (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        found = kind if isinstance(rope, dict) else rope
        raise UserError(f"{origin} has rope_type = {found!r}; our model has plain RoPE, 'default'")
    return _positive(rope.get("rope_theta", settings.get("rope_theta", 10_000.0)), "rope_theta", origin)
