"""The reference implementation's checkpoint files: a pickled dict, read as data only, under our names.

A file holds `model_state_dict`, `hParams` (an instance of the reference's class src.params.HParams) and `step`; mostly
also `optimizer_state_dict`. PyTorch's weights-only unpickler makes tensors and plain containers of it; of that class it
knows nothing but the empty stand-in below, and whatever else a file names is refused. Not taken over are
`random_state`, of one process among several, and `scheduler_state_dict`: here the learning rate follows from the step.
"""

import re
import reprlib
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from src.model import LLM
from src.params import ModelConfig, OptimConfig
from src.utils.errors import UserError

_NEEDED = ("model_state_dict", "hParams", "step")
_KNOWN = (*_NEEDED, "optimizer_state_dict", "scheduler_state_dict", "random_state")
_HPARAMS = {  # our names of their fields, and their types
    "n_vocab": ("n_vocab", int),
    "n_ctx": ("n_ctx", int),
    "n_embd": ("n_embd", int),
    "n_head": ("n_head", int),
    "n_layer": ("n_layer", int),
    "attn_res_pdrop": ("residual_dropout", float),
    "ffn_act_pdrop": ("ffn_dropout", float),
}
_PARTS = {  # their names of parts of ours
    "attn_norm": "norm1",
    "ffn_norm": "norm2",
    "ffn.in_proj": "ffn.net.0",
    "ffn.out_proj": "ffn.net.3",
    "blocks": "transformer_blocks",
    "embedding": "embd",
}
_HEAD = "out_proj.weight"  # in their files beside the embedding, which it is
_COMPILED = "_orig_mod."  # what torch.compile puts before each name
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """What a file holds, under our names. Tensors are float32 on the CPU, mapped from the file where it has that."""

    model: ModelConfig
    weights: dict[str, torch.Tensor]
    step: int
    """Completed optimizer steps."""
    optimizer: dict[str, torch.Tensor]
    """As adamw_opt.optimizer_tensors has it; empty where the file has none, or from before the first step."""
    optim: dict[str, Any]
    """What its AdamW was set to, by OptimConfig's names; empty where the file does not say."""
    notes: list[str]
    """What is worth knowing about it, in words."""


class _HParams:
    """Stands in for the reference's class; a file's values become its attributes."""


class _Refusal(Exception):
    """What in a file is not as it should be."""


def read_reference(path: Path) -> ReferenceCheckpoint:
    """The checkpoint in the file `path`, every tensor of it checked.

    Raises UserError for a file that is none of the reference's, in one line that names the first thing in it that is
    not as it should be.
    """
    try:
        content = _unpickle(path)
        theirs = _unprefixed(content["model_state_dict"])
        model = _model_config(content["hParams"], theirs)
        weights = _weights(model, theirs)
        optimizer, optim = _optimizer(content.get("optimizer_state_dict"), weights, list(theirs))
        step = _step(content["step"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; name a checkpoint file, .pth or .pt") from None
    except _Refusal as refusal:
        raise UserError(
            f"cannot import {path}: {refusal}; the file is damaged or not a checkpoint of the reference, so get it anew"
        ) from None
    notes = [f"{_shown(key)} in it is unknown and was left out" for key in content if key not in _KNOWN]
    if optimizer:
        taken = int(optimizer["step.norm.weight"])
        if taken != step:
            notes.append(f"its step says {step}, but its optimizer has taken {taken} steps, which counts")
        step = taken
    elif step:
        notes.append("it has no optimizer state: if training goes on, AdamW's moments start from zero")
    return ReferenceCheckpoint(model, weights, step, optimizer, optim, notes)


def their_name(ours: str) -> str:
    """The reference's name of one of our parameters."""
    for our_part, their_part in _PARTS.items():
        ours = ours.replace(our_part, their_part)
    return ours


def _unpickle(path: Path) -> dict[Any, Any]:
    """The dict in the file, with the keys that are needed."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Tensors are mapped from the file as it is: PyTorch looks at neither of these.
            if packed := [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
                raise _Refusal(f"{_shown(packed[0])} in it is compressed, which torch.save does not do")
            if changed := archive.testzip():
                raise _Refusal(f"the content of {_shown(changed)} in it does not agree with its checksum")
        with safe_globals([(_HParams, "src.params.HParams")]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if named := sorted(get_unsafe_globals_in_checkpoint(path)):
                raise _Refusal(f"it names {_shown(named[0])}, which could run a program; nothing of it was run")
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (_Refusal, OSError):
        raise
    except zipfile.BadZipFile:
        raise _Refusal("it is not a whole file of torch.save, which is a zip archive") from None
    except Exception as error:  # what someone made to do harm may fail in any way
        words = (str(error).strip() or "no details").splitlines()[0][:200]
        raise _Refusal(f"it cannot be read as data ({type(error).__name__}: {words})") from None
    if not isinstance(content, dict):
        raise _Refusal(f"it holds {_shown(content)}, not a dict")
    for key in _NEEDED:
        if key not in content:
            raise _Refusal(f"the key {key} is missing; its keys are {', '.join(map(_shown, content)) or 'none'}")
    return content


def _unprefixed(state: Any) -> dict[str, Any]:
    """The model's state dict, under the names it has without torch.compile."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise _Refusal(f"model_state_dict = {_shown(state)} is not a dict of tensors by name")
    return {name.removeprefix(_COMPILED): value for name, value in state.items()}


def _model_config(hparams: Any, theirs: dict[str, Any]) -> ModelConfig:
    """The shape that `hParams` says, which has to be that of the tensors."""
    if not isinstance(hparams, _HParams):
        raise _Refusal(f"hParams = {_shown(hparams)} is not an instance of src.params.HParams")
    values = vars(hparams)
    if missing := [name for name in _HPARAMS if name not in values]:
        raise _Refusal(f"hParams.{missing[0]} is missing")
    for name, value in values.items():
        if name not in _HPARAMS:
            raise _Refusal(f"hParams has {_shown(name)} = {_shown(value)}, a setting that is unknown here")
        kind = _HPARAMS[name][1]
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise _Refusal(f"hParams.{name} = {_shown(value)} is not of the type {kind.__name__}")
    config = ModelConfig(**{ours: values[name] for name, (ours, _) in _HPARAMS.items()})
    if problems := config.problems():
        raise _Refusal(f"hParams cannot work: {'; '.join(problems)}")
    # Before a model of that size is made, if only in name.
    blocks = {match[1] for name in theirs if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
    if len(blocks) != config.n_layer:
        raise _Refusal(f"hParams.n_layer = {config.n_layer}, but model_state_dict has {len(blocks)} transformer_blocks")
    table, sizes = theirs.get("embd.weight"), [config.n_vocab, config.n_embd]
    if isinstance(table, torch.Tensor) and list(table.shape) != sizes:
        raise _Refusal(f"hParams.n_vocab, n_embd = {sizes}, but embd.weight has the shape {list(table.shape)}")
    return config


def _weights(config: ModelConfig, theirs: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LLM(config).named_parameters()}
    names = {their_name(name) for name in shapes}
    if missing := sorted(names - theirs.keys()):
        raise _Refusal(f"model_state_dict has no {missing[0]} ({len(missing)} of {len(names)} are missing)")
    if unknown := sorted(theirs.keys() - names - {_HEAD}):
        found = _shown(theirs[unknown[0]])
        raise _Refusal(f"{_shown(unknown[0])} = {found} in model_state_dict has no place in the model")
    weights = {name: _checked(their_name(name), theirs[their_name(name)], shape) for name, shape in shapes.items()}
    embedding = weights["embedding.weight"]
    if _HEAD in theirs and not torch.equal(_checked(_HEAD, theirs[_HEAD], embedding.shape), embedding):
        raise _Refusal(f"{_HEAD} is not embd.weight, whose weight the head shares")
    _refuse_shared(weights)
    return weights


def _optimizer(
    state: Any, weights: dict[str, torch.Tensor], order: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """AdamW's tensors and settings, nothing where there are none. `order`: that of their names in their model."""
    if state is None:
        return {}, {}
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        raise _Refusal(f"optimizer_state_dict = {_shown(state)} is not that of an optimizer")
    ours = {their_name(name): name for name in weights}
    in_order = [ours[name] for name in order if name in ours]
    matrices = [name for name in in_order if weights[name].dim() >= 2]
    names = matrices + [name for name in in_order if weights[name].dim() < 2]
    settings = _settings(state.get("param_groups"), len(matrices), len(names))
    if state["state"] and state["state"].keys() != set(range(len(names))):
        raise _Refusal(f"optimizer_state_dict has the state of {len(state['state'])} parameters, not of {len(names)}")
    tensors: dict[str, torch.Tensor] = {}
    for number, entry in sorted(state["state"].items()):
        name, where = names[number], f"optimizer_state_dict, state[{number}] ({their_name(names[number])})"
        if not isinstance(entry, dict) or set(entry) != {"step", *_MOMENTS}:
            raise _Refusal(f"{where} = {_shown(entry)} is not step, {', '.join(_MOMENTS)}")
        for kind in _MOMENTS:
            tensors[f"{kind}.{name}"] = _checked(f"{where}.{kind}", entry[kind], weights[name].shape)
        taken = entry["step"] if isinstance(entry["step"], torch.Tensor) else torch.tensor(float(_step(entry["step"])))
        tensors[f"step.{name}"] = _checked(f"{where}.step", taken, torch.Size(()))
        _step(int(taken))
        if tensors[f"step.{name}"] != tensors[f"step.{names[0]}"]:
            raise _Refusal(f"{where}.step = {_shown(taken)}, in state[0] {_shown(state['state'][0]['step'])}")
    _refuse_shared(tensors)
    return tensors, settings


def _settings(groups: Any, matrices: int, parameters: int) -> dict[str, Any]:
    """AdamW's, by OptimConfig's names. Its groups have to be as ours: first the matrices, then what does not decay."""
    try:
        sizes = [len(group["params"]) for group in groups]
        numbers = [number for group in groups for number in group["params"]]
        decays = [float(group["weight_decay"]) for group in groups]
        (beta1, beta2), eps = groups[0]["betas"], float(groups[0]["eps"])
        found: dict[str, Any] = {"beta1": float(beta1), "beta2": float(beta2), "eps": eps, "weight_decay": decays[0]}
    except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise _Refusal(f"param_groups in optimizer_state_dict is not AdamW's ({what})") from None
    if sizes != [matrices, parameters - matrices] or numbers != list(range(parameters)):
        raise _Refusal(
            f"param_groups in optimizer_state_dict have {sizes} parameters, expected {matrices} matrices and "
            f"{parameters - matrices} others"
        )
    if decays[1] != 0:
        raise _Refusal(f"weight_decay in optimizer_state_dict is {decays}, expected 0 in the second group")
    if problems := OptimConfig(**found).problems():
        raise _Refusal(f"optimizer_state_dict cannot work: {'; '.join(problems)}")
    return found


def _step(step: Any) -> int:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise _Refusal(f"step = {_shown(step)} is not a number of steps")
    return step


def _checked(name: str, value: Any, shape: torch.Size) -> torch.Tensor:
    """`value` as float32, if it is a tensor of this shape whose every number is there and finite."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise _Refusal(f"{name} = {_shown(value)} is not a tensor of real numbers")
    if value.shape != shape:
        raise _Refusal(f"{name} has the shape {list(value.shape)}, expected {list(shape)}")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise _Refusal(f"{name} is a tensor without numbers of its own ({value.layout}, {value.device})")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():  # one number shown many times
        raise _Refusal(f"{name} has the shape {list(shape)}, but fewer numbers than that")
    tensor = value.detach().float().contiguous()
    finite = tensor.isfinite()
    if not finite.all():
        first = (~finite).nonzero()[0].tolist()
        raise _Refusal(f"{name}{first} = {tensor[tuple(first)].item()} is not finite")
    return tensor


def _refuse_shared(tensors: dict[str, torch.Tensor]) -> None:
    """Refuses two in one memory: safetensors does not write such, and the reference has none but embedding and head."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = names.setdefault(tensor.untyped_storage().data_ptr(), name)
        if other != name:
            raise _Refusal(f"{their_name(name)} has the same memory as {their_name(other)}")


def _shown(value: Any) -> str:
    """A short text of anything that a file may hold, on one line."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return str(value.item())
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    return " ".join(reprlib.repr(value).split())
