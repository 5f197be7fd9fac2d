"""Loads a model for inference from a checkpoint or a Hugging Face folder."""

import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.model import LLM
from src.model_utils.checkpoint_utils import find_checkpoint
from src.model_utils.llama_format import EXPORT, WEIGHTS, read_export, read_weights
from src.params import Config, from_dict
from src.utils.errors import UserError, say
from src.utils.hardware import autocast, choose_device, choose_precision
from src.utils.root import run_dir

Read = tuple[Config, dict[str, torch.Tensor], Path, int, str]
"""The config, weights by our names, path, step and the dataset's sha256, as in LoadedModel."""
WEIGHT_DTYPES = ("auto", "float32", "bf16")


@dataclass(repr=False, eq=False)
class LoadedModel:
    model: LLM
    """In eval mode, on `device`."""
    config: Config
    """The run's settings."""
    path: Path
    """The step_* directory or exported folder."""
    step: int
    """0 if unknown."""
    dataset_sha256: str
    """Hash of the training dataset's manifest; "" if unknown."""
    device: torch.device
    precision: torch.dtype
    """The dtype of matmuls: bfloat16 or float32."""

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.precision)


def load_model(checkpoint: str | Path, device: str = "auto", weights: str = "float32") -> LoadedModel:
    """Loads a run directory (its newest good checkpoint), a step_* directory or an exported folder.

    `weights` is one of WEIGHT_DTYPES, see `convert_weights`.

    A bare name means a run under temp_data/runs, or else a folder here; ./NAME always means a folder. Raises UserError
    if it is missing, damaged or of another architecture.
    """
    config, tensors, path, step, dataset_sha256 = _read(checkpoint)
    chosen = choose_device(device)
    with torch.device("meta"):  # no memory, and no initial values to compute
        model = LLM(config.model)
    load_weights(model, tensors, path, assign=True)
    model.to(chosen).eval()
    precision = convert_weights(model, weights, choose_precision(config.train.precision, chosen))
    return LoadedModel(model, config, path, step, dataset_sha256, chosen, precision)


def read_initial(config: Config) -> tuple[dict[str, torch.Tensor], Path, int]:
    """The weights that `config.init_from` names, with their path and step. Raises UserError."""
    origin, tensors, path, step, _ = _read(config.init_from)
    if path.resolve().is_relative_to(run_dir(config.run_name).resolve()):
        raise UserError(f"Cannot start from {path}: it is the run {config.run_name} itself. Choose another --run-name.")
    theirs, ours = asdict(origin.model), asdict(config.model)
    # Neither changes the meaning of a weight.
    free = ("n_ctx", "residual_dropout", "ffn_dropout", "zero_init")
    if different := [name for name in ours if name not in free and theirs[name] != ours[name]]:
        lines = [f"\n  - model.{name}: {theirs[name]} there, {ours[name]} here" for name in different]
        options = " ".join(_option(name.replace("_", "-"), theirs[name]) for name in different)
        raise UserError(f"Cannot start from {path}: it is another model:{''.join(lines)}\nTake its settings: {options}")
    return tensors, path, step


def _option(name: str, value: Any) -> str:
    return f"--model.{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--model.{name} {value}"


def load_weights(model: LLM, tensors: dict[str, torch.Tensor], origin: object, assign: bool = False) -> None:
    """Loads weights, named like `model.named_parameters()`. Copies them, or with `assign` makes them the parameters.

    Raises UserError, before any change, if names or shapes differ.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if actual != expected:
        wrong = sorted(n for n in expected.keys() | actual.keys() if expected.get(n) != actual.get(n))
        lines = [f"{n}: expected {expected.get(n, 'nothing')}, found {actual.get(n, 'nothing')}" for n in wrong]
        raise UserError(f"Cannot load {origin}: it holds another model's weights:\n  - " + "\n  - ".join(lines[:10]))
    # Not strict, because head.weight is missing: it is the embedding's, which assigning replaces.
    model.load_state_dict(tensors, strict=False, assign=assign)
    model.head.weight = model.embedding.weight


def convert_weights(model: LLM, kind: str, precision: torch.dtype) -> torch.dtype:
    """Converts `model` in place to `kind`, one of WEIGHT_DTYPES, and returns the dtype to call it in.

    "auto" means bf16 if `precision` is bfloat16. "float32" keeps the weights and returns `precision`.
    """
    if kind == "float32" or (kind == "auto" and precision == torch.float32):
        return precision
    model.bfloat16()
    return torch.bfloat16


class PackedLinear(nn.Module):
    """A linear layer with its weight in oneDNN's layout, for sampling in bf16 on CPUs. O outputs, I inputs.

    Bit-identical to F.linear, for inference only. F.linear reorders a bf16 weight at each call, 40% of a token's time.
    """

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight_OI", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()))
        self.register_buffer("bias_O", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight_OI, self.bias_O, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replaces every nn.Linear in `model` by a PackedLinear if oneDNN can: bfloat16 on a CPU with bf16 kernels.

    A weight shared with an embedding is then stored twice. The model can no longer be trained, saved or moved.
    """
    weight = next(model.parameters())
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    if not (on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for part in list(model.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(part, name, PackedLinear(layer))


def _read(checkpoint: str | Path) -> Read:
    path = run_dir(str(checkpoint))
    if not os.path.exists(path) and os.path.exists(str(checkpoint)):  # Path.exists raises for a long name
        path = Path(checkpoint).absolute()
    if os.path.lexists(path / EXPORT):
        return _read_export(path)
    if os.path.lexists(path / "config.json") and os.path.lexists(path / WEIGHTS):
        raise UserError(
            f"Cannot load {path / 'config.json'}: it is another program's model, without {EXPORT}. Name a run or an "
            "export of this program."
        )
    found, rejected = find_checkpoint(path)
    for reason in rejected:
        say(f"warning: skipped a damaged checkpoint: {reason}")
    config, sha256 = from_dict(found.state["config"]), found.state.get("dataset_sha256", "")
    return config, found.tensors("model"), found.path, found.step, sha256


def _read_export(path: Path) -> Read:
    if any(path.glob("*.gguf")):
        raise UserError(f"Cannot load {path}: it is GGUF, for llama.cpp. Name the run, or its export in the format hf.")
    origin = read_export(path, "config.json", WEIGHTS)
    config, tensors = read_weights(path, origin)
    return config, tensors, path, origin["step"], origin["dataset_sha256"]
