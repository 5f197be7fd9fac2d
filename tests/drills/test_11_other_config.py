"""Drill 11: the checkpoint of another configuration; more steps for a run, and a new run from another's weights."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from tests.conftest import Commands
from tests.drills.small_run import (
    SAYING_WHEN_THE_MODEL_IS_BUILT,
    assert_same_run,
    module,
    refusal,
    start,
    start_with,
)


def test_what_differs_is_listed_and_nothing_is_loaded(commands: Commands, dataset: Callable[..., Path]):
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    assert start(commands, data).returncode == 0
    changed = ("--model.n-layer", "3", "--optim.max-lr", "0.001", "--train.seed", "7", "--train.batch-tokens", "64")
    message = refusal(commands, data, *changed, "--train.precision", "bf16")
    for line in (
        "model.n_layer: checkpoint 2, now 3",
        "optim.max_lr: checkpoint ",
        "train.seed: checkpoint 42, now 7",
        "train.batch_tokens: checkpoint 128, now 64",
        "train.precision: checkpoint torch.float32, now torch.bfloat16",
    ):
        assert f"\n  - {line}" in message
    assert message.count("\n  - ") == 5
    checkpoint = commands.temp_data / "runs/drill/checkpoints/step_0000004"
    assert f"{checkpoint}: it belongs to another configuration" in message
    assert "another --run-name, or --resume never" in message

    other = dataset(train_tokens=[700, 901], n_vocab=300, name="other")
    message = refusal(commands, other, "--resume", "2")
    refused = start_with(commands, SAYING_WHEN_THE_MODEL_IS_BUILT, data, *changed)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "\n  - data (sha256 of its manifest): checkpoint " in message
    assert message.count("\n  - ") == 1


def test_more_steps_where_the_learning_rate_has_not_begun_to_fall(commands: Commands, dataset: Callable[..., Path]):
    """As if it had been planned so from the start, to the bit; refused with the remedy where it has."""
    data, runs = dataset(train_tokens=[900, 900], n_vocab=300), commands.temp_data / "runs"
    schedule = ("--optim.decay-ratio", "0.5", "--optim.warmup-steps", "2", "--checkpoint.keep-every-steps", "2")
    assert start(commands, data, *schedule, "--train.total-steps", "6").returncode == 0
    longer = (*schedule, "--train.total-steps", "10")
    message = refusal(commands, data, *longer)
    assert "\n  - train.total_steps: checkpoint 6, now 10\n" in message
    assert (
        "fell from step 5 on, because the run was planned to end at step 6. Go back to an earlier step with --resume 4"
        in message
    )
    assert "train a new run from these weights with --init-from drill --run-name OTHER." in message
    message = refusal(commands, data, *longer, "--resume", "2", "--optim.warmup-steps", "3")
    assert "Keep the warm-up of the steps done: --optim.warmup-steps 2." in message
    assert "The run has done 6 steps already." in refusal(commands, data, *schedule, "--train.total-steps", "5")
    extended = start(commands, data, *longer, "--resume", "4")
    assert extended.returncode == 0, extended.stderr
    assert start(commands, data, *longer, "--run-name", "planned").returncode == 0
    assert_same_run(runs / "drill", runs / "planned", 10)


def test_a_new_run_from_anothers_weights(commands: Commands, dataset: Callable[..., Path]):
    """On other data, with another schedule; the new run does not need the old one once it has begun."""
    data, runs = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    assert start(commands, data).returncode == 0
    other = dataset(train_tokens=[800], n_vocab=300, name="other")
    settings = ("--run-name", "tuned", "--init-from", "drill", "--optim.max-lr", "1e-4", "--model.n-ctx", "32")
    checks = module(commands, "src.preflight", "debug", "--data.dir", str(other), *settings, *MODEL)
    assert "the weights of " in checks.stderr
    assert "step 4; training starts at step 0" in checks.stderr
    saying = start_with(commands, SAYING_THE_SUM, other, *settings)
    assert saying.returncode == 0, saying.stderr
    trained = load_file(runs / "drill/checkpoints/step_0000004/model.safetensors")["embedding.weight"]
    assert f"sum {trained.double().sum().item()}\n" in saying.stdout
    settings_of_run = json.loads((runs / "tuned/config.json").read_text())
    assert settings_of_run["config"]["init_from"] == "drill"
    assert settings_of_run["init_from"] == {"path": str(runs / "drill/checkpoints/step_0000004"), "step": 4}
    message = refusal(commands, other, *settings, "--init-from", "")
    assert "init_from: checkpoint drill, now none" in message

    wider = ("--run-name", "wider", "--init-from", "drill", "--model.n-embd", "32", "--model.bias")
    refused = start(commands, data, *wider)
    assert refused.returncode == 2
    assert "model.n_embd: 16 there, 32 here\n  - model.bias: False there, True here" in refused.stderr
    assert "Take its settings: --model.n-embd 16 --model.no-bias" in refused.stderr
    assert "The runs in " in start(commands, data, "--run-name", "x", "--init-from", "dril").stderr
    itself = start(commands, data, "--resume", "never", "--init-from", str(runs / "drill" / "checkpoints"))
    assert "it is the run drill itself. Choose another --run-name." in itself.stderr
    names = {path.name for path in runs.iterdir() if not path.name.startswith(".")}
    assert names == {"drill", "tuned"}  # no refused start leaves or moves a run
    (runs / "drill").rename(runs / "gone")
    assert start(commands, other, *settings).returncode == 0


MODEL = ("--model.n-vocab", "300", "--model.n-embd", "16", "--model.n-head", "2", "--model.n-layer", "2")
SAYING_THE_SUM = """
import pretrain
run_steps = pretrain.run_steps

def saying(run, *others):
    print("sum", run.state.model.embedding.weight.detach().double().sum().item())
    return run_steps(run, *others)

pretrain.run_steps = saying
"""
