"""The settings: every problem at once, derived numbers, and the way to JSON and back."""

import json
from dataclasses import replace
from typing import Any

import pytest

from src.model_configs.my_llm_config import PRESETS, debug, laptop, lf_llm_269m
from src.params import Config, ConfigError, ModelConfig, OptimConfig, TrainConfig, from_dict, to_dict


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        Config(
            run_name="a/b",
            resume="soon",
            model=ModelConfig(n_embd=30, n_head=4, ffn_dropout=1.5),
            optim=OptimConfig(max_lr=-1.0),
            train=TrainConfig(micro_batch_size=0),
        )
    message = str(caught.value)
    for part in (
        "model.n_embd = 30 is not divisible by 2 x model.n_head = 8",
        "model.ffn_dropout = 1.5",
        "optim.max_lr = -1.0",
        "train.micro_batch_size = 0",
        "run_name = 'a/b'",
        "resume = 'soon'",
    ):
        assert part in message
    assert len(caught.value.problems) == 6
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ModelConfig(n_embd=30, n_head=10), "is not divisible by 2 x model.n_head = 20; the nearest width that is: 40"),
        (ModelConfig(n_embd=1024, n_head=15), "the nearest width that is: 1020"),
        (ModelConfig(n_layer=0), "model.n_layer = 0 must be at least 1"),
        (ModelConfig(rope_theta=float("nan")), "model.rope_theta = nan must be above 0"),
        (ModelConfig(norm_eps=float("inf")), "model.norm_eps = inf must be above 0 and at most 1e+12"),
    ],
)
def test_a_shape_that_cannot_work_says_what_would(model: ModelConfig, expected: str):
    assert expected in "\n".join(model.problems())


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_a_limit_for_spikes_that_cannot_work(value: float):
    with pytest.raises(ConfigError) as caught:
        Config(optim=OptimConfig(spike_z=value))
    assert caught.value.problems == [f"optim.spike_z = {value} must be at least 0 and at most 1e+12"]
    assert Config(optim=OptimConfig(spike_z=6.0)).optim.spike_z == 6.0
    with pytest.raises(ConfigError, match=r"price_per_gpu_hour = \S+ must be above 0 and at most 1e\+12"):
        Config(price_per_gpu_hour=value)


def test_a_batch_that_context_does_not_divide():
    with pytest.raises(ConfigError, match="the nearest multiple is 4096"):
        replace(debug(), train=replace(debug().train, batch_tokens=4_100))


def test_steps_and_warmup_of_the_published_recipe():
    config = lf_llm_269m()
    assert (config.total_steps, config.warmup_steps) == (19_073, 226)
    assert config.batch_size * config.model.n_ctx == 524_288
    assert config.grad_accumulation_steps(8) == 2


def test_explicit_steps_win_over_tokens():
    config = replace(lf_llm_269m(), train=replace(lf_llm_269m().train, total_steps=1_000))
    assert (config.total_steps, config.warmup_steps) == (1_000, 11)
    with pytest.raises(ConfigError, match=r"train\.total_steps = 10000001 must be at least 1 and at most 10,000,000"):
        replace(config, train=replace(config.train, total_steps=10_000_001))
    config = replace(config, optim=replace(config.optim, warmup_steps=7))
    assert config.warmup_steps == 7


@pytest.mark.parametrize("world_size", [3, 5, 6, 7])
def test_a_batch_that_cannot_be_shared_names_what_works(world_size: int):
    config = lf_llm_269m()
    with pytest.raises(ConfigError) as caught:
        config.grad_accumulation_steps(world_size)
    message = str(caught.value)
    suggested = int(message.split("use train.batch_tokens = ")[1].split(",")[0])
    replace(config, train=replace(config.train, batch_tokens=suggested)).grad_accumulation_steps(world_size)
    assert " 4 " in message or " 8 " in message  # processes that would work


def test_a_micro_batch_that_does_not_fit_names_those_that_do():
    config = replace(debug(), train=replace(debug().train, batch_tokens=2_048, micro_batch_size=24))
    with pytest.raises(ConfigError, match="micro_batch_size can be 1, 2, 4 or 8"):
        config.grad_accumulation_steps(2)


@pytest.mark.parametrize("preset", PRESETS)
def test_json_and_back(preset: str):
    config = PRESETS[preset]()
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_who_a_run_reports_to_is_kept_and_checked():
    config = replace(debug(), report_to=("tensorboard", "wandb"))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ConfigError, match=r"report_to = \('wandb', 'mlflow'\) must be a list of: tensorboard or wandb"):
        replace(debug(), report_to=("wandb", "mlflow"))  # type: ignore[arg-type]


def test_settings_saved_without_a_later_field_take_its_default():
    data = to_dict(debug())
    del data["optim"]["spike_z"]
    assert from_dict(data) == debug()
    assert all(preset().optim.spike_z == 0.0 for preset in PRESETS.values())


def test_unknown_fields_are_named():
    data = to_dict(debug())
    data["model"]["n_heads"] = 4
    with pytest.raises(ConfigError, match=r"model\.n_heads is not a field"):
        from_dict(data)


def test_presets_work_with_one_and_two_processes():
    for preset in (debug, laptop):
        assert preset().grad_accumulation_steps(1) >= 1
    assert lf_llm_269m().model == ModelConfig()


def test_a_run_name_that_no_file_system_takes_is_refused():
    with pytest.raises(ConfigError, match="has 201 bytes; at most 200 fit"):
        Config(run_name="a" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * 100)
    Config(run_name="a" * 200)


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        ("model", "n_embd", "256", "model.n_embd = '256' must be a whole number"),
        ("train", "seed", True, "train.seed = True must be a whole number"),
        ("train", "precision", "fp8", "train.precision = 'fp8' must be auto, bf16 or float32"),
        ("eval", "sample_prompts", [1], "eval.sample_prompts = (1,) must be a list of: text"),
        ("data", "dir", "\udcff", "data.dir = '\\udcff' must be UTF-8 text; set LC_ALL=C.UTF-8"),
        ("optim", "warmup_steps", 1.5, "optim.warmup_steps = 1.5 must be a whole number or None"),
    ],
)
def test_settings_of_a_wrong_type_are_named(group: str, name: str, value: object, expected: str):
    data = json.loads(json.dumps(to_dict(debug())))
    data[group][name] = value
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    assert caught.value.problems == [expected]


@pytest.mark.parametrize("data", [[], None, {"model": [1]}, {"report_to": 3}])
def test_data_that_is_not_a_configuration_is_refused(data: Any):
    with pytest.raises(ConfigError, match="must be"):
        from_dict(data)
