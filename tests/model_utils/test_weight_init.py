import math

import pytest
import torch

from src.model import LLM
from src.model_utils.weight_init import init_weights
from src.params import ModelConfig

CONFIG = ModelConfig(n_vocab=4_000, n_ctx=8, n_embd=256, n_head=4, n_layer=3)


@pytest.fixture(scope="module")
def parameters() -> dict[str, torch.Tensor]:
    model = LLM(CONFIG)
    init_weights(model, CONFIG, seed=3)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("names", "std"),
    [
        (
            ["embedding.weight", "blocks.1.attn.qkv_proj.weight", "blocks.2.ffn.in_proj.weight"],
            math.sqrt(2 / (5 * 256)),
        ),
        (["blocks.0.attn.out_proj.weight", "blocks.2.ffn.out_proj.weight"], 1 / (math.sqrt(256) * 3)),
    ],
)
def test_matrices_have_the_stated_deviation(parameters: dict[str, torch.Tensor], names: list[str], std: float):
    for name in names:
        assert parameters[name].std().item() == pytest.approx(std, rel=0.01), name
        assert abs(parameters[name].mean().item()) < 5 * std / math.sqrt(parameters[name].numel()), name


def test_biases_are_zero_and_gains_one(parameters: dict[str, torch.Tensor]):
    vectors = {name: p for name, p in parameters.items() if p.dim() == 1}
    assert len(vectors) == 3 * 6 + 1
    for name, vector in vectors.items():
        assert (vector == (1.0 if "norm" in name else 0.0)).all(), name


def test_the_seed_decides():
    def first(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # the global generator must not matter
        model = LLM(CONFIG)
        init_weights(model, CONFIG, seed)
        return model.get_parameter("blocks.2.ffn.out_proj.weight").detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_a_wide_model_whose_blocks_start_at_zero_begins_below_13_nats():
    """By the embedding's deviation of a narrow model it would be 20: sqrt(2 / (5 D)) x D."""
    config = ModelConfig(n_vocab=4_000, n_ctx=8, n_embd=1_024, n_head=4, n_layer=1, zero_init=True)
    model = LLM(config)
    init_weights(model, config, seed=3)
    ids_BT = torch.randint(4_000, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(ids_BT[:, :-1], ids_BT[:, 1:]).item() < 13
