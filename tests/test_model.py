"""The model against the reference's numbers, transformers' Llama and plain arithmetic."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from src import global_cache
from src.model import LLM
from src.model_configs.my_llm_config import lf_llm_269m
from src.model_utils.adamw_opt import build_optimizers, learning_rate
from src.model_utils.llama_format import llama_settings, llama_tensors
from src.model_utils.load_model import load_weights
from src.model_utils.weight_init import init_weights
from src.params import ConfigError, ModelConfig, OptimConfig
from tests.reference import CONFIG, ours, reference_model, reference_tensors


def test_parameters_of_the_full_size():
    with torch.device("meta"):
        model = LLM(lf_llm_269m().model)
    total = sum(p.numel() for p in model.parameters())
    assert total == 320_145_408
    assert total - model.embedding.weight.numel() == 268_682_240


def test_logits_equal_the_references(shared: Path):
    tensors = reference_tensors(shared / "reference")
    logits = reference_model(shared / "reference")(tensors["input_ids"])
    assert (logits - tensors["logits"]).abs().max() < 1e-5


def test_training_follows_the_references_trajectory(shared: Path, one_thread: None):
    trajectory = json.loads((shared / "reference" / "reference_trajectory.json").read_text())
    tensors = reference_tensors(shared / "reference")
    recipe = trajectory["training"]
    config = OptimConfig(max_lr=recipe["max_lr"], warmup_steps=recipe["warmup_steps"])
    model = reference_model(shared / "reference")
    (optimizer,) = build_optimizers(model, config)
    for step, expected in enumerate(trajectory["steps"]):
        lr = learning_rate(step, recipe["total_steps"], recipe["warmup_steps"], config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = 0.0
        for windows in tensors["batches"][step].long():
            micro_loss = model(windows[:, :-1], windows[:, 1:]) / recipe["grad_accumulation_steps"]
            micro_loss.backward()
            loss += micro_loss.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(expected["loss"], abs=1e-5)
        assert grad_norm == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert lr == pytest.approx(expected["lr"], rel=1e-4)
    parameters = dict(model.named_parameters())
    finals = {k.removeprefix("final."): v for k, v in tensors.items() if k.startswith("final.")}
    assert {ours(name) for name in finals} - {"out_proj.weight"} == set(parameters)
    for name, final in finals.items():
        if name != "out_proj.weight":  # the head, which is the embedding
            assert (parameters[ours(name)] - final).abs().max() < 1e-4, name


@pytest.mark.parametrize(
    "change",
    [{}, {"bias": False}, {"bias": False, "qk_norm": True}, {"bias": False, "qk_norm": True, "ffn": "relu2"}],
    ids=str,
)
def test_logits_equal_transformers_llama_or_qwen3(change: dict[str, Any]):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(n_vocab=211, n_ctx=32, n_embd=48, n_head=4, n_layer=3, **change)
    torch.manual_seed(0)
    model = LLM(config).eval()
    for parameter in model.parameters():  # biases and gains too, so that a dropped one shows
        torch.nn.init.normal_(parameter, std=0.2)
    settings = transformers.AutoConfig.for_model(**llama_settings(config))
    llama = transformers.AutoModelForCausalLM.from_config(settings).eval()
    llama.load_state_dict(llama_tensors(dict(model.named_parameters())))
    inputs = torch.randint(config.n_vocab, (3, config.n_ctx))
    with torch.no_grad():
        assert (model(inputs) - llama(inputs).logits).abs().max() < 1e-4


def test_initial_loss_is_that_of_the_references_first_step():
    """At full size it was 11.0251. Width and vocabulary decide it, depth and context hardly."""
    config = ModelConfig(n_ctx=32, n_layer=2, residual_dropout=0.0, ffn_dropout=0.0)
    model = LLM(config)
    init_weights(model, config, seed=1)
    windows = torch.randint(config.n_vocab, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(windows[:, :-1], windows[:, 1:]).item()
    assert loss == pytest.approx(11.0251, rel=0.05)


def test_initial_loss_of_the_references_small_shape(shared: Path):
    trajectory = json.loads((shared / "reference" / "reference_trajectory.json").read_text())
    windows = reference_tensors(shared / "reference")["batches"][0].flatten(0, 1).long()
    model = LLM(CONFIG)
    init_weights(model, CONFIG, seed=1)
    loss = model(windows[:, :-1], windows[:, 1:]).item()
    assert loss == pytest.approx(trajectory["steps"][0]["loss"], rel=0.05)


def test_overfits_one_batch(tiny_config: ModelConfig):
    model = LLM(tiny_config)
    init_weights(model, tiny_config, seed=0)
    (optimizer,) = build_optimizers(model, OptimConfig(weight_decay=0.0))
    windows = torch.randint(tiny_config.n_vocab, (4, 17), generator=torch.Generator().manual_seed(0))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(60):
        loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_a_position_does_not_see_the_future(tiny_config: ModelConfig):
    model = LLM(tiny_config).eval()
    inputs = torch.randint(tiny_config.n_vocab, (1, 16))
    changed = inputs.clone()
    changed[0, 9] = (changed[0, 9] + 1) % tiny_config.n_vocab
    with torch.no_grad():
        difference = (model(inputs) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:9].max() == 0
    assert difference[9:].min() > 0


@pytest.mark.parametrize("lengths", [(16,), (1,) * 16, (5, 1, 1, 9), (1, 6, 9)])
def test_positions_read_through_a_cache_are_what_they_are_together(tiny_config: ModelConfig, lengths: tuple[int, ...]):
    model = LLM(tiny_config).eval()
    ids = torch.randint(tiny_config.n_vocab, (2, 16))
    caches = model.new_caches(2, torch.float32)
    parts = [model(part, caches=caches) for part in ids.split(list(lengths), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-5)


def test_head_and_embedding_are_one_weight(tiny_config: ModelConfig):
    """After every way that gives a model its weights, and trained by both uses."""
    model = LLM(tiny_config)
    tensors = {name: torch.full_like(parameter, 0.5) for name, parameter in model.named_parameters()}
    with torch.device("meta"):
        assigned = LLM(tiny_config)
    load_weights(assigned, tensors, "a test", assign=True)
    load_weights(model, tensors, "a test")
    for each in (model, assigned, assigned.bfloat16(), assigned.float()):
        assert each.head.weight is each.embedding.weight
        assert each.head.weight.device.type == "cpu"
        assert "head.weight" not in dict(each.named_parameters())
    ids = torch.tensor([[1, 2, 3]])
    model(ids, ids).backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert (gradient.abs().sum(dim=1) > 0).all()  # the head's gradient reaches tokens that are not in the batch


def test_two_models_of_other_shapes_in_one_process(tiny_config: ModelConfig):
    """Each uses the rotary tables of its shape, in whichever order they are called."""
    other = ModelConfig(n_vocab=97, n_ctx=48, n_embd=32, n_head=2, n_layer=2, residual_dropout=0.0, ffn_dropout=0.0)
    inputs = torch.randint(97, (1, 12))
    alone = []
    for config in (tiny_config, other):
        global_cache._tensors.clear()
        model = LLM(config)
        init_weights(model, config, seed=0)
        alone.append(model(inputs))
    global_cache._tensors.clear()
    for config, expected in ((other, alone[1]), (tiny_config, alone[0]), (other, alone[1])):
        model = LLM(config)
        init_weights(model, config, seed=0)
        torch.testing.assert_close(model(inputs), expected, rtol=0, atol=0)


def test_rope_tables_are_not_saved_and_are_shared_by_layers(tiny_config: ModelConfig):
    global_cache._tensors.clear()
    model = LLM(tiny_config)
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} | {"head.weight"}
    assert len(global_cache._tensors) == 2  # cosine and sine, for both layers


def test_training_works_after_tables_were_made_in_inference_mode(tiny_config: ModelConfig):
    global_cache._tensors.clear()
    model = LLM(tiny_config)
    windows = torch.zeros(1, 5, dtype=torch.int64)
    with torch.inference_mode():
        model(windows)
    model(windows[:, :-1], windows[:, 1:]).backward()
    assert model.embedding.weight.grad is not None


def test_bf16_loss_is_close_to_float32(tiny_config: ModelConfig):
    model = LLM(tiny_config)
    init_weights(model, tiny_config, seed=0)
    windows = torch.randint(tiny_config.n_vocab, (4, 17), generator=torch.Generator().manual_seed(0))
    exact = model(windows[:, :-1], windows[:, 1:]).item()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(windows[:, :-1], windows[:, 1:])
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact, rel=2e-3)
    assert exact == pytest.approx(math.log(97), rel=0.1)


def test_an_impossible_shape_is_refused():
    with pytest.raises(ConfigError, match=r"n_embd = 30 is not divisible by 2 x model.n_head = 8"):
        LLM(ModelConfig(n_embd=30, n_head=4))


def test_loss_is_cross_entropy_of_the_logits(tiny_config: ModelConfig):
    model = LLM(tiny_config)
    windows = torch.randint(tiny_config.n_vocab, (3, 17))
    inputs, targets = windows[:, :-1], windows[:, 1:]
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert model(inputs, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_compiled_model_computes_the_same_from_an_empty_cache(tiny_config: ModelConfig):
    """Traced, not compiled to machine code, which takes no time and no compiler; the tables are made while tracing."""
    model = LLM(tiny_config)
    init_weights(model, tiny_config, seed=0)
    windows = torch.randint(tiny_config.n_vocab, (3, 17))
    global_cache._tensors.clear()
    torch._dynamo.reset()
    gradients = []
    for forward in (torch.compile(model, backend="aot_eager"), model):
        loss = forward(windows[:, :-1], windows[:, 1:])
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for compiled, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
