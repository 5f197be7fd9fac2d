"""A model and its tokenizer as one GGUF file, which llama.cpp and the programs around it open."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from src.model_utils.byte_level_bpe import END_OF_TEXT, merges, printable
from src.model_utils.llama_format import llama_tensors
from src.params import ModelConfig
from src.utils.errors import UserError

_Q8_0_BLOCK = 32  # numbers that share a scale


def check_gguf(config: ModelConfig, dtype: str, n_tokens: int) -> None:
    """Raises UserError where the gguf package is missing, or a model of this shape does not fit into the format."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            "GGUF is written by the package gguf, which is not here; run: pip install gguf==0.19.0"
        ) from None
    if config.n_vocab < n_tokens:
        raise UserError(
            f"GGUF needs the tokenizer, whose {n_tokens:,} tokens are more than model.n_vocab = {config.n_vocab:,}, so "
            "the model was trained on others; use --format hf"
        )
    if dtype == "q8_0" and config.n_embd % _Q8_0_BLOCK:
        raise UserError(
            f"q8_0 takes {_Q8_0_BLOCK} numbers at a time, of which model.n_embd = {config.n_embd} is no multiple; "
            "use --dtype bf16"
        )


def write_gguf(
    path: Path, name: str, config: ModelConfig, ours: dict[str, torch.Tensor], tokens: Sequence[bytes], dtype: str
) -> None:
    """Writes the model of the state dict `ours` to `path`, as one called `name` of the architecture llama.

    `dtype` is that of matrices: float32, bf16, or q8_0, which is 8 bits and a float16 scale for 32 numbers. Vectors are
    float32, as llama.cpp wants them. `tokens` in the order of rank; the end-of-text token follows them. The format:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Raises OSError.
    """
    import gguf

    of_matrices, file_type = {
        "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }[dtype]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.n_vocab)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.ffn_hidden)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    _add_tokenizer(writer, tokens, config.n_vocab)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layer)
    for llama_name, tensor in _tensors(ours, config):
        kind = of_matrices if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        gguf_name = names.get_name(llama_name, try_suffixes=(".weight", ".bias"))
        assert gguf_name, f"{llama_name} is no tensor of a Llama"
        writer.add_tensor(gguf_name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, tokens: Sequence[bytes], n_vocab: int) -> None:
    """The tokenizer, which puts nothing before or after a text; the model's unused ids get names that no text has."""
    from gguf import TokenType

    unused = [f"<|unused_{i}|>" for i in range(len(tokens) + 1, n_vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*printable(tokens), END_OF_TEXT, *unused])
    writer.add_token_types([TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] + [TokenType.UNUSED] * len(unused))
    left, right = (printable(parts) for parts in zip(*merges(tokens), strict=True))
    writer.add_token_merges([f"{first} {second}" for first, second in zip(left, right, strict=True)])
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _tensors(ours: dict[str, torch.Tensor], config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under transformers' names, but as llama.cpp's llama wants them.

    That one rotates neighbours, dimension 2i with 2i + 1, where we rotate i with i + K/2 of a head's K: so the rows of
    the query and key projections are interleaved, which changes no product of a query with a key. It takes a head that
    is not there from the embedding.
    """
    for name, tensor in llama_tensors(ours, config.n_layer).items():
        if name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            halves = tensor.unflatten(0, (config.n_head, 2, config.head_dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        if name != "lm_head.weight":
            yield name, tensor
