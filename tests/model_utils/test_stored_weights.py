"""Weights in fewer bytes: how far the results may be from those of float32."""

import pytest
import torch
import torch.nn.functional as F

from src.model import LLM
from src.model_utils.stored_weights import FEW_ROWS, Int8Linear, PackedLinear, can_pack, store_weights
from src.params import ModelConfig


@pytest.fixture
def model(tiny_config: ModelConfig) -> LLM:
    model = LLM(tiny_config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_an_int8_layer_is_within_half_a_step_of_its_weights(rows: int):
    """A weight is off by at most half a step of its row, 1/254 of the row's largest, and bf16 rounds the result."""
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(rows, 64)
    layer = Int8Linear(weight.bfloat16(), bias.bfloat16())
    found = layer(x.bfloat16()[None])[0].float()
    exact = F.linear(x.bfloat16().float(), weight.bfloat16().float(), bias.bfloat16().float())
    step = weight.abs().amax(dim=1) / 254
    bound = x.abs().sum(dim=1, keepdim=True) * step + 2**-6 * (1 + exact.abs())
    assert ((found - exact).abs() < bound).all()
    assert torch.equal(layer(x[0].bfloat16()), layer(x[:1].bfloat16())[0])
    assert layer.weight_OI.dtype == torch.int8
    assert layer.weight_OI.abs().amax(dim=1).eq(127).all()


@pytest.mark.skipif(not can_pack(torch.ones(1).bfloat16()), reason="this CPU has no bf16 kernels in oneDNN")
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_is_the_plain_one_to_the_bit(rows: int, bias: bool):
    plain = torch.nn.Linear(72, 56, bias=bias).bfloat16()
    x = torch.randn(2, rows, 72).bfloat16()
    assert torch.equal(PackedLinear(plain.weight, plain.bias)(x), plain(x))


@pytest.mark.skipif(not can_pack(torch.ones(1).bfloat16()), reason="this CPU has no bf16 kernels in oneDNN")
def test_a_packed_model_is_the_plain_one_to_the_bit(model: LLM):
    ids = torch.randint(model.config.n_vocab, (4, 17))
    plain = LLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    plain.bfloat16()
    store_weights(model, "bf16", torch.float32)
    assert isinstance(model.head, PackedLinear)
    with torch.no_grad():
        assert torch.equal(model(ids[:, :-1]), plain(ids[:, :-1]))
        assert torch.equal(model(ids[:, :-1], ids[:, 1:]), plain(ids[:, :-1], ids[:, 1:]))


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 0.1), ("int8", 0.25)])
def test_logits_and_loss_stay_close(model: LLM, kind: str, tolerance: float):
    ids = torch.randint(model.config.n_vocab, (4, 17))
    with torch.no_grad():
        logits, loss = model(ids[:, :-1]), model(ids[:, :-1], ids[:, 1:])
        assert store_weights(model, kind, torch.float32) == torch.bfloat16
        stored = model(ids[:, :-1]).float()
        stored_loss = model(ids[:, :-1], ids[:, 1:])
    assert 0 < (stored - logits).abs().max() < tolerance * logits.abs().max()
    assert stored_loss == pytest.approx(F.cross_entropy(stored.flatten(0, 1), ids[:, 1:].flatten()).item(), abs=0.02)
    assert stored_loss == pytest.approx(loss.item(), rel=tolerance)


@pytest.mark.parametrize(("kind", "share"), [("bf16", 0.51), ("int8", 0.3)])
def test_they_take_fewer_bytes(kind: str, share: float):
    """Of a shape whose embedding, which may be kept in both forms, counts for little."""
    model = LLM(ModelConfig(n_vocab=97, n_ctx=16, n_embd=256, n_head=4, n_layer=4))
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    store_weights(model, kind, torch.float32)
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) <= share * before


def test_float32_and_auto_change_nothing_where_float32_is_computed(model: LLM):
    assert store_weights(model, "auto", torch.float32) == torch.float32
    assert store_weights(model, "float32", torch.bfloat16) == torch.bfloat16
    assert model.embedding.weight.dtype == torch.float32
    assert store_weights(model, "auto", torch.bfloat16) == torch.bfloat16
    assert model.embedding.weight.dtype == torch.bfloat16
