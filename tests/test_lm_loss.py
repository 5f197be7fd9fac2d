"""The fused loss against torch's own cross entropy."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from src import lm_loss
from src.lm_loss import compile_softmax, linear_cross_entropy, softmax_


@pytest.mark.parametrize("n", [1, 15, 16, 53])  # below, at and off the rows done at once
@pytest.mark.parametrize("positions", [8_192, 20])  # all at once, and in parts
@pytest.mark.parametrize("columns", [1, 64])  # unpadded, and padded as on a GPU
def test_value_and_gradients_equal_torchs(n: int, positions: int, columns: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lm_loss, "LOGIT_POSITIONS", positions)
    monkeypatch.setattr(lm_loss, "VOCAB_MULTIPLE", {"cpu": columns})
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, 12, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(101, 12, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(101, (n,), generator=generator)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    expected_gradients = torch.autograd.grad(expected * 3.0, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(loss * 3.0, (hidden, weight))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the softmax is float32
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_large_logits_stay_finite():
    hidden = torch.full((2, 4), 100.0, requires_grad=True)
    weight = torch.tensor([[100.0] * 4, [-100.0] * 4], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(80_000.0)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_no_gradients_are_computed_without_need(monkeypatch: pytest.MonkeyPatch):
    """Validation would otherwise do three matmuls of the head for one."""
    scattered = []
    original = torch.Tensor.scatter_add_

    def counting(*arguments):
        scattered.append(1)
        return original(*arguments)

    monkeypatch.setattr(torch.Tensor, "scatter_add_", counting)
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64))
    assert not scattered
    linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64)).backward()
    assert scattered


def test_compiled_by_itself_the_softmax_gives_the_same():
    """Traced, not compiled to machine code; into logits that are part of wider rows, as where these are padded."""
    wide = torch.randn(20, 40)
    targets = torch.randint(33, (20,))
    results = []
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    for function in (softmax_, compile_softmax(compiled)):
        logits = wide.clone()[:, :33]
        results.append((function(logits, targets, True), logits))
        assert not function(logits, targets, False).requires_grad
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
