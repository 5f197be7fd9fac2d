"""Whole runs with losses and gradients that are not finite, or jump."""

import json
from dataclasses import replace

import pytest
import torch

import pretrain
from pretrain import train
from src.model import LLM
from src.params import Config
from src.utils.errors import NonFiniteError
from tests.whole_runs.records import assert_same_bits, final_tensors, stop_after


def poison_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every training loss NaN, and leaves evaluations unchanged."""
    forward = LLM.forward

    def poisoned(self, inputs, targets=None):
        loss = forward(self, inputs, targets)
        return loss * float("nan") if self.training else loss

    monkeypatch.setattr(LLM, "forward", poisoned)


def test_a_run_whose_last_steps_are_skipped_is_done_and_has_the_weights_before(
    config: Config, monkeypatch: pytest.MonkeyPatch
):
    run_dir = train(config, stop_after(10)).run_dir
    before = final_tensors(run_dir, step=10)
    poison_losses(monkeypatch)
    outcome = train(config)
    assert (outcome.step, outcome.exit_code) == (12, 0)
    after = final_tensors(run_dir, step=12)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if not name.startswith("rank"))
    assert "the last 2 step(s) were skipped, so the weights are those of step 10" in (run_dir / "log.txt").read_text()


def test_a_run_all_of_whose_steps_are_skipped_has_failed(config: Config, monkeypatch: pytest.MonkeyPatch):
    poison_losses(monkeypatch)
    short = replace(config, train=replace(config.train, total_steps=3), optim=replace(config.optim, warmup_steps=1))
    for _ in range(2):  # started again, it is not done either
        with pytest.raises(NonFiniteError, match=r"the last 3 step\(s\), up to step 3"):
            train(short)


def test_a_stop_among_skipped_steps_is_saved_and_they_are_counted_on(config: Config, monkeypatch: pytest.MonkeyPatch):
    poison_losses(monkeypatch)
    monkeypatch.setattr(pretrain, "MAX_SKIPPED_STEPS", 3)
    stopped = train(config, stop_after(2))
    assert (stopped.step, stopped.exit_code) == (2, 143)
    with pytest.raises(NonFiniteError, match=r"the last 3 step\(s\), up to step 3"):
        train(config)


def test_a_loss_spike_is_skipped_and_the_guard_resumes_after_a_stop(config: Config, monkeypatch: pytest.MonkeyPatch):
    """The loss of step 31 is 40 nats too high, for which the guard needs the losses before the stop."""
    forward, steps = LLM.forward, {"done": 0}

    def jumping(self, inputs_BT, targets_BT):
        loss = forward(self, inputs_BT, targets_BT)
        return loss + 40.0 * (self.training and steps["done"] == 30)

    step = pretrain.train_step

    def counted(run, batches):
        steps["done"] = run.state.progress.step
        return step(run, batches)

    monkeypatch.setattr(LLM, "forward", jumping)
    monkeypatch.setattr(pretrain, "train_step", counted)
    longer = replace(config.train, total_steps=36)
    guarded = replace(config, train=longer, optim=replace(config.optim, spike_z=6.0))
    whole = train(guarded)
    (event,) = [r for r in map(json.loads, (whole.run_dir / "metrics.jsonl").open()) if r.get("name") == "skipped step"]
    assert event["step"] == 31
    assert event["detail"].startswith("a spike: loss 4")
    assert len(event["windows"]) == guarded.batch_size
    assert all(shard in (1, 2) for shard, _ in event["windows"])  # 0 is the validation shard
    halved = replace(guarded, run_name="halved")
    assert train(halved, stop_after(25)).step == 25
    outcome = train(halved)
    assert_same_bits(whole.run_dir, outcome.run_dir, step=36)
    unguarded = train(replace(guarded, run_name="unguarded", optim=config.optim))
    assert "skipped step" not in (unguarded.run_dir / "metrics.jsonl").read_text()
