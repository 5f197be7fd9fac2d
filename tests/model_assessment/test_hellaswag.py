"""HellaSwag: both protocols against a slow reading of their definitions; batches, processes and the command."""

import json
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment import hellaswag
from src.model_assessment.hellaswag import (
    HELD_OUT_PROTOCOL,
    HELLASWAG_PROTOCOL,
    LM_EVAL_PROTOCOL,
    evaluate,
    evaluate_lm_eval,
    lm_eval_endings,
    lm_eval_texts,
    measure,
    questions,
    reference_texts,
    score_endings,
)
from src.model_assessment.hellaswag_items import Item, load_items
from src.params import ModelConfig
from src.utils.errors import UserError
from src.utils.handle_ddp import Processes
from tests.model_assessment.test_hellaswag_items import RECORD
from tests.model_utils.exports import make_run

COMMAND = "src.model_assessment.hellaswag"
encode = load_tokenizer().encode

ITEMS = [
    Item(0, "The cat sat on the mat and", ("looked around.", "flew to the moon in a red rocket.", "ate", "sang"), 0),
    Item(1, "Rain", ("falls.", "is made of iron and wool, as everybody knows.", "sleeps a while.", "runs"), 2),
    Item(2, "She opened the old book slowly; then she", ("read it aloud.", "read it.", "drank the sea.", "barked"), 1),
    Item(3, "Naïve café owners, 10,042 of them,", ("served ☕ all day.", "slept.", "counted to ten.", "left"), 3),
    Item(4, "word " * 40 + "end", ("of the line.", "and so on and on.", "word word", "of it all"), 2),
]
WHOLE_ITEMS = [
    replace(item, activity_label="Any [x] thing", ctx_a=item.ctx, ctx_b=last)
    for item, last in zip(ITEMS, ("", "he", "the LADY", "[step]", "so"), strict=True)
]
QUESTIONS = questions(ITEMS, reference_texts, encode)
WIKIHOW = Item(
    ind=1,
    ctx="[header] How to wait [title] Sit down. [step] Any chair will do.",
    endings=("[substeps] One with [blue] arms.", " Stand  up. [title] Walk", "no", "A  b   c"),
    label=0,
    activity_label="Home and Garden",
    ctx_a="[header] How to wait [title] Sit down. [step] Any chair will do.",
    ctx_b="",
)


def make_model(n_ctx: int = 64, seed: int = 0) -> LLM:
    """Weights far from their initial scale, so that scores differ between endings and depend on the context."""
    torch.manual_seed(seed)
    model = LLM(ModelConfig(n_ctx=n_ctx, n_embd=16, n_head=2, n_layer=2, residual_dropout=0.5, ffn_dropout=0.5))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


@torch.no_grad()
def slow_log_probs(model: LLM, context: str, ending: str) -> list[float]:
    """The log-probability of each of the ending's tokens: one ending at a time, the whole float64 log-softmax."""
    before, scored = encode(context), encode(ending)
    tokens = (before + scored)[-(model.config.n_ctx + 1) :]
    log_probs = torch.log_softmax(model(torch.tensor([tokens[:-1]]))[0].double(), dim=-1)
    return [log_probs[t - 1, tokens[t]].item() for t in range(max(1, len(tokens) - len(scored)), len(tokens))]


def slow_sums(model: LLM) -> list[list[float]]:
    return [[sum(slow_log_probs(model, item.ctx, " " + ending)) for ending in item.endings] for item in ITEMS]


def right_by_mean(model: LLM, items: list[Item]) -> int:
    means = [[np.mean(slow_log_probs(model, item.ctx, " " + e)) for e in item.endings] for item in items]
    return sum(int(np.argmax(values)) == item.label for values, item in zip(means, items, strict=True))


def slow_lm_eval(model: LLM, items: list[Item]) -> tuple[float, float]:
    """acc and acc_norm."""
    right = np.zeros(2)
    for item in items:
        context, endings = lm_eval_texts(item)
        sums = np.array([sum(slow_log_probs(model, context, ending)) for ending in endings])
        lengths = [len(ending) for ending in lm_eval_endings(item)]
        right += [np.argmax(sums) == item.label, np.argmax(sums / lengths) == item.label]
    acc, acc_norm = (right / len(items)).tolist()
    return acc, acc_norm


def test_accuracies_by_both_protocols() -> None:
    """The context of the last item is cut."""
    correct, pairs = [], []
    for seed in range(4):
        model = make_model(24, seed)
        result = evaluate(model, ITEMS, encode, "test")
        correct.append(right_by_mean(model, ITEMS))
        share = correct[-1] / 5
        assert result.pop("seconds") > 0
        assert result.pop("stderr") == pytest.approx(math.sqrt(share * (1 - share) / 5))
        assert result == {"acc_norm": share, "correct": correct[-1], "total": 5, "protocol": "test"}

        items = [replace(item, label=(item.label + seed) % 4) for item in WHOLE_ITEMS]
        result = evaluate_lm_eval(model, items, encode)
        pairs.append(slow_lm_eval(model, items))
        assert (result["acc"], result["acc_norm"]) == pairs[-1]
        assert (result["total"], result["protocol"]) == (5, LM_EVAL_PROTOCOL)
        for name in ("acc", "acc_norm"):
            hits = [1.0] * round(5 * result[name]) + [0.0] * (5 - round(5 * result[name]))
            assert result[f"{name}_stderr"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(5))
    assert len(set(correct)) > 1
    assert len({acc for acc, _ in pairs}) > 1
    assert any(acc != acc_norm for acc, acc_norm in pairs)


class FixedTaste(nn.Module):
    """A model with the same logits everywhere: those of some words, and 0 for the rest."""

    def __init__(self, logits: dict[str, float]) -> None:
        super().__init__()
        self.config = ModelConfig(n_ctx=32)
        self.embedding = nn.Embedding(self.config.n_vocab, 1)
        nn.init.zeros_(self.embedding.weight)
        for word, value in logits.items():
            (token,) = encode(word)
            self.embedding.weight.data[token] = value

    def hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.ones(*ids_BT.shape, 1)


def test_preference_by_each_rule() -> None:
    """The right ending is three likely words of 11 characters, each wrong one a less likely word of 7."""
    items = [
        Item(i, "So", tuple("yes yes yes" if j == i % 4 else "nothing" for j in range(4)), i % 4, "A", "b", "c")
        for i in range(12)
    ]

    def accuracies(yes: float, nothing: float) -> tuple[float, float, float]:
        """By the mean per token, the sum, and the sum per character."""
        model: Any = FixedTaste({" yes": yes, " nothing": nothing})
        lm_eval = evaluate_lm_eval(model, items, encode)
        return evaluate(model, items, encode, "test")["acc_norm"], lm_eval["acc"], lm_eval["acc_norm"]

    assert accuracies(yes=11.0, nothing=11.5) == (0.0, 0.0, 0.0)
    assert accuracies(yes=11.5, nothing=11.0) == (1.0, 0.0, 0.0)  # a word costs 0.75 nats, and 1.25
    assert accuracies(yes=12.0, nothing=11.0) == (1.0, 0.0, 1.0)  # 0.52 and 1.52
    assert accuracies(yes=16.0, nothing=11.0) == (1.0, 1.0, 1.0)  # 0.01 and 5.01


def test_lm_eval_divides_by_characters_not_bytes() -> None:
    """An é has two bytes: 0.65 nats per character, 0.32 per byte; `it` has 0.57 of either."""
    model: Any = FixedTaste({" é": 12.0, " it": 11.5})
    items = [Item(0, "So", ("é", "it", "it", "it"), label, "A", "b", "c") for label in (0, 1)]
    assert [evaluate_lm_eval(model, [item], encode)["acc_norm"] for item in items] == [0.0, 1.0]


def test_a_model_that_gives_nan_is_never_right() -> None:
    broken: Any = FixedTaste({" yes": math.nan})
    assert evaluate(broken, ITEMS, encode, "test")["correct"] == 0
    lm_eval = evaluate_lm_eval(broken, WHOLE_ITEMS, encode)
    assert (lm_eval["acc"], lm_eval["acc_norm"]) == (0.0, 0.0)


def test_texts_of_both_protocols() -> None:
    """test_lm_eval.py compares lm-eval's with its own program."""
    assert reference_texts(WIKIHOW) == (WIKIHOW.ctx, [" " + ending for ending in WIKIHOW.endings])
    context, endings = lm_eval_texts(WIKIHOW)
    assert context == "Home and Garden: How to wait. Sit down. Any chair will do."
    assert lm_eval_endings(WIKIHOW) == [" One with arms.", "Stand up.. Walk", "no", "A b  c"]
    assert endings == [" " + ending for ending in lm_eval_endings(WIKIHOW)]
    sitting = replace(WIKIHOW, activity_label="Sitting", ctx_a="A man sits.", ctx_b="then HE")
    assert lm_eval_texts(sitting)[0] == "Sitting: A man sits. Then he"
    context, endings = lm_eval_texts(replace(WIKIHOW, ctx_a="He waits [title]"))
    assert (context, endings[2]) == ("Home and Garden: He waits.", "  no")  # whitespace moves to the endings


@pytest.mark.parametrize("texts", [reference_texts, lm_eval_texts])
def test_context_and_ending_have_the_same_ids_together(shared: Path, texts: Callable) -> None:
    """lm-eval encodes them together; tried with every fiftieth item."""
    for item in load_items(shared / "eval" / "hellaswag_val.jsonl.gz")[::50]:
        context, endings = texts(item)
        for ending in endings:
            assert encode(context) + encode(ending) == encode(context + ending)


def test_protocols_that_the_items_allow(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = FixedTaste({})
    assert list(measure(model, WHOLE_ITEMS[:1], load_tokenizer(), HELLASWAG_PROTOCOL)) == ["reference", "lm_eval"]
    assert list(measure(model, ITEMS[:1], load_tokenizer(), HELD_OUT_PROTOCOL)) == ["reference"]
    assert capsys.readouterr().err == ""
    assert list(measure(model, ITEMS[:1], load_tokenizer(), HELLASWAG_PROTOCOL)) == ["reference"]
    assert "without lm-eval's protocol" in capsys.readouterr().err
    with pytest.raises(UserError, match="fewer tokens"):
        measure(LLM(ModelConfig(n_vocab=97, n_embd=8, n_head=2, n_layer=1)), ITEMS, load_tokenizer(), "x")


@pytest.mark.parametrize(("n_ctx", "batch_tokens"), [(64, 1), (64, 300), (12, 100_000), (4, 300)])
def test_scores_equal_those_of_one_ending_at_a_time(
    n_ctx: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n_ctx = 12 cuts contexts; 4 is shorter than some endings, whose last 4 tokens remain."""
    monkeypatch.setattr(hellaswag, "CPU_SIZES", (batch_tokens, 7))
    model = make_model(n_ctx)
    shapes: list[torch.Size] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    scores = score_endings(model, QUESTIONS)
    np.testing.assert_allclose(scores, slow_sums(model), atol=1e-4)
    batches = shapes[: -sum(map(len, scores))]  # slow_sums takes one row at a time
    assert sum(rows for rows, _ in batches) == 20
    assert all(rows == 1 or rows * length <= batch_tokens for rows, length in batches)
    assert len(batches) == {1: 20, 100_000: 1}.get(batch_tokens, len(batches))


def test_autocast_is_the_callers_and_the_softmax_stays_in_float32() -> None:
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_endings(model, QUESTIONS)
    assert scores != score_endings(model, QUESTIONS)
    for values, expected, (_, endings) in zip(scores, slow_sums(model), QUESTIONS, strict=True):
        for value, exact, ending in zip(values, expected, endings, strict=True):
            assert value == pytest.approx(exact, abs=0.3 * len(ending))
    converted = score_endings(make_model().bfloat16(), QUESTIONS)
    flat = [value for values in converted for value in values]
    assert any(value != torch.tensor(value).bfloat16().item() for value in flat)


@pytest.mark.parametrize("ranks", [2, 7])
def test_any_number_of_processes_gives_the_same_result_to_the_bit(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hellaswag, "CPU_SIZES", (200, 128))
    monkeypatch.setattr(hellaswag, "attention_for_any_shape", nullcontext)  # threads would leave it changed for good
    model, barrier = make_model(), threading.Barrier(ranks)
    contributions: list[list[float]] = [[]] * ranks
    scores: list[Any] = [None] * ranks
    calls: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    alone = score_endings(model, QUESTIONS * 3)

    class Rank(Processes):
        def sum(self, values: Any) -> list[float]:
            contributions[self.rank] = list(values)
            barrier.wait(timeout=30)
            return [sum(column) for column in zip(*contributions, strict=True)]

    def one_rank(rank: int) -> None:
        scores[rank] = score_endings(
            model,
            QUESTIONS * 3,
            procs=Rank(rank, rank, ranks, torch.device("cpu")),
            between_batches=lambda done, total: calls[rank].append((done, total)),
        )

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [alone] * ranks
    assert calls == [calls[0]] * ranks  # or they would wait for each other for ever
    assert calls[0][0] == (0, 60)
    assert [done for done, _ in calls[0]] == sorted({done for done, _ in calls[0]})
    assert sum(any(value != 0 for value in values) for values in contributions) > 1


def test_the_command_measures_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = tmp_path / "items.jsonl", make_model()
    run = make_run(tmp_path / "run", model)
    data.write_text("".join(json.dumps({**RECORD, "ind": ind}) + "\n" for ind in range(6)))
    arguments = ["--checkpoint", str(run), "--data", str(data), "--limit", "5", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [COMMAND, *arguments])
    assert hellaswag.main() == 0
    output = capsys.readouterr()
    result = json.loads(output.out.splitlines()[-1])
    items = load_items(data, 5)
    lm_eval = result.pop("lm_eval")
    assert result.pop("seconds") > 0
    assert lm_eval.pop("seconds") > 0
    correct = right_by_mean(model, items)
    path = str(run / "checkpoints" / "step_0000040")
    expected = {"checkpoint": path, "step": 40, "acc_norm": correct / 5, "correct": correct, "total": 5}
    assert result == {**expected, "stderr": 0.0, "protocol": HELLASWAG_PROTOCOL}
    acc, acc_norm = slow_lm_eval(model, items)
    errors = {"acc_stderr": 0.0, "acc_norm_stderr": 0.0}
    assert lm_eval == {"acc": acc, "acc_norm": acc_norm, **errors, "total": 5, "protocol": LM_EVAL_PROTOCOL}
    assert "5 items on" in output.err


def test_mistakes_are_named(refused: Callable[..., str], tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"ind": 1}\n')
    arguments = (COMMAND, "--checkpoint", make_run(tmp_path / "run", make_model()), "--data")
    assert f"{data}, line 1: missing or wrong: ctx, endings, label. Needed" in refused(*arguments, data)
    assert "Cannot use 0 items" in refused(*arguments, data, "--limit", 0)
    assert "src.model_assessment.evaluate --hellaswag held-out" in refused(*arguments, "held-out")
