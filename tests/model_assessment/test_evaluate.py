"""Models measured side by side: figures equal to those of training, and errors of differences from pairs of windows."""

import json
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data_processing import shards
from src.data_processing.tokenizer import load_tokenizer
from src.model_assessment.evaluate import less, main, table
from src.model_assessment.periodic_evaluation import Assessment
from src.model_utils.hf_export import export
from src.params import Config, EvalConfig, TrainConfig
from src.utils.handle_ddp import Processes
from tests.conftest import manifest_of
from tests.data_processing.documents import some_texts
from tests.model_utils.exports import SHAPE, make_run, small_model

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


def test_a_run_has_the_loss_that_it_logged(dataset: Callable[..., Path], tmp_path: Path, evaluated: Evaluate):
    """The figures of Assessment, which training logs."""
    folder = dataset(train_tokens=[900], val_tokens=700, n_vocab=50_257, name="ids")
    run = make_run(tmp_path / "runs" / "words", small_model())
    other = make_run(tmp_path / "runs" / "other", small_model(), step=50)
    config = Config(
        model=SHAPE, train=TrainConfig(batch_tokens=SHAPE.n_ctx), eval=EvalConfig(4, 320, hellaswag_items=0)
    )
    assessment = Assessment(config, folder, shards.read_manifest(folder), load_tokenizer())
    alone = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    (logged,) = assessment.run("validation", small_model(), 3, nullcontext(), alone, lambda: False)
    result, tables = evaluated("--checkpoint", str(run), str(other), "--data", "ids", "--val-tokens", "320")
    for figures, step in zip(result["results"], (40, 50), strict=True):
        assert figures["step"] == step
        for key in ("loss", "perplexity", "bits_per_byte", "tokens", "stderr"):
            assert figures["validation"][key] == pytest.approx(logged.values[key], rel=1e-4), key
        assert figures["multiple_choice"] == {}
    assert [each["loss_less_first"] for each in result["results"]] == [None, {"difference": 0.0, "stderr": 0.0}]
    lines = tables.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| other ")
    assert f"{result['results'][1]['validation']['loss']:.4f}" in lines[3]


def test_the_error_of_a_difference_is_of_pairs():
    """Windows that differ by far more than the models do."""
    first_losses = [2.0, 7.0, 4.0, 5.0]
    changes = [0.11, 0.09, 0.12, 0.08]
    losses = [loss + change for loss, change in zip(first_losses, changes, strict=True)]
    first, second = (
        {"n_ctx": 16, "validation": {"loss": statistics.mean(values)}, "window_losses": values}
        for values in (first_losses, losses)
    )
    expected = {"difference": pytest.approx(0.1), "stderr": pytest.approx(np.std(changes, ddof=1) / math.sqrt(4))}
    assert less(second, first) == expected
    assert less(first, first) is None
    assert less({**second, "n_ctx": 32}, first) is None
    single = less({**second, "window_losses": [2.1]}, {**first, "window_losses": [2.0]})
    assert single == {**expected, "stderr": None}


def test_table_names_every_protocol_it_has_figures_of():
    values = {"loss": 3.25, "stderr": 0.5, "perplexity": 25.8, "bits_per_byte": 1.05}
    choice = {
        "reference": {"acc_norm": 0.31, "stderr": 0.02, "total": 1_500, "protocol": "first (its text)"},
        "lm_eval": {
            "acc": 0.27,
            "acc_stderr": 0.01,
            "acc_norm": 0.33,
            "acc_norm_stderr": 0.03,
            "total": 1_500,
            "protocol": "second (other text)",
        },
    }
    result = {"checkpoint": "/runs/x/checkpoints/step_0000007", "step": 7, "weights": "bf16", "matmuls": "bfloat16"}
    result |= {"n_ctx": 16, "parameters": 1_000, "validation": values, "multiple_choice": choice}
    result["loss_less_first"] = None
    text = table([result])
    assert "| x     | 7    | bf16    | 1,000      | 3.2500 ± 0.5000 | 25.80 " in text
    head, row = (line.strip("|").split(" | ") for line in (text.split("\n")[4], text.split("\n")[6]))
    cells = dict(zip(map(str.strip, head), map(str.strip, row), strict=True))
    assert cells["first acc_norm"] == "31.00% ± 2.00%"
    assert cells["second acc"] == "27.00% ± 1.00%"
    assert cells["second acc_norm"] == "33.00% ± 3.00%"
    assert "first: (its text)\nsecond: (other text)" in text
    assert table([result, {**result, "n_ctx": 8}]).split("\n")[3].endswith("| context is 8         |")


def write_dataset_of(folder: Path, texts: list[str]) -> None:
    """Its validation and training shard are the same."""
    encode = load_tokenizer().encode
    ids = np.array([i for text in texts for i in (50_256, *encode(text))], dtype=np.uint16)
    folder.mkdir(parents=True)
    listed = []
    for index, split in enumerate(("validation", "train")):
        name, sha256 = shards.write_shard(folder, "text", index, len(ids), [ids])
        size = sum(map(len, texts))
        listed.append(shards.Shard(name, split, len(ids), len(texts), size, sha256, "0" * 32, "f" * 32))
    shards.write_manifest(folder, manifest_of(listed))


def test_an_export_other_weights_and_multiple_choice(tmp_path: Path, evaluated: Evaluate):
    run = make_run(tmp_path / "runs" / "words", small_model())
    export(run, tmp_path / "exported", "hf", "float32")
    write_dataset_of(tmp_path / "datasets" / "text", some_texts(8, words=100))
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nosuch"], "Cannot load a checkpoint"),
        (["--checkpoint", "words", "--data", "nosuch"], "find a dataset at"),
        (["--checkpoint", "words", "--data", "ids", "--val-tokens", "0"], "Cannot measure 0 tokens"),
        (["--checkpoint", "words", "--data", "ids", "--hellaswag", "/nope"], "Cannot read /nope"),
        (["--checkpoint", "words", "--limit", "5"], "Add --hellaswag"),
        (["--checkpoint", "words", "--checkpoint", "small", "--data", "ids"], "the model 97"),
        (["--checkpoint", "imported"], "imported/checkpoints/step_0000040 is not recorded. Name one"),
    ],
)
def test_a_mistake_is_named(
    arguments: list[str],
    message: str,
    refused: Callable[..., str],
    dataset: Callable[..., Path],
    tmp_path: Path,
):
    dataset(train_tokens=[900], n_vocab=50_257, name="ids")
    make_run(tmp_path / "runs" / "words", small_model())
    small = replace(small_model().config, n_vocab=97)
    make_run(tmp_path / "runs" / "small", small_model(small))
    make_run(tmp_path / "runs" / "imported", small_model(), dataset_sha256="")
    assert message in refused("src.model_assessment.evaluate", *arguments)
