"""Small whole runs: the files they leave, and results that stopping and resuming must not change."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pretrain
from pretrain import Outcome, train
from src.model import LLM
from src.model_utils import checkpoint_utils
from src.params import CheckpointConfig, Config, DataConfig
from src.utils import files
from src.utils.errors import BusyError, StorageError, UserError
from src.utils.files import claimed
from tests.whole_runs.records import STEPS, assert_same_bits, final_tensors, metrics, stop_after


def test_a_run_leaves_what_the_interface_promises(config: Config):
    outcome = train(config)
    assert outcome == Outcome(outcome.run_dir, STEPS, 0)
    names = {path.name for path in outcome.run_dir.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "log.txt", "status.json", "checkpoints"}
    assert [r["step"] for r in metrics(outcome.run_dir, "train")] == [3, 6, 9, 12]
    assert [r["step"] for r in metrics(outcome.run_dir, "validation")] == [0, 4, 8, 12]
    assert [r["step"] for r in metrics(outcome.run_dir, "checkpoint")] == [5, 10, 12]
    assert sorted(p.name for p in (outcome.run_dir / "checkpoints").iterdir()) == ["step_0000010", "step_0000012"]
    status = json.loads((outcome.run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, STEPS)
    saved = json.loads((outcome.run_dir / "config.json").read_text())
    assert saved["derived"]["parameters"] == sum(p.numel() for p in LLM(config.model).parameters())
    assert saved["derived"]["grad_accumulation_steps"] == 2
    assert saved["config"]["train"]["micro_batch_size"] == 4


def test_the_logged_loss_is_the_mean_since_the_last_line(config: Config):
    every = replace(config, run_name="every", train=replace(config.train, log_every_steps=1))
    single = [r["loss"] for r in metrics(train(every).run_dir, "train")]
    means = [r["loss"] for r in metrics(train(config).run_dir, "train")]
    assert means == pytest.approx([sum(single[i : i + 3]) / 3 for i in range(0, STEPS, 3)], rel=1e-12)
    assert single[-1] < single[0]


@pytest.mark.parametrize("k", [1, 7])  # before the first checkpoint, and between two and between log lines
@pytest.mark.parametrize("is_fast", [False, True])
def test_stopped_and_started_again_equals_uninterrupted(config: Config, k: int, is_fast: bool):
    if is_fast:
        model = replace(config.model, bias=False, qk_norm=True, zero_init=True)
        optim = replace(config.optim, optimizer="muon", embedding_lr=3e-3, schedule="linear", decay_ratio=0.5)
        config = replace(config, model=model, optim=optim)
    whole = train(config)
    halved = replace(config, run_name="halved")
    outcome = train(halved, stop_after(k))
    assert (outcome.step, outcome.exit_code) == (k, 143)
    assert json.loads((outcome.run_dir / "status.json").read_text())["state"] == "stopped"
    assert train(halved).exit_code == 0
    assert_same_bits(whole.run_dir, outcome.run_dir)
    measured = [[r for r in metrics(run) if r["kind"] != "checkpoint"] for run in (whole.run_dir, outcome.run_dir)]
    assert measured[0] == measured[1]


def test_a_kill_loses_only_steps_after_the_checkpoint(config: Config):
    """The process dies at once, in the middle of step 8 and of writing a line."""
    whole = train(config)
    killed = replace(config, run_name="killed")

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    stop = stop_after(7)
    with pytest.raises(Killed):
        train(killed, lambda: stop() and die())
    run_dir = whole.run_dir.with_name("killed")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 8, "lo')
    assert train(killed).exit_code == 0
    assert_same_bits(whole.run_dir, run_dir)
    assert metrics(whole.run_dir) == metrics(run_dir)


def test_dropout_is_part_of_what_is_resumed(config: Config):
    """The equality above would hold for a lost random state if dropout changed nothing."""
    without = replace(config, model=replace(config.model, residual_dropout=0.0, ffn_dropout=0.0), run_name="without")
    losses = [[r["loss"] for r in metrics(train(c).run_dir, "train")] for c in (config, without)]
    assert losses[0] != losses[1]


def test_a_finished_run_does_nothing(config: Config):
    run_dir = train(config).run_dir
    before = {
        p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name in ("metrics.jsonl", "state.json")
    }
    assert train(config) == Outcome(run_dir, STEPS, 0)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_other_data_is_refused(config: Config, dataset: Callable[..., Path]):
    train(config)
    other = dataset(train_tokens=[700, 901], n_vocab=300, name="other")
    with pytest.raises(UserError, match=r"data \(sha256 of its manifest\)"):
        train(replace(config, data=DataConfig(dir=str(other))))


def test_settings_that_change_no_loss_may_change(config: Config):
    run_dir = train(config, stop_after(5)).run_dir
    changed = replace(
        config, train=replace(config.train, log_every_steps=1), checkpoint=CheckpointConfig(every_steps=3)
    )
    assert train(changed).exit_code == 0
    assert [r["step"] for r in metrics(run_dir, "train")] == [3, 6, 7, 8, 9, 10, 11, 12]


def test_never_sets_the_old_run_aside(config: Config):
    run_dir = train(config).run_dir
    assert train(replace(config, resume="never")).exit_code == 0
    aside = run_dir.with_name("whole.set-aside-1")
    assert_same_bits(run_dir, aside)
    assert len(metrics(run_dir)) == len(metrics(aside))


def test_resuming_from_an_earlier_step(config: Config):
    run_dir = train(config).run_dir
    final = final_tensors(run_dir)
    assert train(replace(config, resume="10")).exit_code == 0
    assert all(torch.equal(tensor, final[name]) for name, tensor in final_tensors(run_dir).items())
    assert (run_dir / "checkpoints" / "step_0000012.set-aside-1").is_dir()
    with pytest.raises(UserError, match=r"step_0000011 does not exist. Steps with a checkpoint: 10, 12"):
        train(replace(config, resume="11"))


def test_two_runs_cannot_share_a_directory(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "PATIENCE_S", 0.1)
    with claimed(pretrain.RUNS / "whole"), pytest.raises(BusyError, match='"pid":'):
        train(config)
    assert train(config).exit_code == 0


def test_a_vocabulary_too_small_for_the_data(config: Config):
    with pytest.raises(UserError, match=r"Set --model\.n-vocab 300"):
        train(replace(config, model=replace(config.model, n_vocab=299)))


def test_the_stop_file_stops_and_is_taken_away(config: Config):
    never_stopped = replace(config, checkpoint=replace(config.checkpoint, every_steps=100))
    run_dir = train(never_stopped, stop_after(3)).run_dir
    (run_dir / "STOP").touch()
    outcome = train(never_stopped)
    assert (outcome.step, outcome.exit_code) == (3, 143)
    assert not (run_dir / "STOP").exists()
    assert "(the file STOP)" in json.loads((run_dir / "status.json").read_text())["message"]
    assert train(never_stopped).exit_code == 0


def test_a_save_that_fails_in_the_background_ends_the_run(config: Config, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_utils, "save_file", full)
    with pytest.raises(StorageError, match="Cannot save the checkpoint of step 5"):
        train(config)
    status = json.loads((pretrain.RUNS / "whole" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert status["step"] < 10  # not only at the next save


def test_a_refused_start_leaves_the_status_of_the_run(config: Config):
    run_dir = train(config).run_dir
    before = (run_dir / "status.json").read_bytes()
    with pytest.raises(UserError):
        train(replace(config, optim=replace(config.optim, max_lr=1e-3)))
    assert (run_dir / "status.json").read_bytes() == before


def test_a_run_stopped_at_the_last_step_ends_once_all_is_measured(config: Config):
    """A run preempted during its last evaluation is measured when it resumes, and changes nothing else."""
    stopped = train(config, stop_after(STEPS))
    assert (stopped.exit_code, stopped.step) == (143, STEPS)
    assert json.loads((stopped.run_dir / "status.json").read_text())["state"] == "stopped"
    assert [record["step"] for record in metrics(stopped.run_dir, "validation")] == [0, 4, 8]
    done = train(config)
    assert done.exit_code == 0
    assert json.loads((done.run_dir / "status.json").read_text())["state"] == "done"
    whole = train(replace(config, run_name="uninterrupted")).run_dir
    assert metrics(done.run_dir, "validation") == metrics(whole, "validation")
    assert metrics(done.run_dir, "train") == metrics(whole, "train")
    assert_same_bits(done.run_dir, whole)
    assert train(config).exit_code == 0
    assert metrics(done.run_dir, "validation") == metrics(whole, "validation")
