"""Sampled text: what the cache may not change, what seeds decide, where it stops."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment.sampling import SamplingConfig, _window_start, generate, sample, stream
from src.model_utils.weight_init import init_weights
from src.params import ModelConfig
from src.utils.errors import UserError

NO_END = -1  # an id no model produces


@pytest.fixture
def model(tiny_config: ModelConfig) -> LLM:
    model = LLM(tiny_config)
    torch.manual_seed(5)
    for parameter in model.parameters():  # lively logits, so that choices are not near ties
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="module")
def word_model() -> LLM:
    config = ModelConfig(n_ctx=16, n_embd=16, n_head=2, n_layer=1, residual_dropout=0.0, ffn_dropout=0.0)
    model = LLM(config)
    init_weights(model, config, seed=0)
    return model


def tokens(model: LLM, prompt: list[list[int]], config: SamplingConfig, **options) -> list[list[int]]:
    samples = options.pop("samples", list(range(len(prompt))))
    steps = list(generate(model, torch.tensor(prompt), config, samples, options.pop("end", NO_END), **options))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    "config", [SamplingConfig(60, temperature=0), SamplingConfig(60, 0.9, top_k=20, top_p=0.9, seed=4)]
)
def test_the_cache_changes_nothing_also_past_the_context(model: LLM, config: SamplingConfig):
    prompt = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    assert model.config.n_ctx == 16
    assert tokens(model, prompt, config) == tokens(model, prompt, config, use_cache=False)


def test_a_prompt_longer_than_the_context(model: LLM):
    prompt = [list(range(50))]
    config = SamplingConfig(20, temperature=0)
    assert tokens(model, prompt, config) == tokens(model, prompt, config, use_cache=False)


def test_greedy_is_the_likeliest_token_of_the_plain_model(model: LLM):
    sequence = [3, 1, 4]
    with torch.no_grad():
        for _ in range(10):
            sequence.append(int(model.eval()(torch.tensor([sequence]))[0, -1].argmax()))
    assert tokens(model, [[3, 1, 4]], SamplingConfig(10, temperature=0)) == [sequence[3:]]


def test_the_window_holds_at_least_half_the_context_and_never_more():
    for length in range(1, 200):
        seen = length - _window_start(length, 16)
        assert seen == length if length <= 16 else 8 < seen <= 16


def test_frequencies_follow_the_softmax(model: LLM):
    """2,000 draws of one token against the model's own probabilities, within four standard deviations."""
    n, prompt = 2_000, [3, 1, 4]
    drawn = Counter(row[0] for row in tokens(model, [prompt] * n, SamplingConfig(1, temperature=1.5)))
    with torch.no_grad():
        probs = torch.softmax(model.eval()(torch.tensor([prompt]))[0, -1] / 1.5, dim=-1)
    for token, p in enumerate(probs.tolist()):
        assert abs(drawn[token] - n * p) < 4 * (n * p * (1 - p)) ** 0.5 + 1, token


def test_top_k_and_top_p_keep_the_likeliest(model: LLM):
    prompt = [[3, 1, 4]] * 500
    with torch.no_grad():
        probs, order = torch.softmax(model.eval()(torch.tensor([prompt[0]]))[0, -1], dim=-1).sort(descending=True)
    drawn = {row[0] for row in tokens(model, prompt, SamplingConfig(1, temperature=1.0, top_k=3))}
    assert drawn == set(order[:3].tolist())
    nucleus = int((probs.cumsum(0) < 0.6).sum()) + 1
    drawn = {row[0] for row in tokens(model, prompt, SamplingConfig(1, temperature=1.0, top_p=0.6))}
    assert drawn <= set(order[:nucleus].tolist())
    assert len(drawn) > nucleus / 2
    drawn = {row[0] for row in tokens(model, prompt, SamplingConfig(1, temperature=1.0, top_p=1e-9))}
    assert drawn == {int(order[0])}


def test_the_seed_and_the_sample_decide_not_the_batch(model: LLM):
    config = SamplingConfig(12, temperature=1.0, seed=3)
    both = tokens(model, [[1, 2], [1, 2]], config, samples=[0, 1])
    assert both[0] != both[1]
    assert tokens(model, [[1, 2]], config, samples=[1]) == [both[1]]
    assert tokens(model, [[7, 8], [1, 2]], config, samples=[0, 0])[1] == both[0]
    assert tokens(model, [[1, 2]], replace(config, seed=4), samples=[0]) != [both[0]]


def test_a_row_ends_at_end_of_text_while_others_go_on(model: LLM):
    config = SamplingConfig(30, temperature=1.0, seed=3)
    free = tokens(model, [[1, 2], [1, 2], [1, 2]], config)
    end = free[0][4]
    ended = tokens(model, [[1, 2], [1, 2], [1, 2]], config, end=end)
    for with_end, without in zip(ended, free, strict=True):
        stop = without.index(end) + 1 if end in without else len(without)
        assert with_end == without[:stop]
    assert len(ended[0]) <= 5


def test_prompts_of_any_length_and_none(word_model: LLM):
    tokenizer = load_tokenizer()
    prompts = ["A longer prompt than the others, far past sixteen tokens of context, I think", "", "Two words", "One"]
    config = SamplingConfig(8, temperature=1.0, seed=1)
    together = sample(word_model, tokenizer, prompts, config, num_samples=2)
    assert [s.prompt for s in together] == [prompt for prompt in prompts for _ in range(2)]
    for prompt in prompts:
        alone = sample(word_model, tokenizer, [prompt], config, num_samples=2)
        assert [s.text for s in alone] == [s.text for s in together if s.prompt == prompt]
    for each in together:
        assert each.text == tokenizer.decode(list(each.tokens))
        assert len(each.tokens) <= 8
        assert each.tokens_per_second > 0


def test_streaming_gives_the_same_text(word_model: LLM):
    tokenizer = load_tokenizer()
    config = SamplingConfig(40, temperature=1.0, seed=2)
    (whole,) = sample(word_model, tokenizer, ["Naïve"], config)
    assert "".join(stream(word_model, tokenizer, "Naïve", config)) == whole.text


def test_settings_that_cannot_work_are_all_named():
    with pytest.raises(UserError, match=r"max_new_tokens = 0 .* temperature = -1 .* top_p = 0"):
        SamplingConfig(max_new_tokens=0, temperature=-1, top_p=0)


def test_the_model_goes_back_to_training(model: LLM):
    model.train()
    tokens(model, [[1]], SamplingConfig(2))
    assert model.training
