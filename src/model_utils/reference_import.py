"""Turn a checkpoint file of the reference implementation into a run, which every command then opens like ours.

The file is a pickled dict: model_state_dict, hParams (an instance of its class src.params.HParams), step, and other
entries that are ignored. PyTorch's weights-only unpickler reads it as plain data: the empty class below replaces that
class, and any other class or function is refused.
"""

import time
import zipfile
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from src.model import LLM
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import lf_llm_269m
from src.model_utils.checkpoint_utils import save_checkpoint, step_dir
from src.params import DataConfig, ModelConfig, to_dict
from src.utils.errors import (
    UserError,
    connection_advice,
    exit_with,
    hub_answers,
    hub_errors,
    hub_failure,
    print_result,
    say,
)
from src.utils.files import fingerprint, new_folder
from src.utils.logger import RunLogger
from src.utils.root import run_dir

_HPARAMS: dict[str, tuple[str, Any]] = {  # the reference's setting: ours, and its type
    **{name: (name, index) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")},
    "attn_res_pdrop": ("residual_dropout", float),
    "ffn_act_pdrop": ("ffn_dropout", float),
}
_PARTS = {  # the reference's name of a part: ours
    "_orig_mod.": "",  # from torch.compile
    "transformer_blocks": "blocks",
    "embd": "embedding",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    "ffn.net.0": "ffn.in_proj",
    "ffn.net.3": "ffn.out_proj",
}
_HEAD = "out_proj.weight"  # saved in addition to the embedding, whose weight it shares


class _HParams:
    """Replaces the reference's class. A file's values become its attributes."""


def read_reference(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], int]:
    """Returns shape, float32 weights by our names and completed steps of the checkpoint in the file `path`.

    Checks every tensor and runs nothing in the file. Raises UserError.
    """
    try:
        if not path.is_file():  # reading a pipe would wait
            raise OSError("it is not a file")
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save does not do")
            if damaged := archive.testzip():  # torch.load skips checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        with safe_globals([(_HParams, "src.params.HParams")]):
            if code := sorted(get_unsafe_globals_in_checkpoint(path)):
                raise ValueError(f"it names {code[0]}, which could run a program; nothing of it was run")
            content = torch.load(path, map_location="cpu", weights_only=True)
        return _checked(content)
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror or error}. Name a checkpoint file of torch.save."
        ) from None
    except Exception as error:  # a malicious file may fail in any way
        text = "; ".join(getattr(error, "problems", [])) or f"{type(error).__name__}: {error}"  # of a ConfigError
        reason = " ".join(text.removeprefix("ValueError: ").split())[:300]
        raise UserError(f"Cannot import {path}: {reason}. Use a checkpoint of the reference implementation.") from None


def import_reference(path: Path, run_name: str) -> dict[str, Any]:
    """Turns the file `path` into the run `run_name`, completely or not at all. Raises UserError and StorageError."""
    run = run_dir(run_name)
    with new_folder(run) as folder:
        model, weights, step = read_reference(path)
        # The recipe with the file's model and steps. The training data is unknown. No warm-up, which fits any length.
        recipe, imported = lf_llm_269m(), {"file": path.name, **fingerprint(path)}
        train = replace(recipe.train, batch_tokens=recipe.micro_batch_size * model.n_ctx, total_steps=max(step, 1))
        optim, data = replace(recipe.optim, warmup_steps=0), DataConfig(dir="unknown")
        config = replace(recipe, run_name=run_name, model=model, train=train, optim=optim, data=data)
        state = {"config": to_dict(config), "dataset_sha256": "", "precision": "torch.bfloat16"}  # the reference's
        save_checkpoint(folder / "checkpoints", step, {"model": weights}, state)
        log = RunLogger(folder, is_main=True)
        log.write_json("config.json", {"config": to_dict(config), "dataset": {}, "imported": imported})
        log.event("import", step, f"from {path.name}", **imported)
        log.write_status("done", step, config.total_steps, None, f"imported from {path.name}")
    return {
        "run": str(run),
        "checkpoint": str(step_dir(run / "checkpoints", step)),
        "step": step,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
    }


def _checked(content: dict[str, Any]) -> tuple[ModelConfig, dict[str, torch.Tensor], int]:
    """Returns the content of a file under our names. Raises any exception if it is not a reference checkpoint."""
    hparams = vars(content["hParams"])
    if hparams.keys() != _HPARAMS.keys():
        raise ValueError(f"hParams has the settings {', '.join(hparams)}, expected {', '.join(_HPARAMS)}")
    model = ModelConfig(**{ours: kind(hparams[name]) for name, (ours, kind) in _HPARAMS.items()})
    theirs = {_our_name(name): tensor for name, tensor in content["model_state_dict"].items()}
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LLM(model).named_parameters()}
    head = theirs.pop(_HEAD, None)
    if difference := sorted(theirs.keys() ^ shapes.keys()):
        raise ValueError(f"weights are missing or unknown: {', '.join(difference[:5])}")
    weights = {name: _tensor(name, theirs[name], shape) for name, shape in shapes.items()}
    if head is not None and not torch.equal(head.float(), weights["embedding.weight"]):
        raise ValueError(f"{_HEAD} differs from the embedding, whose weight the head shares")
    if (step := index(content["step"])) < 0:
        raise ValueError(f"step is {step}")
    return model, weights, step


def _tensor(name: str, value: Any, shape: torch.Size) -> torch.Tensor:
    """Returns a float32 copy of `value`. Raises ValueError for anything but finite numbers of this shape."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or not value.is_floating_point() or value.shape != shape:
        raise ValueError(f"{name} is not a tensor of floats with the shape {list(shape)}")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():  # a small file, a huge copy
        raise ValueError(f"{name} repeats the same memory")
    tensor = value.detach().to(torch.float32, copy=True).contiguous()
    if not tensor.isfinite().all():
        raise ValueError(f"{name} is not finite")
    return tensor


def _our_name(name: str) -> str:
    for theirs, ours in _PARTS.items():
        name = name.replace(theirs, ours)
    return name


def main() -> int:
    parser = Parser(
        prog="python -m src.model_utils.reference_import",
        description="Turn a checkpoint file of the reference implementation into a run, for sampling, evaluation and "
        "export. The file is read as data; nothing in it is run. Prints one JSON object as the last line, or text on "
        "a terminal.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="the file, .pth")
    source.add_argument("--hub", nargs=2, metavar=("OWNER/NAME", "FILE"), help="download it from this repository")
    parser.add_argument("--run-name", required=True, metavar="NAME", help="the run to make, under temp_data/runs")
    args, started = parser.parse_args(), time.perf_counter()
    path = args.checkpoint
    if args.hub:
        repository, file = args.hub
        if not constants.HF_HUB_OFFLINE and not hub_answers():  # the download itself would retry for half a minute
            raise UserError(
                f"Cannot get {file} of {repository}: {constants.ENDPOINT} does not answer. {connection_advice()}."
            )
        try:
            path = Path(hf_hub_download(repository, file))
        except hub_errors() as error:
            remedy = "Check the names, and for a repository that is not public the token in HF_TOKEN"
            raise hub_failure(f"get {file} of {repository} from", error, remedy) from error
    say(f"reading {path}")
    summary = import_reference(path, args.run_name)
    print_result(
        {**summary, "seconds": round(time.perf_counter() - started, 3)},
        f"run {args.run_name}, step {summary['step']:,}: {summary['parameters']:,} parameters, in {summary['run']}",
    )
    return 0


if __name__ == "__main__":
    exit_with(main)
