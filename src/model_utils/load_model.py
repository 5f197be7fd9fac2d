"""From a checkpoint or an exported folder on disk to a model that can be called."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from src.model import LLM
from src.model_utils.checkpoint_utils import find_checkpoint
from src.model_utils.export_folder import EXPORT, read_origin
from src.model_utils.llama_folder import WEIGHTS, is_model_folder, read_model_folder
from src.params import Config, TrainConfig, from_dict
from src.utils.errors import UserError, say
from src.utils.hardware import autocast, choose_device, choose_precision
from src.utils.root import run_dir

WEIGHT_DTYPES = ("auto", "float32", "bf16")


@dataclass(frozen=True)
class LoadedModel:
    model: LLM
    """In eval mode, on `device`, weights in float32."""
    config: Config
    """The run's; of another program's model its shape, and the defaults for the rest."""
    path: Path
    """The step_* directory or exported folder it was read from."""
    step: int
    """0 where that is not known."""
    dataset_sha256: str
    """Of the manifest of the data it was trained on; empty if the checkpoint does not say."""
    device: torch.device
    precision: torch.dtype
    """What its matmuls should run in on this machine: bfloat16 or float32."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context to call the model in."""
        return autocast(self.device, self.precision)


def load_model(checkpoint: str | Path, device: str = "auto") -> LoadedModel:
    """The model in a run directory (its newest good checkpoint), a step_* directory or an exported folder.

    A bare name means a run under temp_data/runs, or else a folder here; the text ./NAME is a folder. An exported folder
    is one of ours, or of another program's with a Llama of our architecture. Raises UserError for one that is missing,
    damaged or different.
    """
    if not str(checkpoint):
        raise UserError("--checkpoint is empty; name a run, a step_* folder or an export")
    path = run_dir(str(checkpoint))
    if not path.exists() and Path(checkpoint).exists():
        path = Path(checkpoint).absolute()
    exported = is_model_folder(path) or (path / EXPORT).exists()
    read = _read_exported if exported and not list(path.glob("*.gguf")) else _read_checkpoint
    found = read(path)
    chosen = choose_device(device)
    with torch.device("meta"):
        model = LLM(found.config.model)
    load_weights(model, found.tensors, found.path, assign=True)
    return LoadedModel(
        model=model.to(chosen).eval(),
        config=found.config,
        path=found.path,
        step=found.step,
        dataset_sha256=found.dataset_sha256,
        device=chosen,
        precision=choose_precision(found.config.train.precision, chosen),
    )


def load_weights(model: LLM, tensors: dict[str, torch.Tensor], origin: object, assign: bool = False) -> None:
    """Puts weights, named as `model.named_parameters()` names them, into `model`: copied, or with `assign` as they are.

    Raises UserError before any change where names or shapes differ; it names their `origin` and the differences.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if actual != expected:
        wrong = sorted(n for n in expected.keys() | actual.keys() if expected.get(n) != actual.get(n))
        lines = [f"{n}: expected {expected.get(n, 'nothing')}, found {actual.get(n, 'nothing')}" for n in wrong]
        raise UserError(f"{origin} holds another model's weights:\n  - " + "\n  - ".join(lines[:10]))
    # Not strict, because head.weight is missing: it is the embedding's, which assigning replaces.
    model.load_state_dict(tensors, strict=False, assign=assign)
    model.head.weight = model.embedding.weight


def convert_weights(model: LLM, kind: str, precision: torch.dtype) -> torch.dtype:
    """Converts `model` in place to the dtype `kind`, one of WEIGHT_DTYPES. Returns the dtype to call it in.

    "float32": stays as it is, called in `precision`. "bf16": all weights in bfloat16. "auto": bf16 where `precision`
    is bfloat16.
    """
    if kind == "float32" or (kind == "auto" and precision == torch.float32):
        return precision
    model.bfloat16()
    return torch.bfloat16


@dataclass(frozen=True)
class _Found:
    config: Config
    tensors: dict[str, torch.Tensor]
    path: Path
    step: int
    dataset_sha256: str


def _read_checkpoint(path: Path) -> _Found:
    if path.suffix == ".gguf" or (any(path.glob("*.gguf")) and not (path / "checkpoints").exists()):
        raise UserError(f"{path} is GGUF, which is for llama.cpp; name the run, or its export in the format hf")
    found, rejected = find_checkpoint(path)
    for reason in rejected:
        say(f"warning: passed over a damaged checkpoint: {reason}")
    if "config" not in found.state:
        raise UserError(f"{found.path / 'state.json'} holds no config; was it saved by another program?")
    config, sha256 = from_dict(found.state["config"]), found.state.get("dataset_sha256", "")
    return _Found(config, found.tensors("model"), found.path, found.step, sha256)


def _read_exported(path: Path) -> _Found:
    origin = read_origin(path, "config.json", WEIGHTS)
    shape, tensors = read_model_folder(path)
    if origin is None:
        _note_foreign(path)
        # A batch of one sequence, because the default one is no multiple of every context.
        config = Config(model=shape, train=TrainConfig(batch_tokens=shape.n_ctx, total_steps=1))
        return _Found(config, tensors, path, step=0, dataset_sha256="")
    return _Found(from_dict(origin.config), tensors, path, origin.step, origin.dataset_sha256)


@cache  # once, however often the model is read
def _note_foreign(path: Path) -> None:
    say(f"warning: {path} is another program's model; here it reads and writes the tokens of r50k_base, GPT-2's")
