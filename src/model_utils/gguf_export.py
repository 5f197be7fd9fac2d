"""A model and its tokenizer as one GGUF file, which llama.cpp and programs built on it open.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.model_utils.llama_format import HEAD, XIELU, architecture, llama_tensors
from src.params import ModelConfig
from src.utils.errors import StorageError, UserError

# Name of the matrix type, name of the file type, and the largest rounding error relative to a matrix's largest number.
_TYPES = {
    "float32": ("F32", "ALL_F32", 0.0),
    "bf16": ("BF16", "MOSTLY_BF16", 2**-8),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0", 1 / 127),
}
_Q8_0_BLOCK = 32  # numbers that share a scale


def check_gguf(config: ModelConfig, dtype: str, n_tokens: int) -> None:
    """Raises UserError if the gguf package is missing, or the model does not fit the format."""
    if find_spec("gguf") is None:
        raise UserError(
            f"Cannot write GGUF: the package gguf is missing. Run: {sys.executable} -m pip install gguf==0.19.0"
        )
    if config.n_vocab < n_tokens:
        raise UserError(
            f"Cannot write GGUF: model.n_vocab is {config.n_vocab:,}, and the tokenizer, which GGUF needs, has "
            f"{n_tokens:,} tokens. Use --format hf."
        )
    for what, size in (("model.n_embd", config.n_embd), ("the feed-forward network's width", config.ffn_hidden)):
        if dtype == "q8_0" and size % _Q8_0_BLOCK:
            raise UserError(f"Cannot store q8_0: {what} is {size}, not a multiple of {_Q8_0_BLOCK}. Use --dtype bf16.")


def write_gguf(
    path: Path,
    name: str,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    tokens: list[str],
    merges: list[str],
    dtype: str,
) -> None:
    """Writes our named parameters `weights` to `path` as the model `name`, reads the file back and compares.

    `dtype` is for matrices; vectors are float32, because llama.cpp requires it. `tokens` end with the end-of-text
    token. Raises OSError, and StorageError if the file does not hold the model.
    """
    import gguf

    matrix_type = gguf.GGMLQuantizationType[_TYPES[dtype][0]]
    metadata = {"general.name": name, **_metadata(config, tokens, merges, dtype)}
    tensors = _tensors(weights, config)
    writer = gguf.GGUFWriter(path, architecture(config).lower())
    add: dict[type, Any] = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    add |= {float: writer.add_float32, list: writer.add_array}
    for key, value in metadata.items():
        add[type(value)](key, value)
    for tensor_name, array in tensors.items():
        kind = matrix_type if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor_name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if difference := next(_differences(gguf.GGUFReader(path), metadata, tensors, _TYPES[dtype][2]), ""):
        raise StorageError(
            f"Cannot use the GGUF file just written: {difference} differs. Check the disk and export again."
        )


def _metadata(config: ModelConfig, tokens: list[str], merges: list[str], dtype: str) -> dict[str, Any]:
    import gguf

    # Ids that the tokenizer never uses get names that no text contains.
    unused = [f"<|unused_{i}|>" for i in range(len(tokens), config.n_vocab)]
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    kind = architecture(config).lower()
    xielu = {f"xielu.{key}": [value] * config.n_layer for key, value in XIELU.items()} if kind == "apertus" else {}
    return {
        "general.file_type": int(gguf.LlamaFileType[_TYPES[dtype][1]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{kind}.vocab_size": config.n_vocab,
        f"{kind}.context_length": config.n_ctx,
        f"{kind}.embedding_length": config.n_embd,
        f"{kind}.feed_forward_length": config.ffn_hidden,
        f"{kind}.block_count": config.n_layer,
        f"{kind}.attention.head_count": config.n_head,
        f"{kind}.attention.head_count_kv": config.n_head,
        f"{kind}.attention.key_length": config.head_dim,
        f"{kind}.attention.value_length": config.head_dim,
        f"{kind}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{kind}.rope.dimension_count": config.head_dim,
        f"{kind}.rope.freq_base": config.rope_theta,
        **xielu,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *unused],
        "tokenizer.ggml.token_type": [int(k) for k in [*kinds, *[gguf.TokenType.UNUSED] * len(unused)]],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def _tensors(weights: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the weights by GGUF names. Without a head, llama.cpp uses the embedding, except for Apertus."""
    import gguf

    kind = architecture(config).lower()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.n_layer)
    tensors: dict[str, np.ndarray] = {}
    for llama_name, tensor in llama_tensors(weights).items():
        if (llama_name == HEAD and kind != "apertus") or ".act_fn." in llama_name:
            continue
        if kind == "llama" and (".q_proj." in llama_name or ".k_proj." in llama_name):
            # In a Llama, llama.cpp rotates dimension 2i with 2i + 1, we rotate i with i + K/2 (head dimension K).
            # Interleaving the rows of both projections maps one to the other and keeps every query-key product.
            halves = tensor.unflatten(0, (config.n_head, 2, config.head_dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        tensors[str(names.get_name(llama_name, try_suffixes=(".weight", ".bias")))] = tensor.numpy()
    return tensors


def _differences(
    reader: Any, metadata: dict[str, Any], tensors: dict[str, np.ndarray], rounding: float
) -> Iterator[str]:
    """Yields the names of fields and tensors that differ from those given, beyond the matrices' `rounding`."""
    import gguf

    for key, value in metadata.items():
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if key.startswith("xielu."):
            expected = np.float32(value).tolist()
        if key not in reader.fields or reader.fields[key].contents() != expected:
            yield key
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for name, array in tensors.items():
        limit = np.abs(array).max() * (rounding if array.ndim == 2 else 0.0)
        if stored[name].shape != array.shape or not (np.abs(stored[name] - array) <= limit).all():
            yield name
