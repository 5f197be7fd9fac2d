"""A trained model as other programs open it: a Hugging Face folder, or a GGUF file for llama.cpp.

Beside the weights lie the tokenizer, a model card with what the run measured, and export.json with where it is from.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from src.data_processing.tokenizer import load_tokenizer
from src.model_utils.debugging import count_parameters
from src.model_utils.export_folder import Origin, check_out, exported_files, read_origin, writing
from src.model_utils.gguf_export import check_gguf, write_gguf
from src.model_utils.hub_push import check_push, upload
from src.model_utils.llama_folder import WEIGHTS, is_model_folder, write_model_folder
from src.model_utils.load_model import LoadedModel, load_model
from src.model_utils.model_card import model_card
from src.params import to_dict
from src.utils.errors import UserError, exit_with, say
from src.utils.files import size_text

_TORCH_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_BYTES = {"float32": 4, "bf16": 2, "q8_0": 34 / 32}  # a number of a matrix; q8_0 has a float16 scale for 32 of them


def export(checkpoint: str | Path, out: Path, form: str, dtype: str, overwrite: bool = False) -> None:
    """Exports the model in `checkpoint`, which is as `load_model` has it, to the folder `out`.

    `form` is hf or gguf; `dtype` is float32, bf16 or, in gguf, q8_0: of all weights in hf, of matrices in gguf. Raises
    UserError for a model that cannot be exported so, or an `out` that must not be overwritten; StorageError.
    """
    if form == "hf" and dtype not in _TORCH_DTYPES:
        raise UserError(f"--dtype {dtype} is a type of GGUF; add --format gguf, or choose float32 or bf16")
    if out.suffix in (".gguf", ".safetensors"):
        raise UserError(f"--out {out} looks like a file, but is to be the folder that holds it; leave out {out.suffix}")
    check_out(out, overwrite)
    loaded, tokenizer = load_model(checkpoint, "cpu"), load_tokenizer()
    config, origin = loaded.config.model, _origin(loaded)
    has_tokenizer = config.n_vocab >= tokenizer.n_vocab
    if form == "gguf":
        check_gguf(config, dtype, tokenizer.n_vocab)
    elif not has_tokenizer:
        say(f"warning: exported without a tokenizer: the model's {config.n_vocab:,} tokens are not {tokenizer.name}'s")
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.end_of_text)]
    weights = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    parameters = count_parameters(loaded.model)
    file = WEIGHTS if form == "hf" else f"{loaded.config.run_name}-{dtype}.gguf"
    with writing(out, origin, overwrite, int(parameters * _BYTES[dtype])) as folder:
        card = model_card(origin, config, parameters, dtype, file, has_tokenizer)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if form == "hf":
            write_model_folder(folder, config, weights, tokens if has_tokenizer else None, _TORCH_DTYPES[dtype])
        else:
            write_gguf(folder / file, loaded.config.run_name, config, weights, tokens, dtype)


def _origin(loaded: LoadedModel) -> Origin:
    """Where a model comes from: an export, or a run, whose records lie above the checkpoint unless it was moved."""
    if is_model_folder(loaded.path):
        if origin := read_origin(loaded.path):
            return origin
        raise UserError(f"{loaded.path} is another program's model, and its tokenizer may be another too; name a run")
    # The names of a person's folders are not for those who get the model.
    data, evaluation = loaded.config.data, loaded.config.eval
    config = replace(
        loaded.config,
        data=replace(data, dir=Path(data.dir).name or data.dir),
        eval=replace(evaluation, hellaswag_data=Path(evaluation.hellaswag_data).name or evaluation.hellaswag_data),
    )
    run = loaded.path.parent.parent
    return Origin(
        step=loaded.step,
        config=to_dict(config),
        dataset_sha256=loaded.dataset_sha256,
        sources=_sources(run, loaded.dataset_sha256),
        figures=_figures(run, loaded.step),
    )


def _sources(run: Path, dataset_sha256: str) -> list[dict[str, Any]]:
    """Where the text came from that the model was trained on, if the run's config.json is about that."""
    try:
        dataset = json.loads((run / "config.json").read_text(encoding="utf-8"))["dataset"]
        if dataset["manifest_sha256"] != dataset_sha256:
            return []
        return [{name: value for name, value in source.items() if name != "path"} for source in dataset["sources"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _figures(run: Path, step: int) -> dict[str, dict[str, Any]]:
    """By kind, the last line of metrics.jsonl up to `step` that has figures for the model card."""
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return found
    for line in lines:
        try:
            record = json.loads(line)
            if record["kind"] in ("train", "validation", "hellaswag") and record["step"] <= step:
                found[record["kind"]] = record
        except (ValueError, KeyError, TypeError):  # a line that was cut off
            continue
    return found


def _push(out: Path, files: dict[str, bool], repository: str, uploading: bool) -> dict[str, Any]:
    """Says what an upload consists of, and does it if asked; returns that for the JSON.

    Raises UserError where the weights are not as they were exported; the other files are there to be edited.
    """
    origin = read_origin(out, *(name for name in files if Path(name).suffix in (".safetensors", ".gguf")))
    for name, changed in files.items():
        say(f"{size_text((out / name).stat().st_size):>10}  {name}{' (changed since its export)' if changed else ''}")
    if not uploading:
        say(f"dry run, nothing was sent: --upload sends these to {repository}; one that is new will be private")
        return {"repository": repository, "uploaded": False}
    message = f"{origin.config['run_name']}, step {origin.step}" if origin else ""
    return {"repository": repository, "uploaded": True, "address": upload(out, files, repository, message)}


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    if args.checkpoint is None and args.push is None:
        raise UserError("--checkpoint is missing; only --push does without it, for a folder that was exported before")
    if args.checkpoint is None and (args.format or args.dtype or args.overwrite):
        raise UserError("--format, --dtype and --overwrite are about a new export; add --checkpoint, or leave them out")
    if args.upload and args.push is None:
        raise UserError("--upload takes --push OWNER/NAME, which says where to")
    if args.push is not None:
        check_push(args.push, args.upload)
    started = time.perf_counter()
    if args.checkpoint is not None:
        export(args.checkpoint, args.out, args.format or "hf", args.dtype or "float32", args.overwrite)
    seconds = round(time.perf_counter() - started, 3)
    files = exported_files(args.out)
    result: dict[str, Any] = {
        "export": str(args.out.absolute()),
        "files": {name: (args.out / name).stat().st_size for name in files},
        "seconds": seconds,
    }
    if args.push is not None:
        result["push"] = _push(args.out, files, args.push, args.upload)
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_utils.hf_export",
        description="Export a trained model for other programs: as a folder that transformers opens, or as GGUF for "
        "llama.cpp. Prints one JSON object as the last line.",
    )
    parser.add_argument("--checkpoint", help="a run (folder or name), a step_* folder, or an export in hf")
    parser.add_argument("--out", required=True, type=Path, help="the folder to make, or with --push one made before")
    parser.add_argument("--format", choices=("hf", "gguf"), help="Hugging Face folder (default) or GGUF file")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bf16", "q8_0"),
        help="how weights are stored (default: float32), in gguf those of matrices; q8_0, a byte a number and a scale "
        "for 32, is for gguf",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export that nobody has changed")
    parser.add_argument("--push", metavar="OWNER/NAME", help="list what would go to this repository on the hub")
    parser.add_argument("--upload", action="store_true", help="with --push: really upload it")
    return parser


if __name__ == "__main__":
    exit_with(main)
