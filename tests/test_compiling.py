"""Compiled training: the blocks and the loss's softmax for the training batch, and nothing else."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment import sampling
from src.model_utils.autotune import CompiledForward, compile_problem
from src.model_utils.weight_init import init_weights
from src.params import ModelConfig
from src.utils.root import ROOT

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or bool(compile_problem("cpu")),
    reason="needs g++, Python's headers, and a PyTorch that doesn't lie in a folder with a space",
)


class CountingBackend:
    """Runs each graph uncompiled and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> object:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def model(tiny_config: ModelConfig) -> LLM:
    torch._dynamo.reset()
    config = replace(tiny_config, n_vocab=50_257, n_layer=4)
    model = LLM(config)
    init_weights(model, config, seed=0)
    return model


def windows(model: LLM, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(model.config.n_vocab, (sequences, model.config.n_ctx + 1))
    return tokens[:, :-1], tokens[:, 1:]


def train(forward: CompiledForward, sequences: int) -> None:
    for _ in range(3):
        forward(*windows(forward.model, sequences)).backward()
        forward.zero_grad()


def test_layers_share_their_code_and_only_training_is_compiled(model: LLM, tiny_config: ModelConfig):
    backend = CountingBackend()
    forward = CompiledForward(model, backend=backend)
    train(forward, 4)
    assert backend.graphs == 2  # one block for all four layers, one softmax
    assert [name for name, _ in forward.named_parameters()] == [f"model.{name}" for name, _ in model.named_parameters()]

    model.eval()
    with torch.no_grad():
        for sequences in (1, 4):
            model(*windows(model, sequences))
        sampling.sample(model, load_tokenizer(), ("One", "One two"), sampling.SamplingConfig(max_new_tokens=20))
    model.train()
    train(forward, 4)
    assert backend.graphs == 2

    other = LLM(replace(tiny_config, n_vocab=50_257, n_layer=2, n_embd=48))
    train(CompiledForward(other, backend=backend), 2)
    assert backend.graphs == 4  # another model compiles its own


# Each case compiles for ten seconds, so only one model runs in bf16: autocast treats biases like weights.
@needs_compiler
@pytest.mark.parametrize(
    ("changes", "dtype", "tolerance"),
    [
        ({}, torch.float32, 1e-5),
        ({"bias": False, "qk_norm": True}, torch.float32, 1e-5),
        ({"bias": False, "qk_norm": True}, torch.bfloat16, 2e-2),
    ],
    ids=["faithful", "fast", "fast in bf16"],
)
def test_machine_code_gives_the_same_losses_and_gradients(
    tiny_config: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    config = replace(tiny_config, **changes)
    model = LLM(config)
    init_weights(model, config, seed=0)
    inputs, targets = windows(model, 2)
    results = []
    for forward in (model, CompiledForward(model)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = forward(inputs, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for eager, fast in zip(*results, strict=True):
        # The few numbers of a gain are sums over all positions, which cancel: rounding weighs more.
        limit = tolerance * (4 if eager.dim() == 1 else 1)
        assert torch.linalg.vector_norm(fast - eager) <= limit * torch.linalg.vector_norm(eager)


@needs_compiler
def test_compiled_dropout_is_the_same_forward_and_backward(
    tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The gradient is that of the loss: a compiler that draws dropout again in the backward pass gives another one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = LLM(replace(tiny_config, n_embd=48, residual_dropout=0.3, ffn_dropout=0.3)).train()
    init_weights(model, model.config, seed=0)
    forward = CompiledForward(model)
    inputs, targets = windows(model, 4)
    parameters = list(model.parameters())
    directions = [torch.randn_like(p) * p.detach().std().clamp(min=0.02) for p in parameters]

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return forward(inputs, targets)

    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum(float((gradient * d).sum()) for gradient, d in zip(gradients, directions, strict=True))
    losses = []
    for length in (1e-3, -2e-3):  # one step along the directions, then two back
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=length)
        losses.append(loss().item())
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


def test_compiled_code_lies_where_the_log_says(tmp_path: Path):
    program = "import src, torch._inductor.runtime.cache_dir_utils as d; print(d.cache_dir())"
    environment = {**os.environ, "TEMP_DATA_DIR": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == str(tmp_path / "compile_cache")
