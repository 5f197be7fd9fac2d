"""Our model as transformers' Llama, Qwen3 or Apertus: names of weights, settings, and reading a model folder.

Llama computes the same as our model, with or without biases; Qwen3 does with QK-norm and without biases; Apertus is
Qwen3 with ReLU^2. Their weights are ours under other names. There, q, k and v are three matrices instead of one, and
the value and gate of the feed-forward network are two.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from src.model import LLM
from src.params import Config, ConfigError, ModelConfig, from_dict
from src.utils.errors import StorageError, UserError, cause_of
from src.utils.files import fingerprint, open_regular, read_json

WEIGHTS = "model.safetensors"
EXPORT = "export.json"
EXPORT_FORMAT = 1
HEAD = "lm_head.weight"

# For each part of a block, the other model's parts whose weights, concatenated by rows, are ours.
_BLOCK_PARTS = {
    "attn_norm": ("input_layernorm",),
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.out_proj": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn.in_proj": ("mlp.up_proj", "mlp.gate_proj"),  # value, then gate
    "ffn.up_proj": ("mlp.up_proj",),
    "ffn.out_proj": ("mlp.down_proj",),
}
_APERTUS_NAMES = {"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}
# Apertus's activation is p x^2 + beta x above 0, and n (exp(min(x, eps)) - 1 - x) + beta x below, with p =
# softplus(alpha_p) and n = beta + softplus(alpha_n). With p = 1 and n = beta = 0 it is ReLU^2, in bf16 as in float32.
XIELU = {"alpha_p": math.log(math.e - 1), "alpha_n": -1_000.0, "beta": 0.0, "eps": -1e-6}
_TYPES = {  # of what export.json holds
    "step": int,
    "config": dict,  # the run's, from params.to_dict, with names in place of paths
    "dataset_sha256": str,  # of the manifest of the training data; "" if unknown
    "sources": list,  # the dataset's, without folders
    "figures": dict,  # by kind (train, validation, hellaswag) the last line of metrics.jsonl up to the step
    "files": dict,  # size and hash by name
}


def architecture(config: ModelConfig) -> str:
    """Return the name of the architecture that computes the same as our model: Llama, Qwen3 or Apertus.

    Raises UserError for biases with QK-norm and for ReLU^2 without QK-norm, which none of them has.
    """
    if config.qk_norm and config.bias:
        raise UserError(
            "Cannot describe the model to transformers: no class has both model.bias and model.qk_norm. Train with "
            "--model.no-bias."
        )
    if config.ffn == "relu2":
        if not config.qk_norm:
            raise UserError(
                "Cannot describe the model to transformers: no class has model.ffn = relu2 without model.qk_norm. "
                "Train with --model.qk-norm --model.no-bias."
            )
        return "Apertus"
    return "Qwen3" if config.qk_norm else "Llama"


def llama_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the architecture's config.json for this shape. Dropout has no counterpart there. Raises UserError."""
    name = architecture(config)
    own: dict[str, dict[str, Any]] = {
        "Llama": {"mlp_bias": config.bias},
        "Qwen3": {},
        # Its defaults would stretch the positions.
        "Apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "rope_scaling": None},
    }
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": config.n_vocab,
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.head_dim,
        "hidden_act": "xielu" if name == "Apertus" else "silu",
        "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": config.bias,
        **own[name],
        "tie_word_embeddings": True,
    }


def llama_tensors(ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return our named parameters as the state dict of transformers' class; the tensors are views of ours."""
    theirs = {HEAD: ours["embedding.weight"]}
    is_apertus = "blocks.0.ffn.up_proj.weight" in ours
    for name, tensor in ours.items():
        names = _llama_names(name, is_apertus)
        theirs |= dict(zip(names, tensor.chunk(len(names)), strict=True))
        if name.endswith("ffn.up_proj.weight"):
            activation = names[0].replace("up_proj.weight", "act_fn.")
            shapes = {"alpha_p": (1,), "alpha_n": (1,)}
            theirs |= {activation + key: torch.full(shapes.get(key, ()), value) for key, value in XIELU.items()}
    return theirs


def our_tensors(theirs: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """The inverse of `llama_tensors` in float32, for our parameters `names`."""
    ours, is_apertus = {}, "blocks.0.ffn.up_proj.weight" in names
    for name in names:
        parts = [theirs[llama_name].float() for llama_name in _llama_names(name, is_apertus)]
        ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]  # cat would copy a single one
    return ours


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors from a missing or damaged file in the block into a UserError that names `path`."""
    try:
        yield
    except (UserError, StorageError):
        raise
    except (ConfigError, OSError, SafetensorError, LookupError, AttributeError, TypeError, ValueError) as error:
        cause = "; ".join(getattr(error, "problems", [])) or cause_of(error)  # of a ConfigError
        raise UserError(f"Cannot read {path}: {cause}. Copy the folder again, or export the model again.") from None


def read_weights(folder: Path, export: dict[str, Any]) -> tuple[Config, dict[str, torch.Tensor]]:
    """The run's config and the float32 weights, by our names, of the export in `folder`. Raises UserError.

    `export`: the result of `read_export`.
    """
    path = folder / WEIGHTS
    with _reading(folder / EXPORT):
        config = from_dict(export["config"])
    with _reading(path):
        open_regular(path).close()  # load_file would wait for a FIFO
        theirs = load_file(path)
    with torch.device("meta"):
        parameters = dict(LLM(config.model).named_parameters())
    expected = llama_tensors(parameters)
    del expected[HEAD]  # a file leaves it out, because it is the embedding
    for name in sorted(expected.keys() | theirs.keys()):
        stored, needed = (tuple(t[name].shape) if name in t else "missing" for t in (theirs, expected))
        if stored != needed:
            raise UserError(f"Cannot use {path}: {name} is {stored}, expected {needed}. Export the model again.")
    return config, our_tensors(theirs, list(parameters))


def read_export(folder: Path, *unchanged: str) -> dict[str, Any]:
    """Returns export.json. Raises UserError, also if a file in `unchanged` differs from the exported one."""
    if not os.path.lexists(folder / EXPORT):
        raise UserError(f"{folder} is not an export of ours: it has no {EXPORT}. Name a run or its export.")
    with _reading(folder / EXPORT):
        content = read_json(folder / EXPORT)
        if content.get("format") != EXPORT_FORMAT:
            raise ValueError(f"its format is not {EXPORT_FORMAT}")
        if wrong := [name for name, kind in _TYPES.items() if not isinstance(content.get(name), kind)]:
            raise ValueError(f"{wrong[0]} is missing or has the wrong type")
    for name in unchanged:
        with _reading(folder / name):
            if fingerprint(folder / name) != content["files"].get(name):
                raise UserError(
                    f"Cannot use {folder / name}: it is missing or differs from what was exported. Copy the folder "
                    "again, or export the model again."
                )
    return content


def _llama_names(ours: str, is_apertus: bool) -> list[str]:
    """Returns transformers' names for one of our parameters, in the order of our rows."""
    if ours in ("embedding.weight", "head.weight"):
        return ["model.embed_tokens.weight"]
    if ours == "norm.weight":
        return ["model.norm.weight"]
    _, layer, *part, kind = ours.split(".")
    names = _BLOCK_PARTS[".".join(part)]
    if is_apertus:
        names = tuple(_APERTUS_NAMES.get(name, name) for name in names)
    return [f"model.layers.{layer}.{name}.{kind}" for name in names]
