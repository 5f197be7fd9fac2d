import numpy as np
import pytest
import torch

from src.model import LLM
from src.model_configs.my_llm_config import lf_llm_269m
from src.model_utils.adamw_opt import build_optimizers, learning_rate, load_optimizer_tensors, optimizer_tensors
from src.params import ModelConfig, OptimConfig


def test_every_parameter_is_in_one_group_and_only_matrices_decay(tiny_config: ModelConfig):
    model = LLM(tiny_config)
    decayed, plain = build_optimizers(model, OptimConfig(weight_decay=0.3))[0].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in (decayed, plain) for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert all("bias" in names[id(p)] or "norm" in names[id(p)] for p in plain["params"])
    assert "embedding.weight" in [names[id(p)] for p in decayed["params"]]


def test_a_step_is_adamws_formula():
    """Algorithm 2 of the AdamW paper for two steps, in numpy."""
    model = torch.nn.Linear(3, 2, bias=False)
    config = OptimConfig(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    (optimizer,) = build_optimizers(model, config)
    weight = model.weight.detach().double().numpy().copy()
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    rng = np.random.default_rng(0)
    for t, lr in ((1, 0.1), (2, 0.05)):
        gradient = rng.standard_normal(weight.shape)
        optimizer.param_groups[0]["lr"] = lr
        model.weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        weight -= lr * 0.5 * weight
        weight -= lr * (mean / (1 - 0.8**t)) / (np.sqrt(square / (1 - 0.9**t)) + 1e-3)
    np.testing.assert_allclose(
        model.weight.detach().numpy(), weight, rtol=1e-5, atol=1e-7
    )  # float32's rounding of numbers below 1


def test_schedule_of_the_published_run(shared):
    """The learning rates in its log, which gives five digits."""
    config = lf_llm_269m()
    lines = (shared / "reference" / "reference_run_269m.csv").read_text().splitlines()
    columns = lines[0].split(",")
    compared = 0
    for line in lines[1:]:
        row = dict(zip(columns, line.split(","), strict=True))
        if row["lr"]:
            ours = learning_rate(int(row["step"]), config.total_steps, config.warmup_steps, config.optim)
            assert ours == pytest.approx(float(row["lr"]), rel=1e-4), row["step"]
            compared += 1
    assert compared > 300


def test_schedule_without_warmup_starts_at_the_top():
    config = OptimConfig(max_lr=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, 10, 0, config) for step in range(10)]
    assert rates[0] == 1.0
    assert rates[5] == pytest.approx(0.55)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0.1


def test_state_survives_the_way_through_tensors(tiny_config: ModelConfig):
    def steps(model: LLM, optimizer: torch.optim.Optimizer, count: int) -> None:
        windows = torch.arange(2 * 17).view(2, 17) % tiny_config.n_vocab
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for _ in range(count):
            model(windows[:, :-1], windows[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = LLM(tiny_config)
    (optimizer,) = build_optimizers(model, OptimConfig())
    assert optimizer_tensors(model, [optimizer]) == {}
    steps(model, optimizer, 3)
    copy = LLM(tiny_config)
    copy.load_state_dict(model.state_dict())
    (copied,) = build_optimizers(copy, OptimConfig())
    load_optimizer_tensors(copy, [copied], {k: v.clone() for k, v in optimizer_tensors(model, [optimizer]).items()})
    steps(model, optimizer, 2)
    steps(copy, copied, 2)
    for ours, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
