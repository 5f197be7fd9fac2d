"""Tensors that are computed rather than learned, one copy per process and device.

A key holds everything that determines its tensor. So all layers of a model share one copy, and models of different
shapes in one process never do.
"""

from collections.abc import Callable, Hashable

import torch

_tensors: dict[Hashable, torch.Tensor] = {}


def cached(key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Returns the tensor stored under `key`; `make` computes it the first time."""
    tensor = _tensors.get(key)
    if tensor is None:
        # A tensor made in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            tensor = _tensors[key] = make()
    return tensor
