"""Both protocols against a slow reading of their definitions; ranks and the command besides."""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data_processing import shards
from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment.hellaswag import (
    BOTH,
    LM_EVAL,
    REFERENCE,
    Measured,
    evaluate,
    evaluate_lm_eval,
    measure,
)
from src.model_assessment.hellaswag_items import Item, load_items
from src.model_assessment.hellaswag_protocols import (
    HELD_OUT_PROTOCOL,
    HELLASWAG_PROTOCOL,
    LM_EVAL_PROTOCOL,
    lm_eval_choices,
    lm_eval_texts,
)
from src.model_utils.checkpoint_utils import save_checkpoint, step_dir
from src.params import Config, DataConfig, EvalConfig, TrainConfig, to_dict
from src.utils.errors import UserError
from tests.conftest import Commands, manifest_of
from tests.model_assessment.choices import (
    ITEMS,
    RECORD,
    FixedTaste,
    encode,
    make_model,
    slow_log_probs,
    slow_means,
)

COMMAND = "src.model_assessment.hellaswag"
WHOLE_ITEMS = [
    replace(item, activity_label="Any [x] thing", ctx_a=item.ctx, ctx_b=last)
    for item, last in zip(ITEMS, ("", "he", "the LADY", "[step]", "so"), strict=True)
]


def slow_lm_eval(model: LLM, items: list[Item]) -> tuple[float, float]:
    """acc and acc_norm."""
    right = np.zeros(2)
    for item in items:
        context, endings = lm_eval_texts(item)
        sums = np.array([sum(slow_log_probs(model, context, ending)) for ending in endings])
        lengths = [len(choice) for choice in lm_eval_choices(item)]
        right += [np.argmax(sums) == item.label, np.argmax(sums / lengths) == item.label]
    acc, acc_norm = (right / len(items)).tolist()
    return acc, acc_norm


def right_by_mean(model: LLM, items: list[Item]) -> int:
    best = {i: values.index(max(values)) for i, values in slow_means(model, items).items()}
    return sum(best[i] == item.label for i, item in enumerate(items))


@pytest.mark.parametrize("n_ctx", [64, 12])
def test_the_references_accuracy(n_ctx: int) -> None:
    found = []
    for seed in range(4):
        model = make_model(n_ctx, seed)
        result = evaluate(model, ITEMS, encode, protocol="test")
        found.append(right_by_mean(model, ITEMS))
        assert (result.correct, result.total, result.protocol) == (found[-1], 5, "test")
        assert result.acc_norm == found[-1] / 5
        assert result.stderr == pytest.approx(math.sqrt(result.acc_norm * (1 - result.acc_norm) / 5))
    assert len(set(found)) > 1


@pytest.mark.parametrize("n_ctx", [64, 12])
def test_lm_evals_accuracies(n_ctx: int) -> None:
    found = []
    for seed in range(4):
        model = make_model(n_ctx, seed)
        items = [replace(item, label=(item.label + seed) % 4) for item in WHOLE_ITEMS]
        result = evaluate_lm_eval(model, items, encode)
        found.append(slow_lm_eval(model, items))
        assert (result.acc, result.acc_norm) == found[-1]
        assert (result.total, result.protocol) == (5, LM_EVAL_PROTOCOL)
        for share, stderr in ((result.acc, result.acc_stderr), (result.acc_norm, result.acc_norm_stderr)):
            hits = [1.0] * round(5 * share) + [0.0] * (5 - round(5 * share))
            assert stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(5))
    assert len({acc for acc, _ in found}) > 1
    assert any(acc != acc_norm for acc, acc_norm in found)


def test_every_rank_reports_the_sum() -> None:
    model, ranks = make_model().eval(), 3

    def on_all_ranks(way: Any, items: list[Item], **options: Any) -> list[Any]:
        barrier, contributions = threading.Barrier(ranks), [[0.0]] * ranks
        results: list[Any] = [None] * ranks

        def one_rank(rank: int) -> None:
            def sum_over_ranks(values: Any) -> list[float]:
                contributions[rank] = list(values)
                barrier.wait(timeout=30)
                return [sum(column) for column in zip(*contributions, strict=True)]

            shared_out = {"rank": rank, "world_size": ranks, "sum_over_ranks": sum_over_ranks, "token_budget": 100}
            results[rank] = replace(way(model, items, encode, **shared_out, **options), seconds=0.0)

        threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    alone = evaluate(model, ITEMS * 2, encode, protocol="test", token_budget=100)
    assert on_all_ranks(evaluate, ITEMS * 2, protocol="test") == [replace(alone, seconds=0.0)] * ranks
    by_lm_eval = evaluate_lm_eval(model, WHOLE_ITEMS * 2, encode, token_budget=100)
    assert on_all_ranks(evaluate_lm_eval, WHOLE_ITEMS * 2) == [replace(by_lm_eval, seconds=0.0)] * ranks


def test_what_a_model_prefers_by_each_rule() -> None:
    """The right ending is three likely words of 11 characters, each wrong one a less likely word of 7."""
    items = [
        Item(i, "So", tuple("yes yes yes" if j == i % 4 else "nothing" for j in range(4)), i % 4, "A", "b", "c")
        for i in range(12)
    ]

    def accuracies(yes: float, nothing: float) -> tuple[float, float, float]:
        """By the mean a token, the sum, and the sum a character."""
        model: Any = FixedTaste({" yes": yes, " nothing": nothing})
        by_lm_eval = evaluate_lm_eval(model, items, encode)
        return evaluate(model, items, encode, protocol="test").acc_norm, by_lm_eval.acc, by_lm_eval.acc_norm

    assert accuracies(yes=11.0, nothing=11.5) == (0.0, 0.0, 0.0)
    assert accuracies(yes=11.5, nothing=11.0) == (1.0, 0.0, 0.0)  # a word costs 0.75 nats, and 1.25
    assert accuracies(yes=12.0, nothing=11.0) == (1.0, 0.0, 1.0)  # 0.52 and 1.52
    assert accuracies(yes=16.0, nothing=11.0) == (1.0, 1.0, 1.0)  # 0.01 and 5.01


def test_lm_eval_divides_by_characters_not_bytes() -> None:
    """An é is one of two bytes: 0.65 nats a character, 0.32 a byte; `it` has 0.57 of either."""
    model: Any = FixedTaste({" é": 12.0, " it": 11.5})
    items = [Item(0, "So", ("é", "it", "it", "it"), label, "A", "b", "c") for label in (0, 1)]
    result = evaluate_lm_eval(model, items, encode)
    assert [evaluate_lm_eval(model, [item], encode).acc_norm for item in items] == [0.0, 1.0]
    assert (result.acc, result.acc_norm) == (0.5, 0.5)


def test_a_model_that_gives_nan_is_never_right() -> None:
    broken: Any = FixedTaste({" yes": math.nan})
    assert evaluate(broken, ITEMS, encode, protocol="test").correct == 0
    by_lm_eval = evaluate_lm_eval(broken, WHOLE_ITEMS, encode)
    assert (by_lm_eval.acc, by_lm_eval.acc_norm) == (0.0, 0.0)


def test_both_protocols_are_measured_where_the_items_allow_it() -> None:
    model, tokenizer = make_model(), load_tokenizer()
    seen: dict[str, int] = {}

    def on_progress(protocol: str, done: int) -> None:
        seen[protocol] = done

    def known(measured: Measured) -> tuple[bool, bool]:
        return measured.reference is not None, measured.lm_eval is not None

    both = measure(model, WHOLE_ITEMS, tokenizer, on_progress=on_progress)
    assert both.reference is not None
    assert both.lm_eval is not None
    assert both.reference.correct == right_by_mean(model, WHOLE_ITEMS)
    assert (both.lm_eval.acc, both.lm_eval.acc_norm) == slow_lm_eval(model, WHOLE_ITEMS)
    assert both.note == ""
    assert seen == {HELLASWAG_PROTOCOL: 5, LM_EVAL_PROTOCOL: 5}
    assert known(measure(model, WHOLE_ITEMS, tokenizer, asked=REFERENCE)) == (True, False)
    assert known(measure(model, WHOLE_ITEMS, tokenizer, asked=LM_EVAL)) == (False, True)

    alone = measure(model, ITEMS, tokenizer)
    assert known(alone) == (True, False)
    assert alone.note == "without lm-eval's protocol: item ind 0 has no activity_label, ctx_a, ctx_b"
    stand_in = measure(model, WHOLE_ITEMS, tokenizer, protocol=HELD_OUT_PROTOCOL)
    assert known(stand_in) == (True, False)
    assert stand_in.note == ""
    for asked in (LM_EVAL, BOTH):
        with pytest.raises(UserError, match="item ind 0 has no activity_label, ctx_a, ctx_b; use --protocol reference"):
            measure(model, ITEMS, tokenizer, asked=asked)
        with pytest.raises(UserError, match="not HellaSwag"):
            measure(model, WHOLE_ITEMS, tokenizer, protocol=HELD_OUT_PROTOCOL, asked=asked)


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


def test_the_command_measures_by_the_protocol_that_is_asked(commands: Commands, checkpoint: Path) -> None:
    data = commands.temp_data / "items.jsonl"
    data.write_text(json.dumps(RECORD))
    arguments = ("--checkpoint", str(checkpoint), "--data", str(data))
    done = commands.module(COMMAND, *arguments, "--protocol", "lm-eval")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]).keys() == {"checkpoint", "step", "lm_eval"}
    data.write_text(json.dumps({**RECORD, "ctx_a": None}))
    done = commands.module(COMMAND, *arguments, "--protocol", "both")
    assert (done.returncode, done.stdout) == (2, "")
    assert "original format: item ind 7 has no ctx_a; use --protocol reference" in done.stderr


def test_the_command_never_calls_the_stand_in_hellaswag(commands: Commands, checkpoint: Path) -> None:
    done = commands.module(COMMAND, "--checkpoint", str(checkpoint), "--data", "held-out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["total"], result["protocol"]) == (8, HELD_OUT_PROTOCOL)
    assert "not HellaSwag" in HELD_OUT_PROTOCOL


def test_the_command_says_what_is_wrong_and_exits_with_2(
    commands: Commands, refused: Callable[..., str], checkpoint: Path
) -> None:
    """The environment of `commands` has a hub that does not answer."""
    data = commands.temp_data / "bad.jsonl"
    data.write_text('{"ind": 1}\n')
    (commands.temp_data / "datasets" / "prose").rename(commands.temp_data / "elsewhere")
    for name, words in (
        (str(data), f"{data}, line 1: found no ctx, no endings, no label; needed"),
        ("held-out", "no dataset at"),
    ):
        assert words in refused(COMMAND, "--checkpoint", checkpoint, "--data", name)
    done = commands.module(COMMAND, "--checkpoint", str(checkpoint))
    assert (done.returncode, done.stdout) == (2, "")
    assert "http://127.0.0.1:9 does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_held_out_text_of_other_data_is_refused(commands: Commands, checkpoint: Path) -> None:
    """It may hold what the model was trained on."""
    manifest = commands.temp_data / "datasets" / "prose" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    done = commands.module(COMMAND, "--checkpoint", str(checkpoint), "--data", "held-out")
    assert done.returncode == 2
    assert "is not the dataset that" in done.stderr
