"""Drill 37: absurd and odd sizes in the numbers of every command."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.model_configs.my_llm_config import PRESETS
from src.params import Config, ConfigError, from_dict, to_dict
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.drills.small_run import module
from tests.drills.trained import trained, trained_once  # noqa: F401 (fixtures)

ABSURD = (0, -1, 2**53 + 1, 2**63, 10**30, 1e308, float("nan"), float("inf"), -1e308)

ZERO_IS_FINE = {
    *("residual_dropout", "ffn_dropout", "min_lr_ratio", "warmup_ratio", "beta1", "beta2", "weight_decay", "spike_z"),
    *("seed", "hellaswag_items", "keep_every_steps", "momentum", "decay_ratio"),
}


def numbers() -> Iterator[tuple[str, str]]:
    for group in dataclasses.fields(Config):
        values = to_dict(PRESETS["debug"]())[group.name]
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int | float):
                yield group.name, name


@pytest.mark.parametrize(("group", "name"), list(numbers()))
def test_a_setting_is_refused_in_no_time_or_harmless(group: str, name: str):
    for value in ABSURD:
        settings = to_dict(PRESETS["debug"]())
        settings[group][name] = value
        began = time.monotonic()
        if (value == 0 and name in ZERO_IS_FINE) or (name, value) == ("seed", 2**53 + 1):
            from_dict(settings)
        else:
            with pytest.raises(ConfigError, match=name):
                from_dict(settings)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "options",
    [
        *(("sampling", "--max-new-tokens", value) for value in ("0", "9007199254740993", "nan")),
        *(("sampling", "--num-samples", value) for value in ("0", "9223372036854775808")),
        *(("sampling", *pair) for pair in (("--temperature", "1e308"), ("--top-p", "nan"), ("--top-k", "9" * 20))),
        *(("evaluate", "--val-tokens", value) for value in ("-1", "9223372036854775808")),
        *(("hellaswag", "--limit", value) for value in ("0", "9223372036854775808")),
    ],
)
def test_options_of_a_model(commands: Commands, trained: Path, options: tuple[str, ...]):  # noqa: F811
    name, *rest = options
    began = time.monotonic()
    result = module(commands, f"src.model_assessment.{name}", "--checkpoint", str(trained), *rest)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "options",
    [
        ("--gpu", "h200", "--gpus", "9223372036854775808"),
        ("--gpu", "h200", "--mfu", "5e-324"),
        ("--gpu", "h200", "--mfu", "nan"),
        ("--gpu", "h200", "--train.batch-tokens", "1000000000", "--model.n-ctx", "2", "--model.n-embd", "65536"),
        ("--model.n-embd", "1"),
        ("--model.n-embd", "9007199254740993"),
        ("--model.n-layer", "9223372036854775808"),
    ],
)
def test_options_of_the_planner(commands: Commands, options: tuple[str, ...]):
    began = time.monotonic()
    result = module(commands, "src.model_utils.planner", "debug", *options)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NPROC", "1000000000"),
        ("NPROC", "\N{ARABIC-INDIC DIGIT THREE}"),
        ("MAX_RESTARTS", "9223372036854775808"),
        ("OMP_NUM_THREADS", "abc"),
        ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "abc"),
        ("DATA_MAX_TOKENS", "1__0"),
        ("DATA_WAIT", "nan"),
    ],
)
def test_variables_of_the_launcher(commands: Commands, variable: str, value: str):
    commands.environment |= {"PYTHON": sys.executable, "DEBUG_MODE": "True", variable: value}
    result = commands.run([str(ROOT / "run_pre_training_e2e.sh"), "--dry-run"])
    assert result.returncode == 2, result.stderr
    assert f"{variable} is '{value}'; it must be a number of " in result.stderr
    assert "Traceback" not in result.stderr
