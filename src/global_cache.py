"""One copy, per process and device, of tensors that are computed rather than learned.

A key holds everything that determines the tensor, so two models of different shapes in one process
never share one by mistake, and all layers of a model share one by design.
"""

from collections.abc import Callable, Hashable

import torch

_tensors: dict[Hashable, torch.Tensor] = {}


def cached(key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor stored under `key`, made by `make` the first time."""
    tensor = _tensors.get(key)
    if tensor is None:
        # A tensor born in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            tensor = _tensors[key] = make()
    return tensor


def clear() -> None:
    """Forgets every stored tensor, for example when a device's memory is wanted back."""
    _tensors.clear()
