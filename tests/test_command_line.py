"""What a person's mistakes meet: the message and the exit code of the real commands."""

import importlib
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from src.model_configs.my_llm_config import PRESETS, config_from_command_line
from src.model_utils import checkpoint_utils
from src.params import ConfigError
from src.utils.errors import UserError
from src.utils.root import ROOT
from tests.conftest import Commands


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["debug", "--train.total-step", "5"], "Perhaps you mean --train.total-steps"),
        (["debug", "--model.n-embd", "30"], "the nearest width that is: 32"),
        (["debug", "--train.micro-batch-size", "3", "--data.dir", "nowhere"], "micro_batch_size can be 1, 2 or 4"),
        (["debug", "--data.dir", "nowhere"], "find a dataset at"),
        (
            ["debug", "--resume", "soon", "--run-name", "a/b"],
            "run_name = 'a/b' must be a plain folder name\n  - resume = 'soon' must be auto, never or the step",
        ),
    ],
)
def test_a_mistake_is_named_with_exit_code_2(commands: Commands, arguments: list[str], expected: str):
    result = commands.pretrain(*arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert result.stderr.startswith("pretrain.py: error: ")  # no frame of the parser's
    assert "Traceback" not in result.stderr
    assert not (commands.temp_data / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("debgu", "Cannot find the preset 'debgu'. Choose one of: debug, laptop, lf_llm_269m, lf_llm_269m_fast."),
        ("--preset debug", "the preset comes first, alone. Type: python pretrain.py debug ..."),
        (
            "debug --train.seed 1 book.txt",
            "Cannot use 'book.txt' here. Plain arguments, such as texts, come before options.",
        ),
        ("--train.seed 1", "The preset is missing. Type: python pretrain.py PRESET"),
        ("debug --max-lr 1e-3", "Cannot find the option --max-lr. Perhaps you mean --optim.max-lr."),
        ("debug --lr 1", "Perhaps you mean --optim.max-lr or "),
        ("debug --data my_texts", "Perhaps you mean --data.dir or "),
        ("debug --model.bias=false", "Leave it out, or turn it off with --model.no-bias."),
    ],
)
def test_a_mistake_in_the_settings_is_one_line_without_pythons_words(
    arguments: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments.split()])
    with pytest.raises(UserError) as raised:
        config_from_command_line("")
    assert expected in str(raised.value)
    assert len(str(raised.value)) < 160


def test_all_values_that_cannot_work_are_named(monkeypatch: pytest.MonkeyPatch):
    wrong = "--train.total-steps 1.5 --train.seed=1e99 --optim.max-lr x --train.micro-batch-size x --report-to y"
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "debug", *wrong.split()])
    with pytest.raises(ConfigError) as raised:
        config_from_command_line("")
    assert sorted(raised.value.problems) == [
        "optim.max_lr = 'x' must be a number",
        "report_to = ('y',) must be a list of: tensorboard or wandb",
        "train.micro_batch_size = 'x' must be a whole number or auto",
        "train.seed = '1e99' must be a whole number",
        "train.total_steps = '1.5' must be a whole number or None",
    ]


def test_a_mistyped_option_of_a_command_is_named(refused: Callable[..., str]):
    message = refused("src.model_assessment.sampling", "--checkpoint", "mine", "The", "--temprature", "2")
    assert message == "Cannot find the option --temprature. Perhaps you mean --temperature."
    message = refused("src.data_processing.data_downloader", "--source", "pydocs", "--qqqq")
    assert message.endswith("List all with: python -m src.data_processing.data_downloader --help.")


def test_settings_are_read_by_their_type(monkeypatch: pytest.MonkeyPatch):
    given = "--train.total_tokens 1e6 --train.seed=2.5e1 --optim.max-lr 1e-3 --run-name 1e3 --model.bias --optim.eps 1"
    given += " --model.no-qk-norm --eval.sample-prompts a b --optim.embedding-lr None --report-to --optim.momentum .5"
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "debug", *given.split()])
    config, preset = config_from_command_line(""), PRESETS["debug"]()
    assert config == replace(
        preset,
        run_name="1e3",
        model=replace(preset.model, bias=True, qk_norm=False),
        optim=replace(preset.optim, max_lr=1e-3, eps=1.0, embedding_lr=None, momentum=0.5),
        train=replace(preset.train, total_tokens=1_000_000, seed=25),
        eval=replace(preset.eval, sample_prompts=("a", "b")),
    )


@pytest.mark.parametrize("arguments", [["--help"], ["debug", "--help"]])
def test_help_lists_every_setting(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    with pytest.raises(SystemExit) as end:
        config_from_command_line("Train.")
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--train.total-tokens VALUE Tokens to train on; the number of steps follows from it" in printed
    assert "--eval.val-tokens VALUE" in printed


def test_a_python_without_the_packages_is_named(commands: Commands):
    """-S leaves out what is installed."""
    result = commands.run([sys.executable, "-S", str(ROOT / "pretrain.py"), "debug"])
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: Cannot use {sys.executable}: it lacks the package torch. ")
    assert result.stderr.count("\n") == 1


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
    assert f"Cannot use {tmp_path / 'runs'}: it is a file" in result.stderr


@pytest.mark.parametrize("module", ["sampling", "hellaswag"])
def test_an_unreadable_checkpoint(refused: Callable[..., str], tmp_path: Path, module: str):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000005"
    checkpoint_utils.save_checkpoint(checkpoint.parent, 5, {"model": {}}, {})
    (checkpoint / "model.safetensors").write_bytes(b"garbage")
    message = refused(f"src.model_assessment.{module}", "--checkpoint", tmp_path / "run")
    assert "model.safetensors has 7 bytes, expected" in message


def test_sampling_from_nowhere_and_with_odd_settings(refused: Callable[..., str], tmp_path: Path):
    (tmp_path / "runs" / "nowhere-else").mkdir(parents=True)
    command = ("src.model_assessment.sampling", "--checkpoint", "nowhere")
    assert "top_p = 2.0 must be above 0 and at most 1" in refused(*command, "--top-p", "2")
    message = refused(*command)
    assert "Cannot load a checkpoint" in message
    assert f"The runs in {tmp_path / 'runs'}: nowhere-else." in message


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
def test_every_command_has_help(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"src.{module}").main()
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("program", [[str(ROOT / "pretrain.py")], ["-m", "src.preflight"]])
def test_ctrl_c_while_torch_is_imported_is_quiet(commands: Commands, tmp_path: Path, program: list[str]):
    """Here it comes from a module in torch's place."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    commands.environment["PYTHONPATH"] = str(tmp_path)
    result = commands.run([sys.executable, *program, "debug"])
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")
