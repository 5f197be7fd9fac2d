"""lm-evaluation-harness itself, on an exported model, gives what ours gives by its protocol, item by item."""

import gzip
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants as hub

from src.data_processing.tokenizer import load_tokenizer
from src.model_assessment.hellaswag import evaluate_lm_eval, lm_eval_endings, lm_eval_texts, questions, score_endings
from src.model_assessment.hellaswag_items import Item, load_items
from src.model_utils.hf_export import export
from tests.model_utils.exports import SHAPE, make_run, small_model

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval, of requirements-dev.txt")
lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

TIE = 1e-4  # nats, a sum or a character: far above rounding in float32, far below what tells endings apart


def lm_evals(folder: Path, items: Path) -> dict[str, Any]:
    """lm-eval's results for the exported model in `folder`: its own task, but with local data."""
    task = Path(lm_eval_tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    (items.parent / "local.yaml").write_text(
        f"include: {task}\n"
        "task: hellaswag_local\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {items}}}, cache_dir: {items.parent / 'cache'}}}\n"
        "training_split: null\n"
    )
    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=["hellaswag_local"],
        task_manager=lm_eval_tasks.TaskManager(include_path=str(items.parent), include_defaults=False),
        device="cpu",
        batch_size=1,
    )


def test_every_item_gets_the_same_answer(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some items of the real file, of which a few do not fit into the model's context."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    path = tmp_path / "items.jsonl"
    with gzip.open(shared / "eval" / "hellaswag_val.jsonl.gz", "rt", encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, 0, None, 250)), encoding="utf-8")
    items, encode = load_items(path), load_tokenizer().encode
    model = small_model(replace(SHAPE, n_ctx=112))
    asked = questions(items, lm_eval_texts, encode)
    too_long = [len(context) + max(map(len, endings)) > 113 for context, endings in asked]
    assert len(items) == 41
    assert 1 < sum(too_long) < 20

    export(make_run(tmp_path / "run", model), tmp_path / "export", "hf", "float32")
    theirs = lm_evals(tmp_path / "export", path)
    scores = score_endings(model, asked)
    ties = {"acc": 0, "acc_norm": 0}
    for sample in theirs["samples"]["hellaswag_local"]:
        i = sample["doc_id"]
        sums = np.array(scores[i])
        np.testing.assert_allclose([score for score, _ in sample["filtered_resps"]], sums, rtol=1e-5, atol=1e-3)
        for name, values in (("acc", sums), ("acc_norm", sums / [len(ending) for ending in lm_eval_endings(items[i])])):
            first, second = np.sort(values)[:-3:-1]
            if first - second < TIE:
                ties[name] += 1
            else:
                assert sample[name] == float(np.argmax(values) == items[i].label), (name, items[i].ind)

    ours = evaluate_lm_eval(model, items, encode)
    assert_equal_but_for(ties, ours, theirs["results"]["hellaswag_local"], items)


def assert_equal_but_for(ties: dict[str, int], ours: dict[str, Any], theirs: dict[str, Any], items: list[Item]) -> None:
    for name, tied in ties.items():
        assert tied <= 2
        share, stderr = ours[name], ours[f"{name}_stderr"]
        assert abs(share - theirs[f"{name},none"]) * len(items) <= tied + 1e-6
        if not tied:
            assert stderr == pytest.approx(theirs[f"{name}_stderr,none"], rel=1e-6)
        assert 0.1 < share < 0.5  # neither all nor nothing, of which anything would be equal
