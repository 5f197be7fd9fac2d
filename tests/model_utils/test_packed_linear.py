"""Packed layers give the plain ones' results."""

import copy

import pytest
import torch

from src.model import LLM
from src.model_utils.packed_linear import PackedLinear, pack_linears
from src.params import ModelConfig
from tests.model_utils.exports import small_model


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bf16 kernels for this processor",
)
@torch.inference_mode()
def test_a_packed_model_gives_the_same_logits_to_the_bit():
    plain = small_model().bfloat16()
    packed = copy.deepcopy(plain)
    pack_linears(packed)
    assert isinstance(packed.head, PackedLinear)
    for shape in ((1, 1), (1, 7), (5, 33)):
        ids_BT = torch.randint(plain.config.n_vocab, shape)
        assert torch.equal(packed(ids_BT), plain(ids_BT))


def test_weights_in_float32_stay_plain(tiny_config: ModelConfig):
    model = LLM(tiny_config)
    pack_linears(model)
    assert not any(isinstance(part, PackedLinear) for part in model.modules())
