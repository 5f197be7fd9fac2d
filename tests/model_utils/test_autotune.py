"""Choices by measuring, with measurements made up here; whole runs that choose are in tests/whole_runs."""

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from src.model import LLM
from src.model_utils import autotune as start_choices
from src.model_utils.autotune import CompiledForward, Trial, settle
from src.params import Config, ModelConfig, TrainConfig
from src.utils import hardware
from src.utils.errors import PeerError, UserError
from src.utils.handle_ddp import Processes

ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where these tests run in a folder with a space."""
    monkeypatch.setattr(torch, "__file__", "/programs/torch/__init__.py")


@pytest.fixture
def config(tiny_config: ModelConfig) -> Config:
    """12 sequences a step, 100 steps."""
    train = TrainConfig(batch_tokens=12 * 16, micro_batch_size=4, total_steps=100, compile="auto")
    return Config(model=tiny_config, train=train)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], list[int]]:
    """Makes the trial passes take these seconds, one after the other; returns the batch sizes that were tried."""

    def make(seconds: list[float]) -> list[int]:
        tried: list[int] = []
        left: Iterator[float] = iter(seconds)

        def take(_: Trial, batch_size: int) -> float:
            tried.append(batch_size)
            return next(left)

        monkeypatch.setattr(Trial, "seconds", take)
        return tried

    return make


def settled(config: Config, was: dict[str, Any] | None = None) -> tuple[Config, nn.Module, str]:
    model = LLM(config.model)
    chosen, forward, notes = settle(config, was, config.total_steps, model, torch.float32, ALONE, print)
    return chosen, forward, "; ".join(notes)


def auto_micro_batch(config: Config) -> Config:
    return replace(config, train=replace(config.train, micro_batch_size="auto", compile="off"))


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [(12.5, 12), (11.9, 6), (5.9, 4), (1.5, 1)],
    ids=["all fit", "the next divisor", "not one in between", "one"],
)
def test_the_micro_batch_is_the_largest_that_fits_and_divides(
    config: Config, sequences: float, expected: int, monkeypatch: pytest.MonkeyPatch
):
    """Memory for so many sequences is free, besides the gradients and the optimizer's."""
    trial = Trial(LLM(config.model), torch.float32, ALONE.device)
    one, two = trial._bytes_of(1), trial._bytes_of(2)
    room = one + (sequences - 1) * (two - one)
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: int(2 * room))  # half of it is to be used
    chosen, _, words = settled(auto_micro_batch(config))
    assert chosen.train.micro_batch_size == expected
    assert f"micro-batch: {expected} (the largest of 12" in words


def test_memory_is_counted_as_autograd_keeps_it(config: Config, monkeypatch: pytest.MonkeyPatch):
    """Twice the sequences keep twice the activations, no parameter is among them, and logits have their bound."""
    model = LLM(config.model)
    trial = Trial(model, torch.float32, ALONE.device)
    one, two, four = (trial._bytes_of(n) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    assert trial._activation_bytes(4) - trial._activation_bytes(2) == pytest.approx(
        2 * (trial._activation_bytes(2) - trial._activation_bytes(1)), rel=0.1
    )
    logits = config.model.n_ctx * config.model.n_vocab * 4
    monkeypatch.setattr(start_choices, "LOGIT_POSITIONS", 2 * config.model.n_ctx)
    assert trial._bytes_of(4) == four - 2 * logits
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pass_that_fails_leaves_no_gradients(config: Config, monkeypatch: pytest.MonkeyPatch):
    """As where a compiler fails at the first backward pass, or memory ends in it."""
    model = LLM(config.model)
    trial = Trial(model, torch.float32, ALONE.device)
    for raised, expected in ((RuntimeError("broken"), RuntimeError), (torch.OutOfMemoryError("full. A"), UserError)):

        def fails(_: torch.Tensor, error: Exception = raised) -> None:
            raise error

        hook = model.embedding.weight.register_hook(fails)
        with pytest.raises(expected):
            trial.seconds(2)
        hook.remove()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_no_sequence_fits(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"not even one sequence of 16 tokens fits .*; make the model or --model.n-ctx"):
        settled(auto_micro_batch(config))


def test_a_run_that_goes_on_keeps_its_choices(
    config: Config, passes: Callable[[list[float]], list[int]], monkeypatch: pytest.MonkeyPatch
):
    tried = passes([])
    monkeypatch.setattr(Trial, "fits", lambda *_: True)
    auto = replace(config, train=replace(config.train, micro_batch_size="auto"))
    chosen, forward, words = settled(auto, was={"micro_batch_size": 3, "compile": "off"})
    assert (chosen.train.micro_batch_size, chosen.train.compile) == (3, "off")
    assert words.count("as this run has had it") == 2
    assert not tried
    assert isinstance(forward, LLM)


def test_a_micro_batch_that_another_number_of_processes_cannot_keep_is_found_anew(config: Config):
    chosen, _, words = settled(auto_micro_batch(config), was={"micro_batch_size": 5, "compile": "off"})
    assert chosen.train.micro_batch_size == 12
    assert "5 until now: the same samples, but not the same bits" in words


def test_a_short_run_is_not_compiled(config: Config, passes: Callable[[list[float]], list[int]]):
    """100 steps of 3 micro-batches of 0.5 s take 150 s: the likely gain is less than compiling takes."""
    tried = passes([0.9, 0.5])
    chosen, forward, words = settled(config)
    assert chosen.train.compile == "off"
    assert isinstance(forward, LLM)
    assert tried == [4, 4]
    assert "compile: off (300 micro-batches of 0.5 s: compiling would take longer than it saves)" in words


@pytest.mark.parametrize(("compiled", "expected"), [(1.4, "on"), (1.96, "off"), (3.0, "off")])
def test_a_long_run_is_compiled_where_that_is_faster(
    config: Config, compiled: float, expected: str, passes: Callable[[list[float]], list[int]]
):
    passes([2.4, 2.0, 20.0, compiled, compiled, compiled])
    chosen, forward, words = settled(config)
    assert chosen.train.compile == expected
    assert isinstance(forward, CompiledForward if expected == "on" else LLM)
    assert f"compile: {expected} (a micro-batch takes {compiled:.3g} s" in words


def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("no working C++ compiler was found\nand more lines")

    monkeypatch.setattr(CompiledForward, "forward", fails)


def test_without_a_compiler_a_run_is_not_compiled(
    config: Config, passes: Callable[[list[float]], list[int]], monkeypatch: pytest.MonkeyPatch
):
    asked = replace(config, train=replace(config.train, compile="on"))
    broken_compiler(monkeypatch)
    with pytest.raises(UserError, match=r"torch.compile failed: no working C\+\+ compiler was found; install"):
        settled(asked)
    monkeypatch.setitem(start_choices.LIKELY_GAIN, "cpu", 1e9)
    chosen, forward, words = settled(config)
    assert chosen.train.compile == "off"
    assert "compile: off (torch.compile failed: no working C++ compiler was found)" in words
    assert isinstance(forward, LLM)


def test_pytorch_in_a_folder_with_a_space_is_not_tried(
    config: Config, passes: Callable[[list[float]], list[int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "__file__", "/my programs/torch/__init__.py")
    tried = passes([])
    _, forward, words = settled(config)
    assert "compile: off (PyTorch lies in /my programs/torch" in words
    assert isinstance(forward, LLM)
    with pytest.raises(UserError, match="do not take a space; use an environment in another folder"):
        settled(replace(config, train=replace(config.train, compile="on")))
    assert tried == []


def test_without_pythons_headers_it_is_not_tried(
    config: Config, passes: Callable[[list[float]], list[int]], monkeypatch: pytest.MonkeyPatch
):
    """A CPU's code and what starts a GPU's kernels include them."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: f"/nowhere/{name}")
    tried = passes([])
    _, forward, words = settled(config)
    assert "compile: off (there is no Python.h in /nowhere/include; install Python's headers" in words
    assert isinstance(forward, LLM)
    with pytest.raises(UserError, match=r"python3-dev\), or start with --train\.compile off"):
        settled(replace(config, train=replace(config.train, compile="on")))
    assert tried == []


def test_without_a_compiler_on_another_machine_a_run_is_not_compiled(config: Config, monkeypatch: pytest.MonkeyPatch):
    def failed_elsewhere(*_: object) -> list[float]:
        raise PeerError("torch.compile failed: no working C++ compiler was found; install one", 2)

    monkeypatch.setattr(start_choices, "_try_compiled", failed_elsewhere)
    monkeypatch.setitem(start_choices.COMPILE_SECONDS, "cpu", 0.0)
    chosen, forward, words = settled(config)
    assert chosen.train.compile == "off"
    assert "torch.compile failed: no working C++ compiler was found)" in words
    assert isinstance(forward, LLM)


def test_what_is_tried_leaves_nothing_behind(config: Config):
    model = LLM(config.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settle(auto_micro_batch(config), None, 100, model, torch.float32, ALONE, print)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
