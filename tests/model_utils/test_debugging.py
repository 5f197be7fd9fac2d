import torch

from src.model import LLM
from src.model_configs.my_llm_config import lf_llm_269m
from src.model_utils.debugging import count_parameters, flops_per_token, non_finite_gradients
from src.params import ModelConfig


def test_flops_of_the_published_run_give_its_mfu():
    """43.3k tokens/s on an A100 of 312 TFLOP/s were 32%, says the reference."""
    flops = flops_per_token(lf_llm_269m().model, 320_145_408)
    assert round(43.3e3 * flops / 312e12, 2) == 0.32


def test_parameters_by_hand(tiny_config: ModelConfig):
    D, V, L = tiny_config.n_embd, tiny_config.n_vocab, tiny_config.n_layer
    block = (3 * D * D + 3 * D) + (D * D + D) + (8 * D * D + 8 * D) + (4 * D * D + D) + 2 * D
    assert count_parameters(LLM(tiny_config)) == V * D + L * block + D


def test_gradients_that_are_not_finite_are_named(tiny_config: ModelConfig):
    model = LLM(tiny_config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert non_finite_gradients(model) == []
    model.get_parameter("blocks.1.attn.qkv_proj.bias").grad = torch.full((72,), float("-inf"))
    assert non_finite_gradients(model) == ["blocks.1.attn.qkv_proj.bias"]
