"""Sampled text: what the cache may not change, what seeds decide, where it stops."""

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY, Mock

import pytest
import torch

from src import load
from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment.sampling import (
    CANDIDATES,
    SamplingConfig,
    _choose,
    _generator,
    _window_start,
    converse,
    generate,
    main,
    sample,
    stream,
)
from src.model_utils.weight_init import init_weights
from src.params import ModelConfig
from src.utils.errors import UserError, harmless
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.model_utils.exports import make_run, small_model


@pytest.fixture
def model(tiny_config: ModelConfig) -> LLM:
    model = LLM(tiny_config).eval()
    torch.manual_seed(5)
    for parameter in model.parameters():  # lively logits, so that choices are not near ties
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="module")
def word_model() -> LLM:
    config = ModelConfig(n_ctx=16, n_embd=16, n_head=2, n_layer=1, residual_dropout=0.0, ffn_dropout=0.0)
    model = LLM(config).eval()
    init_weights(model, config, seed=0)
    return model


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "words", small_model())


def test_from_python(words: Path):
    model, config = load(words, "cpu", "float32"), SamplingConfig(5, 0.8, seed=3)
    tokenizer, inner = load_tokenizer(), small_model().eval()
    assert model.generate("Once", n=2, max_new_tokens=5, temperature=0.8, seed=3) == [
        replace(each, tokens_per_second=ANY) for each in sample(inner, tokenizer, ["Once"], config, 2)
    ]
    assert (
        "".join(model.stream("Once", max_new_tokens=5, temperature=0.8, seed=3))
        == model.generate("Once", max_new_tokens=5, temperature=0.8, seed=3)[0].text
    )
    assert repr(model).startswith(f"<{words}/checkpoints/step_0000040: step 40, ")
    (one,) = model.generate("Once", max_new_tokens=2)
    assert str(one) == "Once" + one.text
    assert len(repr(one)) < 100
    with pytest.raises(UserError, match=r"Cannot sample with tempreature\. The settings are max_new_tokens"):
        model.generate("Once", tempreature=1)


@pytest.mark.parametrize("repeats", [1, 40])
def test_the_loss_of_a_text_and_its_logits(words: Path, repeats: int):
    """Also of a text longer than the context: then in pieces."""
    model, inner = load(words, "cpu", "float32"), small_model().eval()
    text = "Once upon a time there was a text. " * repeats
    ids, n_ctx = [50_256, *load_tokenizer().encode(text)], inner.config.n_ctx
    logits = torch.cat(
        [inner(torch.tensor([ids[begin : begin + n_ctx]]))[0] for begin in range(0, len(ids) - 1, n_ctx)]
    )
    log_probs = logits.detach().double().log_softmax(-1)[: len(ids) - 1]
    expected = -log_probs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean().item()
    assert model.loss(text) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(model.logits(text), inner(torch.tensor([ids[1:][-n_ctx:]]))[0].detach())


def test_importing_the_entry_takes_no_torch(commands: Commands):
    """In a notebook's folder too, where a link leads to the package."""
    program = "import sys; from src import load; print('torch' in sys.modules, load.__module__)"
    assert commands.run([sys.executable, "-c", program], cwd=ROOT / "notebooks").stdout == "False src\n"


def tokens(model: LLM, prompts: list[list[int]], config: SamplingConfig, **options) -> list[list[int]]:
    samples = options.pop("samples", list(range(len(prompts))))
    steps = [tokens for tokens, _ in generate(model, prompts, config, samples, **options)]
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    "config", [SamplingConfig(40, temperature=0), SamplingConfig(40, 0.9, top_k=20, top_p=0.9, seed=4)]
)
@pytest.mark.parametrize("prompts", [[[3, 1, 4], [9, 2, 6]], [list(range(50))]], ids=["two", "long"])
def test_the_cache_changes_nothing_also_past_the_context(
    model: LLM, config: SamplingConfig, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """The same as one token at a time, each from a whole window without a cache."""
    assert model.config.n_ctx == 16
    cached = tokens(model, prompts, config)
    reread = [[*prompt] for prompt in prompts]
    draws = [_generator(config.seed, i) for i in range(len(prompts))]
    for _ in range(config.max_new_tokens):
        start = _window_start(len(reread[0]), 16)
        with torch.no_grad():
            logits_BV = model(torch.tensor([row[start:] for row in reread]))[:, -1]
        for row, logits_V, generator in zip(reread, logits_BV, draws, strict=True):
            draw = torch.rand(1, dtype=torch.float64, generator=generator)
            row.append(_choose(logits_V, row, draw, config))
    assert cached == [row[len(prompt) :] for row, prompt in zip(reread, prompts, strict=True)]


def test_greedy_is_the_likeliest_token_of_the_plain_model(model: LLM):
    sequence = [3, 1, 4]
    with torch.no_grad():
        for _ in range(10):
            sequence.append(int(model(torch.tensor([sequence]))[0, -1].argmax()))
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
        probs = torch.softmax(model(torch.tensor([prompt]))[0, -1] / 1.5, dim=-1)
    for token, p in enumerate(probs.tolist()):
        assert abs(drawn[token] - n * p) < 4 * (n * p * (1 - p)) ** 0.5 + 1, token


def test_top_k_and_top_p_keep_the_likeliest(model: LLM):
    prompt = [[3, 1, 4]] * 500
    with torch.no_grad():
        probs, order = torch.softmax(model(torch.tensor([prompt[0]]))[0, -1], dim=-1).sort(descending=True)
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


def test_log_probabilities_are_the_plain_models(model: LLM):
    config = SamplingConfig(8, temperature=0.7, top_k=5, repetition_penalty=1.3, seed=2)
    sequence = [3, 1, 4]
    for (token,), (log_prob,) in generate(model, [sequence], config, [0]):
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([sequence]))[0, -1], dim=-1)
        assert log_prob == pytest.approx(log_probs[token].item(), abs=1e-4)
        sequence.append(token)


def test_min_p_keeps_what_is_likely_enough(model: LLM):
    prompt = [[3, 1, 4]] * 500
    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([prompt[0]]))[0, -1], dim=-1)
    allowed = (probs >= 0.2 * probs.max()).nonzero().flatten().tolist()
    assert 1 < len(allowed) < 50
    assert {row[0] for row in tokens(model, prompt, SamplingConfig(1, min_p=0.2))} == set(allowed)


def test_repetition_penalty_is_transformers(model: LLM):
    processor = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(penalty=1.7)
    sequence = [3, 1, 4, 1]
    found = tokens(model, [sequence], SamplingConfig(12, temperature=0, repetition_penalty=1.7))[0]
    assert found != tokens(model, [sequence], SamplingConfig(12, temperature=0))[0]
    for token in found:
        with torch.no_grad():
            logits = model(torch.tensor([sequence]))[:, -1]
        assert token == int(processor(torch.tensor([sequence]), logits).argmax())
        sequence.append(token)


def test_top_p_past_the_likeliest_of_a_large_vocabulary(word_model: LLM):
    """A new model finds all words about equally likely: half the probability takes far more than CANDIDATES of them."""
    config = SamplingConfig(1, top_p=0.5, seed=1)
    drawn = {row[0] for row in tokens(word_model, [[5]] * 60, config)}
    with torch.no_grad():
        probs, order = torch.softmax(word_model(torch.tensor([[5]]))[0, -1], dim=-1).sort(descending=True)
    places = {token: place for place, token in enumerate(order.tolist())}
    nucleus = int((probs.cumsum(0) < 0.5).sum()) + 1
    assert CANDIDATES < max(places[token] for token in drawn) <= nucleus


def test_a_row_ends_at_end_of_text_while_others_continue(word_model: LLM, monkeypatch: pytest.MonkeyPatch):
    """The token that the model likes best in the third place is taken for the end of text."""
    tokenizer = load_tokenizer()
    config = SamplingConfig(8, temperature=0)
    free = sample(word_model, tokenizer, ["One", "Two words"], config)
    end = free[0].tokens[2]
    monkeypatch.setattr(type(tokenizer), "end_of_text", end)
    ended = sample(word_model, tokenizer, ["One", "Two words"], config)
    for with_end, without in zip(ended, free, strict=True):
        place = without.tokens.index(end) if end in without.tokens else len(without.tokens)
        assert with_end.tokens == without.tokens[:place]
        assert len(with_end.log_probs) == place
        assert with_end.finish_reason == ("end_of_text" if end in without.tokens else "length")
    assert ended[0].finish_reason == "end_of_text"


@pytest.mark.parametrize("place", [3, 17])
def test_a_stop_text_ends_a_continuation_before_it(word_model: LLM, place: int):
    """Also one that begins in one token and ends in another, and nothing of it is shown before."""
    tokenizer = load_tokenizer()
    config = SamplingConfig(12, temperature=1.0, seed=5)
    (free,) = sample(word_model, tokenizer, ["One"], config)
    stop = free.text[place : place + 9]
    stopping = replace(config, stop=("never there", stop))
    (stopped,) = sample(word_model, tokenizer, ["One"], stopping)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert len(stopped.tokens) < len(free.tokens)
    assert "".join(stream(word_model, tokenizer, "One", stopping)) == stopped.text


def test_text_that_only_begins_like_a_stop_text_comes_in_the_end(word_model: LLM):
    tokenizer = load_tokenizer()
    config = SamplingConfig(6, temperature=1.0, seed=5)
    (free,) = sample(word_model, tokenizer, ["One"], config)
    waiting = replace(config, stop=(free.text[-4:] + "and more",))
    assert sample(word_model, tokenizer, ["One"], waiting)[0].text == free.text
    assert "".join(stream(word_model, tokenizer, "One", waiting)) == free.text


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


@pytest.mark.parametrize(("n_vocab", "prompt"), [(300, "wonderful"), (50_304, "ab")])
def test_a_vocabulary_other_than_the_tokenizers(n_vocab: int, prompt: str):
    """Of a larger one only the tokenizer's tokens are chosen; a prompt that a smaller one lacks is refused."""
    tokenizer = load_tokenizer()
    config = ModelConfig(n_vocab=n_vocab, n_ctx=16, n_embd=16, n_head=2, n_layer=1)
    model = LLM(config).eval()
    init_weights(model, config, seed=0)
    if n_vocab < tokenizer.n_vocab:
        with pytest.raises(UserError, match=r"Cannot read 'wonderful': it needs token \d+ of r50k_base, .* below 300"):
            sample(model, tokenizer, [prompt], SamplingConfig(4))
        assert sample(model, tokenizer, ["!"], SamplingConfig(4))[0].tokens
        return
    with torch.no_grad():
        model.embedding.weight[tokenizer.n_vocab :].normal_(std=100)  # some of them are always likeliest
    (made,) = sample(model, tokenizer, [prompt], SamplingConfig(8, temperature=0))
    assert max(made.tokens, default=0) < tokenizer.n_vocab


def test_settings_that_cannot_work_are_all_named(words: Path):
    with pytest.raises(UserError, match=r"max_new_tokens = 0 .* temperature = -1 .* top_p = 0 .* min_p = 2 .* stop"):
        SamplingConfig(max_new_tokens=0, temperature=-1, top_p=0, min_p=2, stop=("",))
    for values in ({"n": 2.0}, {"stop": None}, {"stop": 5}):  # from a notebook
        with pytest.raises(UserError, match=repr(next(iter(values.values())))):
            load(words).generate("word", **values)


def conversation(
    lines: str, monkeypatch: pytest.MonkeyPatch, config: SamplingConfig | None = None
) -> list[tuple[str, int]]:
    """Prompt and seed of each continuation after these lines; each continuation is " and on"."""
    requested = []

    def pieces(prompt: str, config: SamplingConfig) -> Iterator[str]:
        requested.append((prompt, config.seed))
        yield " and"
        if "break" in prompt:
            raise KeyboardInterrupt
        yield " on"

    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    converse(pieces, config or SamplingConfig())
    return requested


def test_a_conversation_continues_a_line_and_an_empty_one_the_last_text(monkeypatch: pytest.MonkeyPatch):
    last = 2**63 - 1
    requested = conversation("It was\n\nNew\n", monkeypatch, SamplingConfig(seed=last))
    assert requested == [("It was", last), ("It was and on", 0), ("New", 1)]


def test_ctrl_c_ends_a_continuation_and_at_the_prompt_the_conversation(monkeypatch: pytest.MonkeyPatch):
    assert [prompt for prompt, *_ in conversation("break\nthen\n", monkeypatch)] == ["break", "then"]

    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converse(lambda prompt, config: iter(()), SamplingConfig())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Texts and JSON, a stream of the same text, and a conversation on a terminal."""
    run = make_run(tmp_path / "run", small_model())

    def command(*arguments: str) -> str:
        fixed = ("--checkpoint", str(run), "--device", "cpu", "--weights", "float32", "--max-new-tokens", "8")
        monkeypatch.setattr("sys.argv", ["sampling", *fixed, *arguments])
        assert main() == 0
        return capsys.readouterr().out

    several = ("--prompt", "One", "--prompt", "Two", "--num-samples", "2", "--stop", "x", "--stop", "y")
    samples = json.loads(command(*several).splitlines()[-1])["samples"]
    assert [each["prompt"] for each in samples] == ["One", "One", "Two", "Two"]
    assert not any(stop in each["text"] for each in samples for stop in "xy")
    text = json.loads(command("--prompt", "One").splitlines()[-1])["samples"][0]["text"]
    assert command("--prompt", "One", "--stream") == harmless(f"One{text}\n", keep="\n\t")
    typed = Mock(side_effect=["One", EOFError])
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", Mock(isatty=lambda: True))
    assert command("--interactive") == harmless(f"One{text}\n", keep="\n\t")
    rounded = command("--prompt", "One", "--weights", "bf16")
    assert json.loads(rounded.splitlines()[-1])["samples"][0]["tokens"]
    for arguments in (("--stream", "--num-samples", "2"), ("--num-samples", "0")):
        with pytest.raises(UserError, match="Cannot"):
            command(*arguments)
