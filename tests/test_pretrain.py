"""Whole runs, small ones: what resuming, several processes and bad numbers may not change."""

import gzip
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretrain
from pretrain import Outcome, train
from src import run_log
from src.model import LLM
from src.model_utils import checkpoint_utils
from src.model_utils.adamw_opt import optimizer_tensors
from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from src.utils.errors import BusyError, NonFiniteError, StorageError, UserError
from src.utils.run_directory import claimed

STEPS = 12


@pytest.fixture
def config(dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Config:
    """A run of 12 steps of a tiny model with dropout, checkpoints at 5 and 10, validation at 0, 4, 8 and 12."""
    monkeypatch.setattr(pretrain, "RUNS", tmp_path / "runs")
    return Config(
        run_name="whole",
        model=ModelConfig(n_vocab=300, n_ctx=16, n_embd=16, n_head=2, n_layer=2),
        data=DataConfig(dir=str(dataset(train_tokens=[700, 900], n_vocab=300))),
        optim=OptimConfig(max_lr=5e-3, warmup_steps=3),
        train=TrainConfig(
            total_steps=STEPS,
            batch_tokens=8 * 16,
            micro_batch_size=4,
            precision="float32",
            device="cpu",
            log_every_steps=3,
        ),
        eval=EvalConfig(val_every_steps=4, val_tokens=160, hellaswag_items=0),
        checkpoint=CheckpointConfig(every_steps=5),
    )


def stop_after(steps: int) -> Callable[[], bool]:
    """Says stop when asked before step `steps` + 1; the run asks once or twice a step."""
    original, counted = torch.optim.AdamW.step, itertools.count(1)
    done = {"steps": 0}

    def counting_step(self, *arguments, **options):
        done["steps"] = next(counted)
        return original(self, *arguments, **options)

    torch.optim.AdamW.step = counting_step  # type: ignore[method-assign]
    return lambda: done["steps"] >= steps


@pytest.fixture(autouse=True)
def restore_optimizer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.AdamW.step)


def metrics(run_dir: Path, kind: str | None = None) -> list[dict]:
    """The records, without what differs between two runs on one machine: times and sizes."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timing = {"time", "seconds", "held_up_seconds", "tokens_per_second", "step_ms", "memory_gb"}
    timing.add("bytes")  # state.json holds seconds
    kept = [{k: v for k, v in record.items() if k not in timing} for record in records]
    # a checkpoint's record comes whenever it is saved
    kept.sort(key=lambda record: (record["kind"] == "checkpoint", record["step"]))
    return [record for record in kept if kind in (None, record["kind"]) and record["kind"] != "event"]


def final_tensors(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:07d}"
    files = ("model", "optimizer", "rank_00000")
    # cloned, because the tensors are mapped from files that a test may damage
    return {f"{file}/{k}": v.clone() for file in files for k, v in load_file(folder / f"{file}.safetensors").items()}


def assert_same_bits(one: Path, other: Path, step: int = STEPS) -> None:
    a, b = final_tensors(one, step), final_tensors(other, step)
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


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


@pytest.mark.parametrize("k", [1, 5, 7])  # before the first checkpoint, at one, between two and between log lines
def test_stopped_and_started_again_equals_uninterrupted(config: Config, k: int):
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


def test_another_configuration_is_refused_and_nothing_moves(config: Config):
    run_dir = train(config).run_dir
    before = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    other = replace(
        config,
        model=replace(config.model, n_layer=3),
        optim=replace(config.optim, max_lr=1e-3),
        train=replace(config.train, total_steps=20),
    )
    with pytest.raises(UserError) as caught:
        train(other)
    for line in (
        "model.n_layer: checkpoint 2, now 3",
        "optim.max_lr: checkpoint 0.005, now 0.001",
        "train.total_steps",
    ):
        assert line in str(caught.value)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == before


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


def test_going_on_from_an_earlier_step(config: Config):
    run_dir = train(config).run_dir
    final = final_tensors(run_dir)
    assert train(replace(config, resume="10")).exit_code == 0
    assert all(torch.equal(tensor, final[name]) for name, tensor in final_tensors(run_dir).items())
    assert (run_dir / "checkpoints" / "step_0000012.set-aside-1").is_dir()
    with pytest.raises(UserError, match=r"no checkpoint .*; steps that have one: 10, 12"):
        train(replace(config, resume="11"))


def test_a_damaged_newest_checkpoint_is_passed_over(config: Config):
    run_dir = train(config).run_dir
    final = final_tensors(run_dir)
    damaged = run_dir / "checkpoints" / "step_0000012" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step_0000012: model\.safetensors has \d+ bytes, expected"):
        train(replace(config, resume="12"))
    assert train(config).exit_code == 0
    assert all(torch.equal(tensor, final[name]) for name, tensor in final_tensors(run_dir).items())
    events = [r for r in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "event"]
    assert any("model.safetensors" in event["detail"] for event in events)


def poison_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every training loss NaN, and leaves evaluations as they are."""
    forward = LLM.forward

    def poisoned(self, inputs, targets=None):
        loss = forward(self, inputs, targets)
        return loss * float("nan") if self.training else loss

    monkeypatch.setattr(LLM, "forward", poisoned)


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(config: Config, monkeypatch: pytest.MonkeyPatch):
    every_step = replace(config, checkpoint=CheckpointConfig(every_steps=1))
    run_dir = train(every_step, stop_after(5)).run_dir
    before = final_tensors(run_dir, step=5)
    seen: list[dict[str, torch.Tensor]] = []
    record_skip = pretrain.record_skip

    def spy(run, *arguments):
        tensors = {f"model/{k}": v.clone() for k, v in run.state.model.state_dict().items()}
        optimizer = optimizer_tensors(run.state.model, run.state.optimizer)
        seen.append(tensors | {f"optimizer/{k}": v.clone() for k, v in optimizer.items()})
        record_skip(run, *arguments)

    monkeypatch.setattr(pretrain, "record_skip", spy)
    monkeypatch.setattr(run_log, "MAX_SKIPPED_STEPS", 3)
    poison_losses(monkeypatch)
    with pytest.raises(NonFiniteError, match=r"the last 3 step\(s\), up to step 8") as caught:
        train(every_step)
    assert caught.value.exit_code == 3
    assert len(seen) == 3
    for tensors in seen:
        assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_0000004", "step_0000005"]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("name") == "skipped step"] == [6, 7, 8]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 3, 8)


def test_a_run_whose_last_steps_are_not_finite_has_failed(config: Config, monkeypatch: pytest.MonkeyPatch):
    run_dir = train(config, stop_after(10)).run_dir
    poison_losses(monkeypatch)
    with pytest.raises(NonFiniteError, match=r"the last 2 step\(s\), up to step 12"):
        train(config)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_0000005", "step_0000010"]


def test_two_runs_cannot_share_a_directory(config: Config):
    with claimed(pretrain.RUNS / "whole"), pytest.raises(BusyError, match='"pid":'):
        train(config)
    assert train(config).exit_code == 0


def test_a_vocabulary_too_small_for_the_data(config: Config):
    with pytest.raises(UserError, match=r"set --model\.n-vocab 300"):
        train(replace(config, model=replace(config.model, n_vocab=299)))


def test_too_little_validation_data(config: Config, dataset: Callable[..., Path]):
    short = dataset(train_tokens=[700], val_tokens=60, n_vocab=300, name="short")
    with pytest.raises(UserError, match=r"the validation part of .* holds 60 tokens: 3 windows"):
        train(replace(config, data=DataConfig(dir=str(short))))


def test_a_gradient_that_is_not_finite_is_named(config: Config, monkeypatch: pytest.MonkeyPatch):
    original = LLM.__init__

    def poisoned(self, *arguments):
        original(self, *arguments)
        self.get_parameter("blocks.1.ffn.out_proj.bias").register_hook(lambda gradient: gradient * float("inf"))

    monkeypatch.setattr(LLM, "__init__", poisoned)
    monkeypatch.setattr(run_log, "MAX_SKIPPED_STEPS", 1)
    with pytest.raises(NonFiniteError):
        train(config)
    text = (pretrain.RUNS / "whole" / "metrics.jsonl").read_text()
    assert "not finite in 1 gradients, first blocks.1.ffn.out_proj.bias" in text


def test_a_loss_spike_is_skipped_and_the_guard_goes_on_after_a_stop(config: Config, monkeypatch: pytest.MonkeyPatch):
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
    with pytest.raises(StorageError, match="the checkpoint of step 5 could not be saved"):
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


def test_another_precision_is_refused_and_another_micro_batch_is_noted(config: Config):
    run_dir = train(config, stop_after(5)).run_dir
    with pytest.raises(UserError, match=r"train\.precision: checkpoint torch\.float32, now torch\.bfloat16"):
        train(replace(config, train=replace(config.train, precision="bf16")))
    assert train(replace(config, train=replace(config.train, micro_batch_size=8))).exit_code == 0
    assert "micro-batch 8 instead of 4" in (run_dir / "log.txt").read_text()


def test_too_little_memory_says_what_to_do(config: Config, monkeypatch: pytest.MonkeyPatch):
    def exhausted(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB.\nand more lines")

    monkeypatch.setattr(LLM, "forward", exhausted)
    asked = replace(config, eval=replace(config.eval, val_every_steps=100), train=replace(config.train, compile="off"))
    monkeypatch.setattr(pretrain.Assessment, "due", lambda *_: [])
    with pytest.raises(UserError, match=r"out of memory on cpu in step 1, with a micro-batch of 4 .* 3.07 GiB. Start"):
        train(asked)
    status = json.loads((pretrain.RUNS / "whole" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def test_what_is_chosen_at_the_start_is_kept_when_the_run_goes_on(config: Config):
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
    assert "micro-batch: 2 (as this run has had it)" in (pretrain.RUNS / "other" / "log.txt").read_text()


def test_a_profile_of_some_steps_lies_in_the_run(config: Config):
    run_dir = train(replace(config, profile=3)).run_dir
    names = sorted(path.name for path in (run_dir / "profile").iterdir())
    assert names == ["steps_0000003_to_0000005.json.gz", "steps_0000003_to_0000005.txt"]
    with gzip.open(run_dir / "profile" / names[0]) as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) == 3
    assert any(event["name"] == "aten::mm" for event in events)
    assert "aten::mm" in (run_dir / "profile" / names[1]).read_text()


def test_a_profile_is_named_after_the_steps_it_holds(config: Config):
    run_dir = train(replace(config, profile=100)).run_dir
    assert (run_dir / "profile" / f"steps_0000003_to_{STEPS:07d}.txt").exists()
