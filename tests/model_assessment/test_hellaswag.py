"""HellaSwag: both protocols against a slow reading of their definitions; batches, processes and the command."""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from src.data_processing import shards
from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment import hellaswag
from src.model_assessment.hellaswag import (
    BOTH,
    HELD_OUT_PROTOCOL,
    HELLASWAG_PROTOCOL,
    LM_EVAL,
    LM_EVAL_PROTOCOL,
    REFERENCE,
    choose_protocols,
    evaluate,
    evaluate_lm_eval,
    lm_eval_endings,
    lm_eval_obstacle,
    lm_eval_texts,
    questions,
    reference_texts,
    score_endings,
)
from src.model_assessment.hellaswag_items import Item, load_items
from src.model_utils.checkpoint_utils import save_checkpoint, step_dir
from src.params import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig, to_dict
from src.utils.errors import StoppedError, UserError
from tests.conftest import Commands, manifest_of
from tests.model_assessment.test_hellaswag_items import RECORD

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
    return model


@torch.no_grad()
def slow_log_probs(model: LLM, context: str, ending: str) -> list[float]:
    """The log-probability of each of the ending's tokens: one ending at a time, the whole float64 log-softmax."""
    before, scored = encode(context), encode(ending)
    tokens = (before + scored)[-(model.config.n_ctx + 1) :]
    log_probs = torch.log_softmax(model.eval()(torch.tensor([tokens[:-1]]))[0].double(), dim=-1)
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


@pytest.mark.parametrize("n_ctx", [64, 12])
def test_accuracy_by_the_reference_protocol(n_ctx: int) -> None:
    correct = []
    for seed in range(4):
        model = make_model(n_ctx, seed)
        result = evaluate(model, ITEMS, encode, "test")
        correct.append(right_by_mean(model, ITEMS))
        share = correct[-1] / 5
        assert result.pop("seconds") > 0
        assert result.pop("stderr") == pytest.approx(math.sqrt(share * (1 - share) / 5))
        assert result == {"acc_norm": share, "correct": correct[-1], "total": 5, "protocol": "test"}
    assert len(set(correct)) > 1


@pytest.mark.parametrize("n_ctx", [64, 12])
def test_accuracies_by_lm_evals_protocol(n_ctx: int) -> None:
    pairs = []
    for seed in range(4):
        model = make_model(n_ctx, seed)
        items = [replace(item, label=(item.label + seed) % 4) for item in WHOLE_ITEMS]
        result = evaluate_lm_eval(model, items, encode)
        pairs.append(slow_lm_eval(model, items))
        assert (result["acc"], result["acc_norm"]) == pairs[-1]
        assert (result["total"], result["protocol"]) == (5, LM_EVAL_PROTOCOL)
        for name in ("acc", "acc_norm"):
            hits = [1.0] * round(5 * result[name]) + [0.0] * (5 - round(5 * result[name]))
            assert result[f"{name}_stderr"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(5))
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
        self.blocks: list[nn.Module] = []

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(*x.shape[:-1], 1)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.embedding.weight.T


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
    assert choose_protocols(WHOLE_ITEMS, HELLASWAG_PROTOCOL, BOTH) == [REFERENCE, LM_EVAL]
    assert choose_protocols(WHOLE_ITEMS, HELLASWAG_PROTOCOL, LM_EVAL) == [LM_EVAL]
    assert choose_protocols(WHOLE_ITEMS, HELD_OUT_PROTOCOL, BOTH) == [REFERENCE]
    assert choose_protocols(ITEMS, HELLASWAG_PROTOCOL, REFERENCE) == [REFERENCE]
    assert capsys.readouterr().err == ""
    assert choose_protocols(ITEMS, HELLASWAG_PROTOCOL, BOTH) == [REFERENCE]
    assert "item ind 0 lacks activity_label, ctx_a or ctx_b" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"item ind 0 lacks .* Use --protocol reference"):
        choose_protocols(ITEMS, HELLASWAG_PROTOCOL, LM_EVAL)
    with pytest.raises(UserError, match="not HellaSwag"):
        choose_protocols(WHOLE_ITEMS, HELD_OUT_PROTOCOL, LM_EVAL)
    assert lm_eval_obstacle([WIKIHOW]) == ""
    for empty in ({"endings": ("a", "b", "c", "[step]")}, {"activity_label": "[a", "ctx_a": "b]"}):
        assert "a text of item ind 1 is empty" in lm_eval_obstacle([replace(WIKIHOW, **empty)])


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
@pytest.mark.parametrize("n_ctx", [64, 12, 4])
def test_scores_equal_those_of_one_ending_at_a_time(
    n_ctx: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n_ctx = 12 cuts contexts; 4 is shorter than some endings, whose last 4 tokens remain."""
    monkeypatch.setattr(hellaswag, "CPU_SIZES", (batch_tokens, 7, 3))
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


def test_dropout_is_off_and_the_models_mode_comes_back() -> None:
    model = make_model()
    for training in (True, False):
        model.train(training)
        scores = score_endings(model, QUESTIONS)
        assert model.training is training
    assert scores == score_endings(model.train(), QUESTIONS)

    def interrupt(done: int, total: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        score_endings(model, QUESTIONS, between_batches=interrupt)
    assert model.training


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_processes_gives_the_same_result_to_the_bit(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hellaswag, "CPU_SIZES", (200, 128, 16))
    model, barrier = make_model().eval(), threading.Barrier(ranks)
    contributions: list[list[float]] = [[]] * ranks
    scores: list[Any] = [None] * ranks
    calls: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    alone = score_endings(model, QUESTIONS * 3)

    def one_rank(rank: int) -> None:
        def sum_over_ranks(values: Any) -> list[float]:
            contributions[rank] = list(values)
            barrier.wait(timeout=30)
            return [sum(column) for column in zip(*contributions, strict=True)]

        scores[rank] = score_endings(
            model,
            QUESTIONS * 3,
            rank=rank,
            world_size=ranks,
            sum_over_ranks=sum_over_ranks,
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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A step_* folder with a tiny random model, whose dataset is `prose` under the commands' folder."""
    model = make_model(n_ctx=64)
    config = Config(
        model=model.config,
        data=DataConfig(dir="prose"),
        train=TrainConfig(batch_tokens=64, precision="float32"),
        eval=EvalConfig(hellaswag_items=8),
    )
    root = tmp_path / "runs" / "tiny" / "checkpoints"
    write_prose(tmp_path / "datasets" / "prose")
    trained_on = shards.read_manifest(tmp_path / "datasets" / "prose").sha256
    state = {"config": to_dict(config), "dataset_sha256": trained_on}
    save_checkpoint(root, 3, {"model": dict(model.named_parameters())}, state)
    return step_dir(root, 3)


def write_prose(folder: Path) -> None:
    """A dataset whose validation shard is eight documents of words; its training shard is the same."""
    rng = np.random.default_rng(0)
    words = np.array(["the", "old", "river", "runs", "below", "every", "house", "and", "never", "stops", "talking"])
    texts = [" ".join(rng.choice(words, 300)) for _ in range(8)]
    ids = np.array([i for text in texts for i in (50_256, *encode(text))], dtype=np.uint16)
    folder.mkdir(parents=True)
    listed = []
    for index, split in enumerate(("validation", "train")):
        name, sha256 = shards.write_shard(folder, "prose", index, len(ids), [ids])
        size = sum(map(len, texts))
        listed.append(shards.Shard(name, split, len(ids), len(texts), size, sha256, "0" * 32, "f" * 32))
    shards.write_manifest(folder, manifest_of(listed))


def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object
) -> dict[str, Any]:
    """The JSON of the command, run in this process."""
    monkeypatch.setattr("sys.argv", [COMMAND, *map(str, arguments)])
    monkeypatch.setattr("src.utils.root.DATASETS", tmp_path / "datasets")
    assert hellaswag.main() == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_measures_a_checkpoint(commands: Commands, checkpoint: Path) -> None:
    data = commands.temp_data / "items.jsonl"
    data.write_text("".join(json.dumps({**RECORD, "ind": ind}) + "\n" for ind in range(6)))
    done = commands.module(COMMAND, "--checkpoint", str(checkpoint), "--data", str(data), "--limit", "5")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    items, model = load_items(data, 5), make_model()
    lm_eval = result.pop("lm_eval")
    assert result.pop("seconds") > 0
    assert lm_eval.pop("seconds") > 0
    correct = right_by_mean(model, items)
    expected = {"checkpoint": str(checkpoint), "step": 3, "acc_norm": correct / 5, "correct": correct, "total": 5}
    assert result == {**expected, "stderr": 0.0, "protocol": HELLASWAG_PROTOCOL}
    acc, acc_norm = slow_lm_eval(model, items)
    errors = {"acc_stderr": 0.0, "acc_norm_stderr": 0.0}
    assert lm_eval == {"acc": acc, "acc_norm": acc_norm, **errors, "total": 5, "protocol": LM_EVAL_PROTOCOL}
    assert "5 items on" in done.stderr


def test_one_protocol_and_the_stand_in(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "items.jsonl"
    data.write_text(json.dumps(RECORD))
    arguments = ("--checkpoint", checkpoint, "--protocol", "lm-eval", "--data", data)
    assert run_here(monkeypatch, capsys, tmp_path, *arguments).keys() == {"checkpoint", "step", "lm_eval"}
    result = run_here(monkeypatch, capsys, tmp_path, "--checkpoint", checkpoint, "--data", "held-out")
    assert (result["total"], result["protocol"]) == (8, HELD_OUT_PROTOCOL)
    assert "not HellaSwag" in HELD_OUT_PROTOCOL


def test_mistakes_are_named(refused: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"ind": 1}\n')
    ask = ("--checkpoint", checkpoint, "--data")
    assert f"{data}, line 1: found no ctx, no endings, no label. Needed" in refused(COMMAND, *ask, data)
    assert "--limit is 0" in refused(COMMAND, *ask, data, "--limit", 0)
    data.write_text(json.dumps({**RECORD, "ctx_a": None}))
    assert "item ind 7 lacks activity_label, ctx_a" in refused(COMMAND, *ask, data, "--protocol", "lm-eval")
    manifest = tmp_path / "datasets" / "prose" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    assert "is not the dataset that" in refused(COMMAND, *ask, "held-out")  # the model may have seen its text
    manifest.parent.rename(tmp_path / "elsewhere")
    assert "no dataset at" in refused(COMMAND, *ask, "held-out").lower()
