"""Make a run of a checkpoint file of the reference implementation, which every command then opens like ours.

The file is a pickled dict: model_state_dict, hParams (an instance of its class src.params.HParams), step, and
mostly optimizer_state_dict. PyTorch's weights-only unpickler reads it as plain data: that class is replaced by the
empty one below, and any other class or function is refused.
"""

import argparse
import json
import os
import shutil
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from src.model import LLM
from src.model_configs.my_llm_config import config_from_command_line, lf_llm_269m
from src.model_utils.checkpoint_utils import save_checkpoint, step_dir
from src.model_utils.training_state import Progress, seed_random_state
from src.params import Config, DataConfig, ModelConfig, to_dict
from src.utils.errors import UserError, exit_with, hub_errors, hub_failure, say
from src.utils.files import fingerprint, storage_errors, sync
from src.utils.logger import RunLogger
from src.utils.root import dataset_dir, run_dir

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
_HEAD = "out_proj.weight"  # saved next to the embedding, whose weight it shares


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """The content of a file under our names. Tensors are float32 on the CPU."""

    model: ModelConfig
    weights: dict[str, torch.Tensor]
    step: int
    """Completed optimizer steps."""
    optimizer: dict[str, torch.Tensor]
    """In the form of adamw_opt.optimizer_tensors; empty if the file has none."""


class _HParams:
    """Stands in for the reference's class. A file's values become its attributes."""


def read_reference(path: Path) -> ReferenceCheckpoint:
    """Returns the checkpoint in the file `path`, every tensor checked. Nothing in the file is run.

    Raises UserError for any other file, with the first problem in one line.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
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
    except Exception as error:  # a file made to do harm may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split())[:300]
        raise UserError(f"Cannot import {path}: {reason}. Use a checkpoint of the reference implementation.") from None


def import_reference(path: Path, config: Config, to_train: bool = False) -> dict[str, Any]:
    """Makes the run `config.run_name` of the reference's checkpoint file `path`, whole or not at all.

    With `to_train`, pretrain.py can resume the run with `config`, which must agree with the file and whose dataset
    must exist. Otherwise settings in the file replace those of `config`. Returns a summary as plain data. Raises
    UserError, and StorageError if the run cannot be written.
    """
    run, dataset = run_dir(config.run_name), _dataset(config) if to_train else {}
    refuse_existing(run)
    checkpoint = read_reference(path)
    config = _settings(config, checkpoint, to_train)
    temporary = run.with_name(f".{run.name}.tmp-{os.getpid()}")
    with storage_errors(run):
        try:
            temporary.mkdir(parents=True)
            _write_run(temporary, path, checkpoint, config, dataset)
            temporary.rename(run)
            sync(run.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {
        "run": str(run),
        "checkpoint": str(step_dir(run / "checkpoints", checkpoint.step)),
        "step": checkpoint.step,
        "parameters": sum(tensor.numel() for tensor in checkpoint.weights.values()),
        "optimizer_state": bool(checkpoint.optimizer),
    }


def refuse_existing(run: Path) -> None:
    """Raises UserError if `run` exists, StorageError if its disk cannot be read."""
    with storage_errors(run, "make"):
        if os.path.lexists(run):
            raise UserError(f"Cannot import into {run}: it exists. Choose another --run-name, or move it away.")


def _checked(content: dict[str, Any]) -> ReferenceCheckpoint:
    """Returns the content of a file under our names. Raises any exception if it is not a reference checkpoint."""
    hparams = vars(content["hParams"])
    if hparams.keys() != _HPARAMS.keys():
        raise ValueError(f"hParams has the settings {', '.join(hparams)}, expected {', '.join(_HPARAMS)}")
    model = ModelConfig(**{ours: kind(hparams[name]) for name, (ours, kind) in _HPARAMS.items()})
    if problems := model.problems():
        raise ValueError("; ".join(problems))
    theirs = {_our_name(name): tensor for name, tensor in content["model_state_dict"].items()}
    if model.n_layer > len(theirs):  # before building a model of absurd size
        raise ValueError(f"hParams.n_layer is {model.n_layer}, more than model_state_dict has weights")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LLM(model).named_parameters()}
    head = theirs.pop(_HEAD, None)
    if difference := sorted(theirs.keys() ^ shapes.keys()):
        raise ValueError(f"weights are missing or unknown: {', '.join(difference[:5])}")
    weights = {name: _tensor(name, theirs[name], shape) for name, shape in shapes.items()}
    if head is not None and not torch.equal(head.float(), weights["embedding.weight"]):
        raise ValueError(f"{_HEAD} differs from the embedding, whose weight the head shares")
    step, state = index(content["step"]), content.get("optimizer_state_dict")
    optimizer = _optimizer(state, weights, list(theirs)) if state else {}
    if optimizer:
        step = int(optimizer["step.norm.weight"])  # decides AdamW's bias correction
    if step < 0:
        raise ValueError(f"step is {step}")
    return ReferenceCheckpoint(model, weights, step, optimizer)


def _optimizer(state: dict[str, Any], weights: dict[str, torch.Tensor], order: list[str]) -> dict[str, torch.Tensor]:
    """Returns AdamW's tensors. `order` is that of the parameters in the reference's model."""
    decayed, others = state["param_groups"]
    names = sorted(order, key=lambda name: weights[name].dim() < 2)  # stable: matrices, then vectors
    n_matrices = sum(weights[name].dim() >= 2 for name in names)
    groups = [list(range(n_matrices)), list(range(n_matrices, len(names)))]
    if [decayed["params"], others["params"]] != groups or others["weight_decay"] != 0:
        raise ValueError("the optimizer's groups are not matrices, and vectors without weight decay")
    tensors = {}
    for number, entry in state["state"].items():
        name = names[number]
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[f"{kind}.{name}"] = _tensor(f"{kind}.{name}", entry[kind], weights[name].shape)
        tensors[f"step.{name}"] = _tensor(f"step.{name}", torch.as_tensor(entry["step"]).float(), torch.Size(()))
    steps = {float(tensor) for name, tensor in tensors.items() if name.startswith("step.")}
    if tensors and (len(tensors) != 3 * len(names) or len(steps) != 1):
        raise ValueError("the optimizer's state lacks parameters, or their steps differ")
    return tensors


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


def _dataset(config: Config) -> dict[str, Any]:
    manifest = dataset_dir(config.data.dir) / "manifest.json"
    try:
        return {"name": config.data.dir, "manifest_sha256": fingerprint(manifest)["sha256"]}
    except OSError as error:
        raise UserError(f"Cannot read {manifest}: {error.strerror}. Prepare it, or import without a preset.") from None


def _settings(config: Config, checkpoint: ReferenceCheckpoint, to_train: bool) -> Config:
    """Returns `config`, to train with if it agrees with the file, else with what the file says."""
    model, step = checkpoint.model, checkpoint.step
    if to_train:
        if config.model != model or config.total_steps < step:
            raise UserError(f"Cannot train with these settings: the file has {model} and {step} steps. Use those.")
        return config
    train = replace(config.train, batch_tokens=config.micro_batch_size * model.n_ctx, total_steps=max(step, 1))
    optim = replace(config.optim, warmup_steps=0)  # fits any number of steps
    return replace(config, model=model, train=train, optim=optim, data=DataConfig(dir="unknown"))


def _write_run(
    folder: Path, path: Path, checkpoint: ReferenceCheckpoint, config: Config, dataset: dict[str, Any]
) -> None:
    step = checkpoint.step
    with torch.random.fork_rng(devices=[]):
        seed_random_state(config.train.seed, rank=0, step=step)
        random_states = {"cpu": torch.get_rng_state()}
    state = {
        "progress": asdict(Progress(step=step)),
        "config": to_dict(config),
        "dataset_sha256": dataset.get("manifest_sha256", ""),
        "precision": f"torch.{'float32' if config.train.precision == 'float32' else 'bfloat16'}",  # the reference's
        "world_size": 1,
        "torch": torch.__version__,
    }
    parts = {"model": checkpoint.weights, "optimizer": checkpoint.optimizer, "rank_00000": random_states}
    save_checkpoint(folder / "checkpoints", step, parts, state)
    log, imported = RunLogger(folder, is_main=True), {"file": path.name, **fingerprint(path)}
    log.write_json("config.json", {"config": to_dict(config), "dataset": dataset, "imported": imported})
    note = "" if checkpoint.optimizer or not step else "; without optimizer state, so AdamW's moments start from zero"
    log.event("import", step, f"from {path.name}{note}", **imported)
    done = step == config.total_steps
    log.write_status("done" if done else "stopped", step, config.total_steps, None, f"imported from {path.name}")


def _fetch(repository: str, file: str) -> Path:
    """Returns the hub's file in the user's Hugging Face cache. Raises UserError."""
    try:
        get_hf_file_metadata(hf_hub_url(repository, file))  # asks once; the download would retry for half a minute
        return Path(hf_hub_download(repository, file))
    except hub_errors() as error:
        remedy = "Check the names, and for a repository that is not public the token in HF_TOKEN"
        raise hub_failure(f"get {file} of {repository} from", error, remedy) from error


def main() -> int:
    """The command line."""
    args, settings = _parser().parse_known_args()
    if settings and settings[0].startswith("-"):
        raise UserError(f"{settings[0]} is unknown. Give a preset before settings to train with, see --help.")
    config = lf_llm_269m()
    if settings:
        sys.argv[1:] = settings
        config = config_from_command_line("Settings to train with.", prog="python -m src.model_utils.reference_import")
    config = replace(config, run_name=args.run_name)
    refuse_existing(run_dir(config.run_name))  # before a long download
    started = time.perf_counter()
    path = _fetch(*args.hub) if args.hub else args.checkpoint
    say(f"reading {path}")
    summary = import_reference(path, config, to_train=bool(settings))
    print(json.dumps({**summary, "seconds": round(time.perf_counter() - started, 3)}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_utils.reference_import",
        usage="%(prog)s [-h] (--checkpoint FILE | --hub OWNER/NAME FILE) --run-name NAME [PRESET [SETTINGS]]",
        allow_abbrev=False,
        description="Make a run of a checkpoint file of the reference implementation, for sampling, evaluation and "
        "export. To train it further, add a preset and settings of pretrain.py, then give pretrain.py the same. The "
        "file is read as data; nothing in it is run. Prints one JSON object as the last line.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="the file, .pth")
    source.add_argument("--hub", nargs=2, metavar=("OWNER/NAME", "FILE"), help="download it from this repository")
    parser.add_argument("--run-name", required=True, metavar="NAME", help="the run to make, under temp_data/runs")
    return parser


if __name__ == "__main__":
    exit_with(main)
