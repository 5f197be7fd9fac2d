"""The protocol against a slow reading of its definition; files, ranks and the command besides."""

import gzip
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub
from torch import nn

from src.data_processing import shards
from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment.hellaswag import (
    HELD_OUT_PROTOCOL,
    HELLASWAG_PROTOCOL,
    evaluate,
    item_scores,
)
from src.model_assessment.hellaswag_items import Item, fetch_items, load_items
from src.model_utils.checkpoint_utils import save_checkpoint, step_dir
from src.params import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig, to_dict
from src.utils.errors import UserError
from tests.conftest import Commands, manifest_of

COMMAND = "src.model_assessment.hellaswag"
encode = load_tokenizer().encode

RECORD: dict[str, Any] = {
    "ind": 7,
    "ctx": "A man sits.",
    "endings": ["stands up.", "is a roof.", "sings it.", "ate."],
    "label": 2,
}
ITEMS = [
    Item(0, "The cat sat on the mat and", ("looked around.", "flew to the moon in a red rocket.", "ate", "sang"), 0),
    Item(1, "Rain", ("falls.", "is made of iron and wool, as everybody knows.", "sleeps a while.", "runs"), 2),
    Item(2, "She opened the old book slowly; then she", ("read it aloud.", "read it.", "drank the sea.", "barked"), 1),
    Item(3, "Naïve café owners, 10,042 of them,", ("served ☕ all day.", "slept.", "counted to ten.", "left"), 3),
    Item(4, "word " * 40 + "end", ("of the line.", "and so on and on.", "word word", "of it all"), 2),
]


def make_model(n_ctx: int = 64, seed: int = 0) -> LLM:
    """Weights far from their initial scale, so that scores differ between endings and depend on the context."""
    torch.manual_seed(seed)
    model = LLM(ModelConfig(n_ctx=n_ctx, n_embd=16, n_head=2, n_layer=2, residual_dropout=0.5, ffn_dropout=0.5))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@torch.no_grad()
def slow_score(model: LLM, ctx: str, ending: str) -> float:
    """The definition, one ending at a time, through the whole float64 log-softmax."""
    context, continuation = encode(ctx), encode(" " + ending)
    tokens = (context + continuation)[-(model.config.n_ctx + 1) :]
    log_probs = torch.log_softmax(model(torch.tensor([tokens[:-1]]))[0].double(), dim=-1)
    scored = range(max(1, len(tokens) - len(continuation)), len(tokens))
    return sum(log_probs[t - 1, tokens[t]].item() for t in scored) / len(scored)


def slow_scores(model: LLM, items: list[Item]) -> dict[int, list[float]]:
    model.eval()
    return {i: [slow_score(model, item.ctx, ending) for ending in item.endings] for i, item in enumerate(items)}


def assert_close(scores: dict[int, list[float]], expected: dict[int, list[float]], tolerance: float = 1e-5) -> None:
    assert scores.keys() == expected.keys()
    for i, values in expected.items():
        assert scores[i] == pytest.approx(values, abs=tolerance)


@pytest.mark.parametrize("token_budget", [1, 300, 100_000])
@pytest.mark.parametrize("n_ctx", [64, 12, 4])
def test_scores_are_those_of_one_ending_at_a_time(n_ctx: int, token_budget: int) -> None:
    """n_ctx = 12 crops contexts; 4 is shorter than some endings, whose last 4 tokens remain."""
    model = make_model(n_ctx)
    expected = slow_scores(model, ITEMS)
    assert_close(item_scores(model, ITEMS, encode, token_budget=token_budget), expected)
    best = {i: values.index(max(values)) for i, values in expected.items()}
    result = evaluate(model, ITEMS, encode, protocol="test", token_budget=token_budget)
    assert result.correct == sum(best[i] == item.label for i, item in enumerate(ITEMS))
    assert (result.total, result.protocol, result.acc_norm) == (5, "test", result.correct / 5)
    assert result.stderr == pytest.approx(math.sqrt(result.acc_norm * (1 - result.acc_norm) / 5))


def test_batches_keep_to_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    sizes: list[int] = []
    hidden = model.hidden

    def measured(inputs_BT: torch.Tensor) -> torch.Tensor:
        sizes.append(inputs_BT.numel())
        return hidden(inputs_BT)

    monkeypatch.setattr(model, "hidden", measured)
    item_scores(model, ITEMS[:4] * 10, encode, token_budget=400)
    assert 1 < len(sizes) < 40
    assert max(sizes) <= 400


def test_autocast_is_the_callers_and_the_softmax_stays_in_float32() -> None:
    model = make_model()
    expected = slow_scores(model, ITEMS)
    with torch.autocast("cpu", torch.bfloat16):
        scores = item_scores(model, ITEMS, encode)
    assert scores != item_scores(model, ITEMS, encode)
    assert_close(scores, expected, tolerance=0.3)
    scores = item_scores(make_model().bfloat16(), ITEMS, encode)  # no autocast to fall back on
    single = [  # endings of one token: no mean hides what their score came in
        score
        for i, item in enumerate(ITEMS)
        for ending, score in zip(item.endings, scores[i], strict=True)
        if len(encode(" " + ending)) == 1
    ]
    assert any(value != torch.tensor(value).bfloat16().item() for value in single)


def test_dropout_is_off_and_the_models_mode_comes_back() -> None:
    model = make_model()
    for training in (True, False):
        model.train(training)
        scores = item_scores(model, ITEMS, encode)
        assert model.training is training
    assert scores == item_scores(model.train(), ITEMS, encode)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        item_scores(model, ITEMS, encode, on_progress=interrupt)
    assert model.training


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_ranks_gives_the_same_result_to_the_bit(world_size: int) -> None:
    model, items = make_model().eval(), ITEMS * 3
    alone = item_scores(model, items, encode, token_budget=200)
    parts = [
        item_scores(model, items, encode, rank=rank, world_size=world_size, token_budget=200)
        for rank in range(world_size)
    ]
    assert sum(len(part) for part in parts) == len(items)
    assert {i: values for part in parts for i, values in part.items()} == alone


def test_every_rank_reports_the_sum() -> None:
    model, items, ranks = make_model().eval(), ITEMS * 2, 3
    barrier, contributions = threading.Barrier(ranks), [[0.0, 0.0]] * ranks
    results: list[Any] = [None] * ranks

    def one_rank(rank: int) -> None:
        def sum_over_ranks(values: Any) -> list[float]:
            contributions[rank] = list(values)
            barrier.wait(timeout=30)
            return [sum(column) for column in zip(*contributions, strict=True)]

        results[rank] = evaluate(
            model,
            items,
            encode,
            protocol="test",
            rank=rank,
            world_size=ranks,
            sum_over_ranks=sum_over_ranks,
            token_budget=100,
        )

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = evaluate(model, items, encode, protocol="test", token_budget=100)
    assert all((r.correct, r.total, r.stderr) == (alone.correct, alone.total, alone.stderr) for r in results)


class FixedTaste(nn.Module):
    """Gives the same logits everywhere: high for some words, low for the rest."""

    def __init__(self, logits: dict[str, float]) -> None:
        super().__init__()
        self.config = ModelConfig(n_ctx=32)
        self.embedding = nn.Embedding(self.config.n_vocab, 1)
        self.logits_V = torch.zeros(self.config.n_vocab)
        for word, value in logits.items():
            (token,) = encode(word)
            self.logits_V[token] = value

    def hidden(self, inputs_BT: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*inputs_BT.shape, 1)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self.logits_V + hidden_ND


def test_a_model_that_prefers_the_answers_is_always_right() -> None:
    """By the mean, not the sum: the right ending is the longest, and each of its tokens costs something."""
    items = [Item(i, "So", tuple("yes yes yes" if j == i % 4 else "no" for j in range(4)), i % 4) for i in range(12)]
    right: Any = FixedTaste({" yes": 12.0, " no": 11.0})
    assert evaluate(right, items, encode, protocol="test").acc_norm == 1.0
    wrong: Any = FixedTaste({" yes": 11.0, " no": 12.0})
    assert evaluate(wrong, items, encode, protocol="test").acc_norm == 0.0


def test_a_model_that_gives_nan_is_never_right() -> None:
    broken: Any = FixedTaste({" yes": math.nan})
    assert evaluate(broken, ITEMS, encode, protocol="test").correct == 0


def test_progress_reaches_the_number_of_items() -> None:
    done: list[int] = []
    item_scores(make_model(), ITEMS, encode, token_budget=1, on_progress=done.append)
    assert done == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_files_are_read_plain_or_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"items{suffix}"
    text = "".join(json.dumps({**RECORD, "ind": ind, "other": None}) + "\n" for ind in range(3)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    items = load_items(path)
    assert items[1] == Item(1, "A man sits.", ("stands up.", "is a roof.", "sings it.", "ate."), 2)
    assert [item.ind for item in items] == [0, 1, 2]
    assert load_items(path, limit=2) == items[:2]
    assert load_items(path, limit=9) == items


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("not json", "'not json', which is not JSON"),
        ("[1, 2]", "[1, 2], which is not a JSON object"),
        (json.dumps({**RECORD, "label": 4}), "label = 4"),
        (json.dumps({**RECORD, "label": ""}), "label = ''"),
        (json.dumps({**RECORD, "label": True}), "label = True"),
        (json.dumps({**RECORD, "ctx": " "}), "ctx = ' '"),
        (json.dumps({**RECORD, "ind": "x", "ctx": 3}), "ind = 'x', ctx = 3"),
        (json.dumps({**RECORD, "endings": ["a", "b", "c"]}), "endings = ['a', 'b', 'c']"),
        (json.dumps({**RECORD, "endings": ["a", "b", "c", ""]}), "endings = ['a', 'b', 'c', '']"),
        (json.dumps({k: v for k, v in RECORD.items() if k != "endings"}), "no endings"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        load_items(path)
    assert f"{path}, line 2: found {found}" in str(error.value)
    assert "needed: ind" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("absent.jsonl", None, "No such file"),
        ("not_gzip.jsonl.gz", json.dumps(RECORD).encode(), "gzip"),
        ("cut_short.jsonl.gz", gzip.compress(json.dumps(RECORD).encode() * 50, mtime=0)[:-20], "end-of-stream"),
        ("damaged.jsonl.gz", gzip.compress(b"x" * 9, mtime=0)[:10] + b"\xff" * 30, "decompressing"),
        ("binary.jsonl", b"\xff\xfe\x00", "codec"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_items(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_the_hubs_records_become_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)  # no look at the network
    records = [{**RECORD, "ind": ind, "label": "3"} for ind in range(3)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: {("Rowan/hellaswag", "validation"): records}[name, split]
    )
    assert fetch_items() == [Item(ind, RECORD["ctx"], tuple(RECORD["endings"]), 3) for ind in range(3)]
    assert len(fetch_items(2)) == 2


def test_an_unreachable_hub_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 does not answer.*local copy.*held-out"):
        fetch_items()
    assert time.monotonic() - started < 10


def test_the_real_validation_set(shared: Path) -> None:
    items = load_items(shared / "eval" / "hellaswag_val.jsonl.gz")
    assert len(items) == 10_042
    assert (items[0].ind, items[0].ctx, items[0].label) == (24, "A man is sitting on a roof. he", 3)
    assert items[0].endings[3] == "starts pulling up roofing on a roof."
    model = make_model(n_ctx=128)
    scores = item_scores(model, items[:100], encode)
    some = range(0, 100, 5)
    expected = slow_scores(model, [items[i] for i in some])
    assert_close({i: scores[n] for i, n in enumerate(some)}, expected)


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
    save_checkpoint(root, 3, {"model": model.state_dict()}, state)
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
    assert result.pop("seconds") > 0
    right = slow_scores(make_model(), load_items(data, 1))[0]
    correct = 5 * (right.index(max(right)) == RECORD["label"])
    expected = {"checkpoint": str(checkpoint), "step": 3, "acc_norm": correct / 5, "correct": correct, "total": 5}
    assert result == {**expected, "stderr": 0.0, "protocol": HELLASWAG_PROTOCOL}
    assert "5 items on" in done.stderr


def test_the_command_never_calls_the_stand_in_hellaswag(commands: Commands, checkpoint: Path) -> None:
    done = commands.module(COMMAND, "--checkpoint", str(checkpoint), "--data", "held-out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["total"], result["protocol"]) == (8, HELD_OUT_PROTOCOL)
    assert "not HellaSwag" in HELD_OUT_PROTOCOL


def test_the_command_says_what_is_wrong_and_exits_with_2(commands: Commands, checkpoint: Path) -> None:
    """The environment of `commands` has a hub that does not answer."""
    data = commands.temp_data / "bad.jsonl"
    data.write_text('{"ind": 1}\n')
    (commands.temp_data / "datasets" / "prose").rename(commands.temp_data / "elsewhere")
    for arguments, words in (
        (["--data", str(data)], f"error: {data}, line 1: found no ctx, no endings, no label; needed"),
        (["--data", "held-out"], "no dataset at"),
        ([], "http://127.0.0.1:9 does not answer"),
    ):
        done = commands.module(COMMAND, "--checkpoint", str(checkpoint), *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_held_out_text_of_other_data_is_refused(commands: Commands, checkpoint: Path) -> None:
    """It may hold what the model was trained on."""
    manifest = commands.temp_data / "datasets" / "prose" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    done = commands.module(COMMAND, "--checkpoint", str(checkpoint), "--data", "held-out")
    assert done.returncode == 2
    assert "is not the dataset that" in done.stderr
