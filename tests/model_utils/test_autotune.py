"""Micro-batch and compile setting that a run chooses before its first step; whole runs are in tests/whole_runs."""

import sysconfig
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from src.model import LLM
from src.model_utils import autotune
from src.model_utils.autotune import CompiledForward, compile_problem, settle
from src.model_utils.memory_estimate import Step, estimate_memory
from src.params import Config, ModelConfig, TrainConfig
from src.utils import hardware
from src.utils.errors import UserError
from src.utils.handle_ddp import ALONE, Processes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine that runs these tests."""
    monkeypatch.setattr(autotune, "compile_problem", lambda kind: "")


@pytest.fixture
def config(tiny_config: ModelConfig) -> Config:
    """12 sequences a step."""
    train = TrainConfig(batch_tokens=12 * 16, micro_batch_size=4, total_steps=100, compile="auto")
    return Config(model=tiny_config, train=train)


def settled(
    config: Config, was: dict[str, Any] | None = None, procs: Processes = ALONE
) -> tuple[Config, nn.Module, str]:
    chosen, forward, notes = settle(config, was, LLM(config.model), torch.float32, procs, print)
    return chosen, forward, "; ".join(notes)


def with_train(config: Config, **settings: Any) -> Config:
    return replace(config, train=replace(config.train, **settings))


def step_bytes(config: Config, size: int) -> int:
    return estimate_memory(Step(config.model, size, 4, "cpu")).total


@pytest.mark.parametrize(
    ("fitting", "expected"),
    [(12, 12), (11, 6), (5, 4), (1, 1)],
    ids=["all fit", "the next divisor", "not one in between", "one"],
)
def test_the_micro_batch_is_the_largest_that_fits_and_divides(
    config: Config, fitting: int, expected: int, monkeypatch: pytest.MonkeyPatch
):
    """Half of the available memory may be used."""
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 2 * step_bytes(config, fitting))
    chosen, forward, notes = settled(with_train(config, micro_batch_size="auto"))
    assert chosen.train.micro_batch_size == expected
    assert isinstance(forward, LLM)
    assert f"micro-batch: {expected} (the largest divisor of 12 sequences" in notes


def test_processes_of_one_machine_share_its_memory(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 4 * step_bytes(config, 4))
    monkeypatch.setattr(autotune, "processes_here", lambda: 2)
    assert settled(with_train(config, micro_batch_size="auto"))[0].train.micro_batch_size == 4


def test_no_sequence_fits(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"not even one sequence of 16 tokens fits .*\. Use a smaller model"):
        settled(with_train(config, micro_batch_size="auto"))


def test_a_resumed_run_keeps_its_choices(config: Config):
    chosen, _, notes = settled(with_train(config, micro_batch_size="auto"), {"micro_batch_size": 3, "compile": "off"})
    assert (chosen.train.micro_batch_size, chosen.train.compile) == (3, "off")
    assert notes.count("as in the checkpoint") == 2
    # A size that does not divide any more is chosen again.
    chosen, _, notes = settled(with_train(config, micro_batch_size="auto"), {"micro_batch_size": 5, "compile": "off"})
    assert chosen.train.micro_batch_size == 12
    assert "5 until now: the same samples, but not the same bits" in notes


@pytest.mark.parametrize(
    ("setting", "kind", "was", "expected"),
    [
        ("auto", "cpu", None, (False, "the default on cpu")),
        ("auto", "cuda", None, (True, "the default on cuda")),
        ("auto", "mps", None, (False, "the default on mps")),
        ("auto", "cpu", "on", (True, "as in the checkpoint")),
        ("auto", "cuda", "off", (False, "as in the checkpoint")),
        ("off", "cuda", "on", (False, "as set")),
        ("on", "cpu", "off", (True, "as set")),
    ],
)
def test_compiling_follows_a_rule(config: Config, setting: str, kind: str, was: str | None, expected: tuple[bool, str]):
    procs = replace(ALONE, device=torch.device(kind))
    assert autotune._compile(with_train(config, compile=setting), was and {"compile": was}, procs) == expected  # type: ignore[arg-type]


def test_what_cannot_be_compiled_is_refused_only_if_it_was_requested(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autotune, "compile_problem", lambda kind: "there is no Python.h. Install it")
    procs = replace(ALONE, device=torch.device("cuda"))
    assert autotune._compile(config, None, procs) == (False, "there is no Python.h. Install it")
    with pytest.raises(UserError, match=r"Python\.h\. Install it, or rerun with --train\.compile off"):
        settled(with_train(config, compile="on"))


def test_known_problems_of_compilers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__file__", "/nowhere/torch/__init__.py")  # the real folder may have a space in its name
    monkeypatch.setattr(autotune.os.path, "exists", lambda path: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-c-compiler")
    assert compile_problem("cpu") == "the compiler no-such-compiler is missing. Install it"
    monkeypatch.setattr(autotune, "find_spec", lambda name: None)
    assert "Triton is missing" in compile_problem("cuda")
    monkeypatch.setattr(autotune, "find_spec", lambda name: name)
    assert compile_problem("cuda") == "the compiler no-such-c-compiler is missing. Install it"
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__file__", "/nowhere/torch/__init__.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: f"/nowhere/{name}")
    for kind in ("cpu", "cuda"):  # a CPU's code and what starts a GPU's kernels include it
        assert "there is no Python.h in /nowhere/include. Install Python's headers" in compile_problem(kind)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Replaces Inductor by PyTorch's "eager" backend, which raises the exceptions in this list."""
    failures: list[Exception] = []
    original = CompiledForward.__init__

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        if failures:
            raise failures[0]
        return graph.forward

    monkeypatch.setattr(CompiledForward, "__init__", lambda self, model: original(self, model, backend=backend))
    torch._dynamo.reset()
    return failures


def test_a_compiled_run_trains_the_same_parameters(config: Config, compiler: list[Exception]):
    chosen, forward, notes = settled(with_train(config, compile="on"))
    assert isinstance(forward, CompiledForward)
    assert chosen.train.compile == "on"
    assert "compile: on (as set; it took " in notes
    assert [id(p) for p in forward.parameters()] == [id(p) for p in forward.model.parameters()]
    assert all(parameter.grad is None for parameter in forward.parameters())


@pytest.mark.parametrize(
    "message",
    [
        "no working C++ compiler was found.\nand more lines",
        "An exception occurred in a subprocess:\n\nName=kernel_0\nTraceback:\nno working C++ compiler was found",
    ],
)
def test_a_compiler_that_fails_is_quoted(config: Config, compiler: list[Exception], message: str):
    compiler.append(RuntimeError(message))
    with pytest.raises(UserError, match=r"no working C\+\+ compiler was found\. Rerun with --train\.compile off\.$"):
        settled(with_train(config, compile="on"))


def test_trials_leave_nothing_behind(config: Config, compiler: list[Exception]):
    model = LLM(config.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    auto = with_train(config, micro_batch_size="auto", compile="on")
    settle(auto, None, model, torch.float32, ALONE, print)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failed_pass_leaves_no_gradients(config: Config):
    """For example one that runs out of memory in the backward pass."""
    model = LLM(config.model)
    hook = model.embedding.weight.register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("full. A")))
    with pytest.raises(torch.OutOfMemoryError):
        autotune._compile_now(model, config, torch.float32, CPU)
    hook.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
