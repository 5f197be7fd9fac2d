"""A Hugging Face model folder with a Llama: our model written as one, and one, ours or another program's, read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from src.model import LLM
from src.model_utils.byte_level_bpe import tokenizer_files
from src.model_utils.llama_format import llama_settings, llama_tensors, model_config, our_tensors
from src.params import ModelConfig
from src.utils.errors import UserError

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"  # of weights that lie in several files
_HEAD = "lm_head.weight"  # where a program writes it in spite of its being the embedding


def write_model_folder(
    folder: Path, config: ModelConfig, ours: dict[str, torch.Tensor], tokens: Sequence[bytes] | None, dtype: torch.dtype
) -> None:
    """Writes into `folder` what transformers needs to open the model of the state dict `ours`, weights as `dtype`.

    `tokens` are the tokenizer's in the order of rank, after which the end-of-text token comes; None leaves the
    tokenizer out. Raises OSError.
    """
    end_of_text = len(tokens) if tokens else None
    special_ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    files: dict[str, Any] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **llama_settings(config),
            "num_key_value_heads": config.n_head,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            **special_ids,
            "torch_dtype": str(dtype).removeprefix("torch."),  # which transformers 4 and 5 both read
        },
        # Not in config.json: transformers keeps the embedding of a padding token from learning.
        "generation_config.json": {**special_ids, "pad_token_id": end_of_text},
        **(tokenizer_files(tokens, config.n_ctx) if tokens else {}),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    theirs = {name: tensor.to(dtype) for name, tensor in llama_tensors(ours, config.n_layer).items() if name != _HEAD}
    try:
        save_file(theirs, folder / WEIGHTS, metadata={"format": "pt"})  # transformers 4 refuses a file without it
    except SafetensorError as error:  # of the disk: the tensors are sound
        raise OSError(str(error)) from error


def is_model_folder(path: Path) -> bool:
    """Whether `path` has the config.json of transformers, rather than that of a run."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and ("model_type" in content or "architectures" in content)


def read_model_folder(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The model's shape, and its weights in float32 under our names.

    Raises UserError for another architecture, naming field and value, and for weights that are missing, pickled or do
    not fit the shape.
    """
    config = model_config(_read_json(folder / "config.json"), folder / "config.json")
    tensors = _read_weights(folder)
    head = tensors.pop(_HEAD, None)
    # Older versions of transformers saved the frequencies, which follow from the settings.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    with torch.device("meta"):
        expected = llama_tensors(dict(LLM(config).named_parameters()), config.n_layer)
    expected.pop(_HEAD)
    problems = [
        f"{name}: expected {_shape(expected.get(name))}, found {_shape(tensors.get(name))}"
        for name in sorted(expected.keys() | tensors.keys())
        if _shape(expected.get(name)) != _shape(tensors.get(name))
    ]
    problems += [f"{n}: {t.dtype} is no floating-point type" for n, t in tensors.items() if not t.is_floating_point()]
    if head is not None and not problems and not torch.equal(head, tensors["model.embed_tokens.weight"]):
        problems = [f"{_HEAD}: differs from model.embed_tokens.weight, with which it shares its weight in our model"]
    if problems:
        raise UserError(f"the weights in {folder} do not fit its config.json:\n  - " + "\n  - ".join(problems[:10]))
    return config, our_tensors(tensors, config.n_layer)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / _INDEX).exists():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        listed = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        for name in listed:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{folder / _INDEX} lists {name!r}, which is no file in this folder")
        names = sorted({str(name) for name in listed})
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            remedy = f"{pickled[0]} is pickled, and is not opened; save the model as safetensors" if pickled else ""
            raise UserError(f"{folder} has no {name}: {remedy or 'copy it there, or export the model again'}") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {folder / name}: {error}; copy it again, or export the model again") from None
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _shape(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else str(tuple(tensor.shape))
