"""Models measured side by side: figures equal to those of training, and errors of differences from pairs of batches."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from src.data_processing.shards import read_manifest
from src.model_assessment.evaluate import Evaluated, evaluate, main, table
from src.model_utils.hf_export import export
from src.model_utils.load_model import load_model
from tests.conftest import Commands
from tests.data_processing.documents import some_texts, write_json_lines
from tests.model_utils.exports import SHAPE, make_run, small_model
from tests.test_processes import SETTINGS, train

Evaluate = Callable[..., tuple[dict, str]]


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """evaluated(*arguments): the JSON of the command, run in this process, and the output before it."""
    monkeypatch.setattr("src.utils.root.RUNS", tmp_path / "runs")
    monkeypatch.setattr("src.utils.root.DATASETS", tmp_path / "datasets")

    def run(*arguments: str) -> tuple[dict, str]:
        monkeypatch.setattr("sys.argv", ["evaluate", "--device", "cpu", *arguments])
        assert main() == 0
        tables, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
        return json.loads(last), tables

    return run


def test_a_run_has_the_loss_that_it_logged(commands: Commands, dataset: Callable[..., Path], evaluated: Evaluate):
    data = str(dataset(train_tokens=[700, 900], n_vocab=300))
    settings = ("--checkpoint.every-steps", "20", "--eval.val-every-steps", "20", "--optim.max-lr", "0.01")
    train(commands, data, "a", "--train.total-steps", "40", *settings)
    tokens = SETTINGS[SETTINGS.index("--eval.val-tokens") + 1]
    steps = [str(commands.temp_data / "runs" / "a" / "checkpoints" / f"step_00000{step}") for step in (20, 40)]
    result, tables = evaluated("--checkpoint", *steps, "--val-tokens", tokens)
    for figures, logged in zip(result["results"], commands.metrics("a", "validation")[1:], strict=True):
        assert figures["step"] == logged["step"]
        for key in ("loss", "perplexity", "bits_per_byte", "tokens"):
            assert figures["validation"][key] == pytest.approx(logged[key], rel=1e-5), key
        assert figures["multiple_choice"] == {}
    lines = tables.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| a ")
    assert f"{result['results'][1]['validation']['loss']:.4f}" in lines[3]


def test_the_error_of_a_difference_is_of_pairs():
    """Batches that differ by far more than the models do."""
    first_losses = [2.0, 7.0, 4.0, 5.0]
    changes = [0.11, 0.09, 0.12, 0.08]
    common = Evaluated("a", 1, "float32", "float32", 16, 10, {"loss": statistics.mean(first_losses)}, {}, first_losses)
    losses = [loss + change for loss, change in zip(first_losses, changes, strict=True)]
    second = replace(common, checkpoint="b", validation={"loss": statistics.mean(losses)}, batch_losses=losses)
    found = second.less(common)
    assert found is not None
    assert found[0] == pytest.approx(0.1)
    assert found[1] == pytest.approx(np.std(changes, ddof=1) / math.sqrt(4))
    assert replace(second, n_ctx=32).less(common) is None
    assert replace(second, batch_losses=[2.1]).less(replace(common, batch_losses=[2.0])) == (found[0], None)


def test_table_names_every_protocol_it_has_figures_of():
    values = {"loss": 3.25, "stderr": 0.5, "perplexity": 25.8, "bits_per_byte": 1.05}
    choice = {
        "reference": {"acc_norm": 0.31, "stderr": 0.02, "total": 1_500, "protocol": "first (its words)"},
        "lm_eval": {
            "acc": 0.27,
            "acc_stderr": 0.01,
            "acc_norm": 0.33,
            "acc_norm_stderr": 0.03,
            "total": 1_500,
            "protocol": "second (other words)",
        },
    }
    text = table([Evaluated("/runs/x/checkpoints/step_0000007", 7, "int8", "bfloat16", 16, 1_000, values, choice, [])])
    assert "| x     | 7    | int8    | 1,000      | 3.2500 ± 0.5000 | 25.80 " in text
    head, row = (line.strip("|").split(" | ") for line in (text.split("\n")[4], text.split("\n")[6]))
    cells = dict(zip(map(str.strip, head), map(str.strip, row), strict=True))
    assert cells["first acc_norm"] == "31.00% ± 2.00%"
    assert cells["second acc"] == "27.00% ± 1.00%"
    assert cells["second acc_norm"] == "33.00% ± 3.00%"
    assert "first: (its words)\nsecond: (other words)" in text


def test_an_export_other_weights_and_multiple_choice(commands: Commands, tmp_path: Path, evaluated: Evaluate):
    run = make_run(commands.temp_data / "runs" / "words", small_model())
    export(run, tmp_path / "exported", "hf", "float32")
    texts = write_json_lines(tmp_path / "a.jsonl", some_texts(60))
    prepared = commands.module(
        "src.data_processing.data_downloader", "--source", "files", "--path", str(texts), "--out", "text"
    )
    assert prepared.returncode == 0, prepared.stderr
    weights = ("--weights", "float32", "bf16", "--val-tokens", "2000")
    arguments = ("--checkpoint", "words", str(tmp_path / "exported"), "--data", "text", *weights)
    result, tables = evaluated(*arguments, "--hellaswag", "held-out", "--limit", "6")
    exact, rounded, exported, exported_rounded = result["results"]
    assert exported["validation"]["loss"] == pytest.approx(exact["validation"]["loss"], abs=1e-6)
    assert exported_rounded["validation"]["loss"] == pytest.approx(rounded["validation"]["loss"], abs=1e-6)
    assert 0 < abs(rounded["loss_less_first"]["difference"]) < 0.2
    for each in result["results"]:
        choice = each["multiple_choice"]
        assert list(choice) == ["reference"]
        assert choice["reference"]["total"] == 6
        assert choice["reference"]["protocol"].startswith("held-out-ctx-mean-logprob (not HellaSwag")
    assert "HellaSwag" not in tables.replace("not HellaSwag", "")


def test_it_says_how_far_it_is(dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr("src.model_assessment.evaluate.now_and_then", lambda: lines.append)
    monkeypatch.setattr("src.model_assessment.evaluate.BATCH_TOKENS", 128)
    folder = dataset(train_tokens=[900], val_tokens=700, n_vocab=50_257)
    loaded = load_model(str(make_run(tmp_path / "words", small_model())), "cpu")
    evaluate(loaded, "float32", folder, read_manifest(folder), 5 * SHAPE.n_ctx, None)
    assert lines == [f"validation: {done} of 5 sequences" for done in (0, 2, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nosuch"], "Cannot load a checkpoint"),
        (["--checkpoint", "words", "--data", "nosuch"], "no dataset at"),
        (["--checkpoint", "words", "--data", "ids", "--val-tokens", "0"], "--val-tokens is 0"),
        (["--checkpoint", "words", "--data", "ids", "--limit", "3"], "Name them with --hellaswag"),
        (["--checkpoint", "words", "--data", "ids", "--hellaswag", "/nope"], "Cannot read /nope"),
        (["--checkpoint", "words", "small", "--data", "ids"], "the model 97"),
        (["--checkpoint", "words"], "another dataset, with --data"),
        (["--checkpoint", "imported"], "imported/checkpoints/step_0000040 is not recorded. Name one"),
        (
            ["--checkpoint", "words", "--data", "ids", "--hellaswag", "items.jsonl", "--protocol", "lm-eval"],
            "item ind 3 lacks activity_label",
        ),
    ],
)
def test_a_mistake_is_named(
    arguments: list[str],
    message: str,
    refused: Callable[..., str],
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    item = {"ind": 3, "ctx": "He sat", "ctx_a": "He", "ctx_b": "sat", "endings": [" a", " b", " c", " d"], "label": 1}
    Path("items.jsonl").write_text(json.dumps(item))
    dataset(train_tokens=[900], n_vocab=50_257, name="ids")
    make_run(tmp_path / "runs" / "words", small_model())
    small = replace(small_model().config, n_vocab=97)
    make_run(tmp_path / "runs" / "small", small_model(small))
    make_run(tmp_path / "runs" / "imported", small_model(), dataset_sha256="")
    assert message in refused("src.model_assessment.evaluate", *arguments)


def test_a_mistake_is_a_line_and_ends_with_2(commands: Commands):
    done = commands.module("src.model_assessment.evaluate", "--checkpoint", "nosuch")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("evaluate.py: error: Cannot load a checkpoint")
