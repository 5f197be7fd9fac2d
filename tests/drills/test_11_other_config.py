"""Drill 11: the checkpoint of another configuration."""

from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import SAYING_WHEN_THE_MODEL_IS_BUILT, refusal, start, start_with


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
    assert (
        f"{commands.temp_data / 'runs/drill/checkpoints/step_0000004'}: it belongs to another configuration" in message
    )
    assert "another --run-name, or --resume never" in message

    other = dataset(train_tokens=[700, 901], n_vocab=300, name="other")
    message = refusal(commands, other, "--resume", "2")
    refused = start_with(commands, SAYING_WHEN_THE_MODEL_IS_BUILT, data, *changed)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "\n  - data (sha256 of its manifest): checkpoint " in message
    assert message.count("\n  - ") == 1
