"""What a person's mistakes meet: the message and the exit code of the real commands."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src.model_utils import checkpoint_utils
from src.utils.root import ROOT
from tests.conftest import Commands


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["debgu"], "debug, laptop, lf_llm_269m"),
        (["debug", "--train.total-step", "5"], "--train.total-steps"),
        (["debug", "--model.n-embd", "30"], "the nearest width that is: 32"),
        (["debug", "--model.n-embd", "12", "--model.n-head", "4"], "the nearest width that is: 16"),
        (["debug", "--train.batch-tokens", "1000"], "the nearest multiple is 1024"),
        (["debug", "--train.micro-batch-size", "3"], "micro_batch_size can be 1, 2 or 4"),
        (["debug", "--data.dir", "nowhere"], "find a dataset at"),
        (["debug", "--resume", "soon"], "must be auto, never or the step"),
    ],
)
def test_a_mistake_is_named_with_exit_code_2(commands: Commands, arguments: list[str], expected: str):
    result = commands.pretrain(*arguments)
    assert result.returncode == 2
    # the frame that tyro draws may break a line anywhere between words
    assert expected in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert not (commands.temp_data / "runs").exists()


def test_an_empty_dataset_folder(commands: Commands, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    result = commands.pretrain("debug", "--data.dir", str(tmp_path / "empty"))
    assert result.returncode == 2
    assert "no manifest.json" in result.stderr


def test_held_out_text_of_less_than_a_sequence(commands: Commands, dataset: Callable[..., Path]):
    folder = dataset(train_tokens=[9_000], val_tokens=100)
    result = commands.pretrain("debug", "--data.dir", str(folder))
    assert result.returncode == 2
    assert "the validation part of" in result.stderr
    assert "At least 1 are needed, or 129 tokens" in result.stderr


def test_an_output_folder_that_cannot_be_written(commands: Commands, dataset: Callable[..., Path], tmp_path: Path):
    """A file stands where the folder should be: that stops the superuser too."""
    folder = dataset(train_tokens=[9_000], val_tokens=5_000)
    (tmp_path / "runs").write_text("in the way")
    result = commands.pretrain("debug", "--data.dir", str(folder), "--eval.hellaswag-items", "0")
    assert result.returncode == 4
    assert f"Cannot write in {tmp_path / 'runs' / 'debug'}" in result.stderr


@pytest.mark.parametrize("module", ["sampling", "hellaswag"])
def test_an_unreadable_checkpoint(commands: Commands, tmp_path: Path, module: str):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000005"
    checkpoint_utils.save_checkpoint(checkpoint.parent, 5, {"model": {}}, {})
    (checkpoint / "model.safetensors").write_bytes(b"garbage")
    result = commands.module(f"src.model_assessment.{module}", "--checkpoint", str(tmp_path / "run"))
    assert result.returncode == 2
    assert "model.safetensors has 7 bytes, expected" in result.stderr
    assert "Traceback" not in result.stderr


def test_sampling_from_nowhere_and_with_odd_settings(commands: Commands):
    result = commands.module("src.model_assessment.sampling", "--checkpoint", "nowhere", "--top-p", "2")
    assert result.returncode == 2
    assert "top_p = 2.0 must be above 0 and at most 1" in result.stderr
    result = commands.module("src.model_assessment.sampling", "--checkpoint", "nowhere")
    assert result.returncode == 2
    assert "Cannot load a checkpoint" in result.stderr


def test_a_hub_that_cannot_be_reached_is_noticed_before_training(commands: Commands, dataset: Callable[..., Path]):
    folder = dataset(train_tokens=[9_000], val_tokens=5_000)
    result = commands.pretrain("debug", "--data.dir", str(folder), "--eval.hellaswag-data", "auto")
    assert result.returncode == 2
    assert "held-out" in result.stderr
    assert not (commands.temp_data / "runs").exists()


@pytest.mark.parametrize(
    "module",
    [
        "data_processing.data_downloader",
        "model_assessment.sampling",
        "model_assessment.hellaswag",
        "model_assessment.report",
    ],
)
def test_every_command_has_help(commands: Commands, module: str):
    result = commands.module(f"src.{module}", "--help")
    assert result.returncode == 0
    assert "usage: " in result.stdout


@pytest.mark.parametrize("program", [[str(ROOT / "pretrain.py")], ["-m", "src.preflight"]])
def test_ctrl_c_while_torch_is_imported_is_quiet(commands: Commands, tmp_path: Path, program: list[str]):
    """Here it comes from a module in torch's place."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    commands.environment["PYTHONPATH"] = str(tmp_path)
    result = commands.run([sys.executable, *program, "debug"])
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")
