"""From a checkpoint on disk to a model that can be called."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from src.model import LLM
from src.model_utils.checkpoint_utils import find_checkpoint
from src.params import Config, from_dict
from src.utils.errors import UserError
from src.utils.hardware import autocast, choose_device, choose_precision
from src.utils.root import run_dir
from src.utils.terminal import say


@dataclass(frozen=True)
class LoadedModel:
    model: LLM
    """In eval mode, on `device`, weights in float32."""
    config: Config
    path: Path
    """The step_* directory it was read from."""
    step: int
    dataset_sha256: str
    """Of the manifest of the data it was trained on; empty if the checkpoint does not say."""
    device: torch.device
    precision: torch.dtype
    """What its matmuls should run in on this machine: bfloat16 or float32."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context to call the model in."""
        return autocast(self.device, self.precision)


def load_model(checkpoint: Path, device: str = "auto") -> LoadedModel:
    """The model in a run directory (its newest good checkpoint) or a step_* directory.

    A bare name means a run under temp_data/runs. Raises UserError for one that is missing or damaged.
    """
    found, rejected = find_checkpoint(run_dir(str(checkpoint)))
    for reason in rejected:
        say(f"warning: passed over a damaged checkpoint: {reason}")
    if "config" not in found.state:
        raise UserError(f"{found.path / 'state.json'} holds no config; was it saved by another program?")
    config = from_dict(found.state["config"])
    chosen = choose_device(device)
    with torch.device("meta"):
        model = LLM(config.model)
    load_weights(model, found.tensors("model"), found.path, assign=True)
    precision = choose_precision(config.train.precision, chosen)
    return LoadedModel(
        model=model.to(chosen).eval(),
        config=config,
        path=found.path,
        step=found.step,
        dataset_sha256=found.state.get("dataset_sha256", ""),
        device=chosen,
        precision=precision,
    )


def load_weights(model: LLM, tensors: dict[str, torch.Tensor], origin: object, assign: bool = False) -> None:
    """Puts weights into `model`; raises UserError naming their `origin` and what doesn't fit, changing nothing."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        lines = [f"{n}: expected {expected.get(n, 'nothing')}, found {found.get(n, 'nothing')}" for n in wrong]
        raise UserError(f"{origin} holds another model's weights:\n  - " + "\n  - ".join(lines[:10]))
    model.load_state_dict(tensors, assign=assign)
