"""Drill 38: JSON of a run and its checkpoints, made by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from src.model_utils.checkpoint_utils import damage
from tests.conftest import Commands
from tests.drills.small_run import refusal, rewrite, start

DEEP = "[" * 100_000
STATES = {
    "a list": "[]",
    "deep": DEEP,
    "cut off": '{"step": 4, ',
    "infinite": '"loss_sum": 1e999',
    "not a number": '"loss_sum": NaN',
    "a text for a number": '"seconds": "long"',
    "a number of steps as text": '"step": "4"',
    "more processes than there are": '"world_size": 4000000000000',
    "processes below one": '"world_size": -1',
    "no progress": '"progress": []',
    "a type that is none": '"precision": "torch.nn"',
    "a hash that is none": '"dataset_sha256": 5',
    "a width as text": '"n_embd": "wide"',
    "a width beyond all": '"n_embd": 9007199254740993',
    "a step beyond the end": '"total_steps": 3',
    "an unknown setting": '"n_heads": 4',
    "half a character": '"torch": "\\ud800"',
}
MANIFESTS = (
    "[]",
    DEEP,
    '{"step": 4, "files": []}',
    '{"step": "4", "files": {}}',
    '{"step": 1e999, "files": {}}',
    '{"step": 4, "files": {"state.json": 4}}',
    '{"step": 4, "files": {"state.json": {"bytes": "9", "sha256": []}}}',
    "4",
    "",
)


def with_entry(value: object, name: str, entry: str) -> str:
    """JSON in which the entry, at whatever depth it has that name, is the given text."""
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)}: {with_entry(inner, name, entry)}" for key, inner in value.items() if key != name]
        here = [entry] if name in value or (name == "n_heads" and "n_head" in value) else []
        return "{" + ", ".join(here + pairs) + "}"
    return json.dumps(value)


@pytest.fixture
def data(commands: Commands, dataset: Callable[..., Path]) -> Path:
    """And the run `drill` on it, finished."""
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    assert start(commands, data).returncode == 0
    return data


def test_the_checkpoint_before_is_used(commands: Commands, data: Path) -> None:
    runs = commands.temp_data / "runs"
    state = json.loads((runs / "drill" / "checkpoints" / "step_0000004" / "state.json").read_text())
    cases: list[tuple[str, str]] = [("manifest.json", text) for text in MANIFESTS]
    for text in STATES.values():
        is_entry = text.startswith('"')
        cases.append(("state.json", with_entry(state, text.split('"')[1], text) if is_entry else text))
    for number, (name, text) in enumerate(cases):
        run = runs / f"case_{number}"
        shutil.copytree(runs / "drill", run)
        path = run / "checkpoints" / "step_0000004" / name
        if name == "manifest.json":
            path.write_text(text)
        else:
            rewrite(path, text)
        found = damage(path.parent)
        assert found, (name, text[:100])
        if number % 4 == 1:  # the program says so, and a start takes a second
            result = start(commands, data, "--run-name", run.name)
            assert result.returncode == 0, (text[:100], result.stderr)
            assert "resume: from step_0000002 of 4 steps" in result.stderr, text[:100]
            assert f"skipped a damaged checkpoint: {path.parent}: {found.splitlines()[0]}" in result.stderr
            assert "Traceback" not in result.stderr
        shutil.rmtree(run)


def test_if_it_is_named_the_start_is_refused(commands: Commands, data: Path) -> None:
    path = commands.temp_data / "runs" / "drill" / "checkpoints" / "step_0000004" / "state.json"
    rewrite(path, DEEP)
    assert str(path) in refusal(commands, data, "--resume", "4")


@pytest.mark.parametrize("text", ["[]", DEEP, '{"state": {"a": 1e999}}', '{"launch": [1]}', '"done"', ""])
def test_status_and_settings_of_an_earlier_start_may_hold_anything(commands: Commands, data: Path, text: str) -> None:
    run = commands.temp_data / "runs" / "drill"
    shutil.rmtree(run / "checkpoints" / "step_0000004")
    for name in ("status.json", "config.json"):
        (run / name).write_text(text)
    with open(run / "metrics.jsonl", "a") as log:
        for line in (text, '{"kind": ["train"], "step": 1}', '{"kind": "train", "step": 1e999}', "[1]"):
            log.write(line + "\n")
    result = start(commands, data)
    assert result.returncode == 0, result.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if record["kind"] == "train"] == [1, 2, 3, 4]
