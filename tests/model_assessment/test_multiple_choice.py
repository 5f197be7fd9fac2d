"""Scores of endings against a slow reading of their definition; batches, ranks and precision besides."""

import pytest
import torch

from src.model_assessment.hellaswag import questions
from src.model_assessment.hellaswag_items import Item
from src.model_assessment.hellaswag_protocols import reference_texts
from src.model_assessment.multiple_choice import EndingScore, Question, score_endings
from tests.model_assessment.choices import ITEMS, encode, make_model, slow_log_probs, slow_means

QUESTIONS = questions(ITEMS, reference_texts, encode)


def means(scores: dict[int, list[EndingScore]]) -> dict[int, list[float]]:
    return {i: [log_prob / tokens for log_prob, tokens in found] for i, found in scores.items()}


def assert_close(scores: dict[int, list[float]], expected: dict[int, list[float]], tolerance: float = 1e-5) -> None:
    assert scores.keys() == expected.keys()
    for i, values in expected.items():
        assert scores[i] == pytest.approx(values, abs=tolerance)


@pytest.mark.parametrize("token_budget", [1, 300, 100_000])
@pytest.mark.parametrize("n_ctx", [64, 12, 4])
def test_scores_are_those_of_one_ending_at_a_time(n_ctx: int, token_budget: int) -> None:
    """n_ctx = 12 cuts contexts; 4 is shorter than some endings, whose last 4 tokens remain."""
    model = make_model(n_ctx)
    scores = score_endings(model, QUESTIONS, token_budget=token_budget)
    assert_close(means(scores), slow_means(model, ITEMS))
    for i, item in enumerate(ITEMS):
        assert [tokens for _, tokens in scores[i]] == [min(len(encode(" " + e)), n_ctx) for e in item.endings]


def test_batches_keep_to_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    sizes: list[int] = []
    embed = model.embedding.forward

    def measured(inputs_BT: torch.Tensor) -> torch.Tensor:
        sizes.append(inputs_BT.numel())
        return embed(inputs_BT)

    monkeypatch.setattr(model.embedding, "forward", measured)
    score_endings(model, QUESTIONS[:4] * 10, token_budget=400)
    assert 1 < len(sizes) < 40
    assert max(sizes) <= 400


def test_autocast_is_the_callers_and_the_softmax_stays_in_float32() -> None:
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_endings(model, QUESTIONS)
    assert scores != score_endings(model, QUESTIONS)
    assert_close(means(scores), slow_means(model, ITEMS), tolerance=0.3)
    scores = score_endings(make_model().bfloat16(), QUESTIONS)  # no autocast to fall back on
    single = [log_prob for found in scores.values() for log_prob, tokens in found if tokens == 1]
    assert any(value != torch.tensor(value).bfloat16().item() for value in single)


def test_dropout_is_off_and_the_models_mode_comes_back() -> None:
    model = make_model()
    for training in (True, False):
        model.train(training)
        scores = score_endings(model, QUESTIONS)
        assert model.training is training
    assert scores == score_endings(model.train(), QUESTIONS)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_endings(model, QUESTIONS, on_progress=interrupt)
    assert model.training


@pytest.mark.parametrize("n_ctx", [64, 12])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_ranks_gives_the_same_result_to_the_bit(world_size: int, n_ctx: int) -> None:
    model = make_model(n_ctx)
    alone = score_endings(model, QUESTIONS * 3, token_budget=200)
    parts = [
        score_endings(model, QUESTIONS * 3, rank=rank, world_size=world_size, token_budget=200)
        for rank in range(world_size)
    ]
    assert sum(len(part) for part in parts) == len(alone)
    assert {i: values for part in parts for i, values in part.items()} == alone


def test_progress_reaches_the_number_of_questions() -> None:
    done: list[int] = []
    score_endings(make_model(), QUESTIONS, token_budget=1, on_progress=done.append)
    assert done == [1, 2, 3, 4, 5]


def test_an_ending_alone_scores_as_among_others() -> None:
    """What is beside it in its row changes nothing, nor where it stands there."""
    model = make_model()
    item = Item(0, ITEMS[3].ctx, ITEMS[3].endings[::-1], 0)
    (found,) = score_endings(model, questions([item], reference_texts, encode)).values()
    for ending, score in zip(item.endings, found, strict=True):
        (alone,) = score_endings(model, [Question(encode(item.ctx), [encode(" " + ending)])])[0]
        assert score.log_prob == pytest.approx(alone.log_prob, abs=1e-4)
        assert score.log_prob == pytest.approx(sum(slow_log_probs(model, item.ctx, " " + ending)), abs=1e-4)
