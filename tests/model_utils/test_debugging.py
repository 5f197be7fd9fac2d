from src.model import LLM
from src.model_configs.my_llm_config import lf_llm_269m
from src.model_utils.debugging import count_parameters, flops_per_token
from src.params import ModelConfig


def test_flops_of_the_published_run_give_its_mfu():
    """43.3k tokens/s on an A100 of 312 TFLOP/s were 32%, says the reference."""
    flops = flops_per_token(lf_llm_269m().model, 320_145_408)
    assert round(43.3e3 * flops / 312e12, 2) == 0.32


def test_parameters_by_hand(tiny_config: ModelConfig):
    D, V, L = tiny_config.n_embd, tiny_config.n_vocab, tiny_config.n_layer
    block = (3 * D * D + 3 * D) + (D * D + D) + (8 * D * D + 8 * D) + (4 * D * D + D) + 2 * D
    assert count_parameters(LLM(tiny_config)) == V * D + L * block + D
