"""The reference's checkpoint files as runs of ours: the same model, and the same training from there on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pretrain
import src.params
from src.model_utils.load_model import load_model
from src.model_utils.reference_format import read_reference, their_name
from src.model_utils.reference_import import import_reference
from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig
from src.utils.errors import UserError
from tests.model_utils.reference_files.files import (
    SHAPE,
    Content,
    HParams,
    adamw,
    file_content,
    hparams,
    recipe,
    reference_parameters,
    refusal,
)
from tests.reference import CONFIG, ours, reference_tensors


@pytest.mark.parametrize("kind", ["as it is", "compiled", "weights alone"])
def test_logits_are_the_references(shared: Path, save: Callable[[Any], Path], kind: str):
    path = shared / "reference" / "reference_checkpoint.pth"
    if kind != "as it is":
        with torch.serialization.safe_globals([(HParams, "src.params.HParams")]):
            content = torch.load(path, weights_only=True)
        if kind == "compiled":
            state = content["model_state_dict"]
            content["model_state_dict"] = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
        else:
            content = {key: content[key] for key in ("model_state_dict", "hParams", "step")}
        path = save(content)
    made = import_reference(path, recipe())
    loaded = load_model(Path("imported"))
    tensors = reference_tensors(shared / "reference")
    with torch.no_grad():
        assert (loaded.model(tensors["input_ids"]) - tensors["logits"]).abs().max() < 1e-5
    assert loaded.config.model == CONFIG
    assert (made["step"], loaded.step, loaded.dataset_sha256) == (0, 0, "")
    assert made["parameters"] == sum(parameter.numel() for parameter in loaded.model.parameters())


def test_a_run_directory_is_made(content: Content, save: Callable[[Any], Path], runs: Path):
    path = save(content)
    made = import_reference(path, recipe())
    assert made["run"] == str(runs / "imported")
    assert made["checkpoint"] == str(runs / "imported/checkpoints/step_0000003")
    assert made["optimizer_state"]
    assert sorted(entry.name for entry in runs.iterdir()) == ["imported"]
    settings = json.loads((runs / "imported/config.json").read_text())
    assert settings["config"]["model"] == src.params.to_dict(SHAPE)
    assert settings["derived"]["parameters"] == made["parameters"]
    assert settings["imported"]["bytes"] == path.stat().st_size
    assert "machine" not in settings
    status = json.loads((runs / "imported/status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("stopped", 3, "imported from model.pth")
    lines = (runs / "imported/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["event", "checkpoint"]


def test_optimizer_state_is_each_parameters_own(content: Content, save: Callable[[Any], Path]):
    names = [name for name in content["model_state_dict"] if name != "out_proj.weight"]
    ranks = {name: content["model_state_dict"][name].dim() for name in names}
    in_groups = [n for n in names if ranks[n] == 2] + [n for n in names if ranks[n] == 1]
    found = read_reference(save(content))
    for number, name in enumerate(in_groups):
        for kind, tensor in content["optimizer_state_dict"]["state"][number].items():
            assert torch.equal(found.optimizer[f"{kind}.{ours(name)}"], tensor), (kind, name)
    assert len(found.optimizer) == 3 * len(names)
    assert {their_name(name) for name in found.weights} == set(names)
    assert found.optim == {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def config(dataset: Callable[..., Path], one_thread: None) -> Config:
    """Six steps of a model of SHAPE, with checkpoints at 3 and 6."""
    return Config(
        run_name="whole",
        model=SHAPE,
        data=DataConfig(dir=str(dataset(train_tokens=[2_000], n_vocab=300))),
        optim=OptimConfig(max_lr=5e-3, warmup_steps=2),
        train=TrainConfig(total_steps=6, batch_tokens=64, micro_batch_size=4, precision="float32", device="cpu"),
        eval=EvalConfig(val_tokens=160, hellaswag_items=0),
        checkpoint=CheckpointConfig(every_steps=3),
    )


def test_training_goes_on_as_if_it_had_been_ours(config: Config, save: Callable[[Any], Path], runs: Path):
    pretrain.train(config)
    whole = runs / "whole/checkpoints"
    weights, moments = (load_file(whole / f"step_0000003/{name}.safetensors") for name in ("model", "optimizer"))
    parameters = reference_parameters()
    optimizer = adamw(parameters)
    for name, parameter in parameters.items():
        parameter.data = weights[ours(name)]
        optimizer.state[parameter] = {k: moments[f"{k}.{ours(name)}"] for k in ("step", "exp_avg", "exp_avg_sq")}
    path = save(file_content(parameters, optimizer, step=3))

    again = replace(config, run_name="imported")
    import_reference(path, again, to_train=True)
    assert pretrain.train(again).step == 6
    for name in ("model", "optimizer"):
        expected = load_file(whole / f"step_0000006/{name}.safetensors")
        found = load_file(runs / f"imported/checkpoints/step_0000006/{name}.safetensors")
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key


def test_training_starts_from_a_file_of_before_the_first_step(config: Config, save: Callable[[Any], Path], runs: Path):
    parameters = reference_parameters()
    path = save(file_content(parameters, adamw(parameters), step=0))
    hardly = replace(config, optim=replace(config.optim, max_lr=1e-12))
    import_reference(path, hardly, to_train=True)
    assert pretrain.train(hardly).step == 6
    weights = load_model(runs / "whole").model.state_dict()
    for name, parameter in parameters.items():
        assert torch.allclose(weights[ours(name)], parameter, atol=1e-8), name


def test_training_does_not_go_on_with_unknown_data(config: Config, content: Content, save: Callable[[Any], Path]):
    import_reference(save(content), recipe("whole"))
    with pytest.raises(UserError, match=r"another configuration:\n(.*\n)*  - data \(sha256 of its manifest\)"):
        pretrain.train(config)


def test_settings_to_go_on_with_have_to_be_the_files(
    config: Config, content: Content, save: Callable[[Any], Path], runs: Path
):
    path = save(content)
    other = replace(config, model=replace(SHAPE, n_layer=3), optim=replace(config.optim, beta2=0.99))
    said = refusal(path, runs, other, to_train=True)
    assert "model.n_layer = 3, in the file 2; optim.beta2 = 0.99, in the file 0.95" in said
    short = replace(config, train=replace(config.train, total_steps=2), optim=replace(config.optim, warmup_steps=0))
    assert "train.total_steps = 2, of which the file has taken 3" in refusal(path, runs, short, to_train=True)
    nowhere = replace(config, data=DataConfig(dir="/nowhere"))
    assert "cannot read /nowhere/manifest.json" in refusal(path, runs, nowhere, to_train=True)


def test_what_the_file_says_replaces_the_recipe(content: Content, save: Callable[[Any], Path], runs: Path):
    content["hParams"] = hparams(n_ctx=1_000, attn_res_pdrop=0.25)
    content["optimizer_state_dict"]["param_groups"][0]["betas"] = (0.8, 0.9)
    content["step"] = 30_000
    for entry in content["optimizer_state_dict"]["state"].values():
        entry["step"] = 30_001  # as torch wrote it once
    import_reference(save(content), recipe())
    found = load_model(runs / "imported")
    assert found.step == found.config.total_steps == 30_001
    assert found.config.model == replace(SHAPE, n_ctx=1_000, residual_dropout=0.25)
    assert (found.config.optim.beta1, found.config.optim.beta2) == (0.8, 0.9)
    assert found.config.train.batch_tokens == 512_000
    assert json.loads((runs / "imported/status.json").read_text())["state"] == "done"
    event = json.loads((runs / "imported/metrics.jsonl").read_text().splitlines()[0])
    assert "its step says 30000, but its optimizer has taken 30001" in event["detail"]


def test_what_is_worth_a_note(content: Content, save: Callable[[Any], Path]):
    content |= {"val_loss": 2.8}
    del content["optimizer_state_dict"]
    notes = read_reference(save(content)).notes
    assert len(notes) == 2
    assert "'val_loss'" in notes[0]
    assert "start from zero" in notes[1]


def test_tensors_of_another_kind_become_ours(content: Content, save: Callable[[Any], Path], runs: Path):
    """Half precision, nn.Parameter and transposed."""
    state = content["model_state_dict"]
    state["embd.weight"] = state["out_proj.weight"] = state["embd.weight"].bfloat16()
    state["norm.weight"] = nn.Parameter(state["norm.weight"])
    name = "transformer_blocks.0.attn.out_proj.weight"
    state[name] = state[name].T
    import_reference(save(content), recipe())
    weights = load_model(runs / "imported").model.state_dict()
    for name, tensor in state.items():
        if name != "out_proj.weight":
            assert torch.equal(weights[ours(name)], tensor.float()), name
