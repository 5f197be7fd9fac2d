"""Muon's update is that of the formula, computed by a singular value decomposition in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from src.model import LLM
from src.model_utils.adamw_opt import build_optimizers, set_learning_rate
from src.model_utils.muon import Muon, orthogonalize
from src.params import ModelConfig, OptimConfig


def with_singular_values(values: np.ndarray, rows: int, columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    return left @ np.diag(values) @ right.T


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 40), (24, 24), (24, 96)])
def test_orthogonalizing_keeps_singular_vectors_and_brings_the_values_near_1(rows: int, columns: int) -> None:
    values = np.logspace(0, -2, rows)
    matrices = np.stack([with_singular_values(values, rows, columns, seed) for seed in range(3)])
    for matrix, result in zip(matrices, orthogonalize(torch.tensor(matrices)).numpy(), strict=True):
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        inside = left.T @ result @ right.T
        assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-6
        assert np.abs(np.diag(inside) - 1).max() < 0.2


def test_no_gradient_gives_no_update() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def nearly_orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Polar Express, acting on the singular values alone."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / (1.02 * np.linalg.norm(matrix))
    for a, b, c in (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ):
        values = a * values + b * values**3 + c * values**5
    return left @ np.diag(values) @ right


def test_steps_are_the_formulas() -> None:
    """Three matrices in one parameter, and a tall one, over two steps."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((12, 6)), rng.standard_normal((9, 5))]
    parameters = [nn.Parameter(torch.tensor(weight)) for weight in weights]
    optimizer = Muon({parameters[0]: 3, parameters[1]: 1}, momentum=0.8, weight_decay=0.5)
    means = [np.zeros_like(weight) for weight in weights]
    for rate in (0.1, 0.05):
        gradients = [rng.standard_normal(weight.shape) for weight in weights]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for i, gradient in enumerate(gradients):
            means[i] = 0.8 * means[i] + 0.2 * gradient
            update = 0.2 * gradient + 0.8 * means[i]
            for rows in np.split(np.arange(len(update)), 3 if i == 0 else 1):
                scale = 0.2 * np.sqrt(max(len(rows), update.shape[1]))
                weights[i][rows] *= 1 - rate * 0.5
                weights[i][rows] -= rate * scale * nearly_orthogonal(update[rows])
    for parameter, weight in zip(parameters, weights, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, atol=1e-9)


def test_an_update_has_the_size_of_adamws() -> None:
    """The scale is meant to make the root mean square of an update 0.2."""
    weight = nn.Parameter(torch.zeros(128, 512))
    optimizer = Muon({weight: 1}, momentum=0.0, weight_decay=0.0)
    weight.grad = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize(("shape", "blocks"), [((6,), 1), ((7, 4), 2), ((2, 3, 4), 1)])
def test_what_cannot_be_served_is_refused(shape: tuple[int, ...], blocks: int) -> None:
    with pytest.raises(ValueError, match=r"Muon cannot train a parameter of shape \(.* in . blocks"):
        Muon({nn.Parameter(torch.zeros(shape)): blocks}, momentum=0.9, weight_decay=0.1)


def test_muon_serves_the_matrices_of_blocks_and_adamw_the_rest(tiny_config: ModelConfig) -> None:
    model = LLM(tiny_config)
    config = OptimConfig(optimizer="muon", max_lr=0.2, embedding_lr=0.1, min_lr_ratio=0.0, weight_decay=0.3)
    adamw, muon = build_optimizers(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    served = [[names[p] for group in optimizer.param_groups for p in group["params"]] for optimizer in (adamw, muon)]
    assert sorted(served[0] + served[1]) == sorted(names.values())
    assert sorted(served[1]) == sorted(
        n for n in names.values() if n.startswith("blocks") and n.endswith("_proj.weight")
    )
    assert [group["weight_decay"] for group in adamw.param_groups + muon.param_groups] == [0.3, 0.0, 0.3]
    assert set_learning_rate([adamw, muon], 0, 10, 2, config) == 0.1  # half of the peak
    assert [group["lr"] for group in adamw.param_groups + muon.param_groups] == [0.05, 0.05, 0.1]
