"""Whole runs: what is chosen or recorded at their start."""

import gzip
import json
from dataclasses import replace

import pytest
import torch

import pretrain
from pretrain import train
from src.model import LLM
from src.params import Config
from src.utils.errors import UserError
from tests.whole_runs.records import STEPS, stop_after


def test_another_precision_is_refused_and_another_micro_batch_is_noted(config: Config):
    run_dir = train(config, stop_after(5)).run_dir
    with pytest.raises(UserError, match=r"train\.precision: checkpoint torch\.float32, now torch\.bfloat16"):
        train(replace(config, train=replace(config.train, precision="bf16")))
    assert train(replace(config, train=replace(config.train, micro_batch_size=8))).exit_code == 0
    assert "the same samples, but not the same bits" in (run_dir / "log.txt").read_text()


def test_a_stop_in_the_last_step_says_what_is_left(config: Config):
    stopped = train(config, stop_after(STEPS))
    assert (stopped.step, stopped.exit_code) == (STEPS, 143)
    message = json.loads((stopped.run_dir / "status.json").read_text())["message"]
    assert message.endswith(". All steps are done; rerun to add validation")
    assert train(config).exit_code == 0


def test_too_little_memory_says_what_to_do(config: Config, monkeypatch: pytest.MonkeyPatch):
    def exhausted(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB.\nand more lines")

    monkeypatch.setattr(LLM, "forward", exhausted)
    asked = replace(config, eval=replace(config.eval, val_every_steps=100), train=replace(config.train, compile="off"))
    monkeypatch.setattr(pretrain.Assessment, "missing", lambda *_: [])
    with pytest.raises(UserError, match=r"Cannot finish step 1: out of memory on cpu, .* 3.07 GiB. Rerun"):
        train(asked)
    status = json.loads((pretrain.RUNS / "whole" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def test_choices_of_the_start_are_kept_at_a_resume(config: Config):
    """Micro-batch and precision are auto, and another start would choose otherwise."""
    auto = replace(config, train=replace(config.train, micro_batch_size="auto", precision="auto"))
    train(auto, stop_after(5))
    run_dir = pretrain.RUNS / "whole"
    saved = json.loads((run_dir / "config.json").read_text())
    chosen = saved["config"]["train"]["micro_batch_size"]
    assert chosen == 8  # all of a step's sequences fit
    other = replace(config, train=replace(config.train, micro_batch_size=2))
    assert train(replace(other, run_name="other"), stop_after(5)).step == 5
    other_auto = replace(other, run_name="other", train=auto.train)
    assert train(other_auto).exit_code == 0
    assert json.loads((pretrain.RUNS / "other" / "config.json").read_text())["config"]["train"]["micro_batch_size"] == 2
    assert "micro-batch: 2 (as in the checkpoint)" in (pretrain.RUNS / "other" / "log.txt").read_text()


def test_a_profile_of_some_steps_lies_in_the_run(config: Config):
    run_dir = train(replace(config, profile=3)).run_dir
    names = sorted(path.name for path in (run_dir / "profile").iterdir())
    assert names == ["steps_0000003_to_0000005.json.gz", "steps_0000003_to_0000005.txt"]
    with gzip.open(run_dir / "profile" / names[0]) as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) == 3
    assert any(event["name"] == "aten::mm" for event in events)
    assert "aten::mm" in (run_dir / "profile" / names[1]).read_text()
