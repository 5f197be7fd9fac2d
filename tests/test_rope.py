"""Rotary positions against complex arithmetic."""

import numpy as np
import torch

from src.rope import apply_rope, rope_tables

CPU = torch.device("cpu")


def test_rotation_is_multiplication_by_a_complex_unit():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 10, 8))
    pairs = x[..., :4] + 1j * x[..., 4:]
    angles = np.arange(10)[:, None] * 500.0 ** -(np.arange(4) / 4)
    turned = pairs * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    cos, sin = rope_tables(10, 8, 500.0, CPU)
    actual = apply_rope(torch.tensor(x, dtype=torch.float32), cos, sin)
    np.testing.assert_allclose(actual.numpy(), expected, atol=2e-6)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    cos, sin = rope_tables(64, 16, 10_000.0, CPU)

    def score(i: int, j: int) -> torch.Tensor:
        return (apply_rope(q, cos[i : i + 1], sin[i : i + 1]) * apply_rope(k, cos[j : j + 1], sin[j : j + 1])).sum()

    torch.testing.assert_close(score(9, 2), score(60, 53), rtol=1e-4, atol=1e-5)


def test_low_precision_input_keeps_its_dtype_and_full_precision_angles():
    x = torch.randn(1, 1, 64, 16)
    cos, sin = rope_tables(64, 16, 10_000.0, CPU)
    rotated = apply_rope(x.bfloat16(), cos, sin)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated.float(), apply_rope(x.bfloat16().float(), cos, sin), rtol=1e-2, atol=1e-2)


def test_tables_are_made_once_for_a_shape():
    assert rope_tables(32, 8, 100.0, CPU)[0] is rope_tables(32, 8, 100.0, CPU)[0]
    assert rope_tables(32, 8, 100.0, CPU)[0] is not rope_tables(64, 8, 100.0, CPU)[0]
    assert rope_tables(32, 8, 101.0, CPU)[0] is not rope_tables(32, 8, 100.0, CPU)[0]
