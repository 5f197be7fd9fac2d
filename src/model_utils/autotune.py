"""Choices that a run makes before its first step: how many sequences per micro-batch, and whether to compile.

The run's checkpoints store the choices, and a resumed run keeps them, so that its results stay bit-identical.
"""

import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src import available_cores
from src.lm_loss import compile_softmax, linear_cross_entropy
from src.model import LLM
from src.model_utils.debugging import count_parameters
from src.model_utils.memory_estimate import Step, estimate_memory
from src.params import Config, ModelConfig, divisors
from src.rope import rope_tables
from src.utils import hardware
from src.utils.errors import UserError
from src.utils.files import existing_folder
from src.utils.handle_ddp import Processes, processes_here

# Shares of memory that the micro-batch "auto" leaves free: on a GPU for memory that PyTorch does not allocate, such as
# NCCL's buffers; on a CPU for other programs.
SPARE_GPU, SPARE_CPU = 0.03, 0.5


class CompiledForward(nn.Module):
    """`model(inputs_BT, targets_BT)` with its blocks and the loss's softmax compiled, for batches of one shape.

    The first batch compiles. All blocks share the code of one, so this takes a fraction of the time for the whole
    model. `model` itself stays eager, so validation and sampling compile nothing.
    """

    def __init__(self, model: LLM, backend: str | Callable[..., Any] = "inductor") -> None:
        super().__init__()
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        # Otherwise PyTorch splits a graph compiled inside DDP at the borders of gradient buckets. A block is small
        # enough that its gradients are sent during the backward pass of the next one.
        torch._dynamo.config.optimize_ddp = False
        config, device = model.config, model.embedding.weight.device
        rope_tables(config.n_ctx, config.head_dim, config.rope_theta, device)  # tracing must find them in the cache
        self.model = model
        self._blocks = [compiled(block) for block in model.blocks]  # a plain list: their parameters are the model's
        self._softmax = compile_softmax(compiled)

    def forward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.model.embedding(inputs_BT)
        for block in self._blocks:
            x_BTD = block(x_BTD)
        hidden_ND = self.model.norm(x_BTD).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, self.model.head.weight, targets_BT.flatten(), self._softmax)


def settle(
    config: Config,
    was: dict[str, Any] | None,
    model: LLM,
    precision: torch.dtype,
    procs: Processes,
    say: Callable[[str], None],
) -> tuple[Config, nn.Module, list[str]]:
    """`config` without "auto", the module that computes the training loss, and notes for the log.

    `was`: the `train` settings of the checkpoint that the run resumes from. `say` announces slow actions. All
    processes call this together. Raises UserError if not even one sequence fits, or the model cannot be compiled.
    """
    forward: nn.Module = model
    size, why = config.train.micro_batch_size, "as set"
    if size == "auto":
        size, why = _micro_batch_size(config, was, model, precision, procs)
    is_on, reason = _compile(config, was, procs)
    config = replace(config, train=replace(config.train, micro_batch_size=size, compile="on" if is_on else "off"))
    if is_on:
        say("compiling the model, which takes up to a minute; a request to stop takes effect afterwards")
        forward, started = CompiledForward(model), time.perf_counter()
        if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:  # each rank starts this many processes
            torch._inductor.config.compile_threads = max(1, min(32, available_cores() // processes_here()))
        compile_now = partial(_compile_now, forward, config, precision, procs.device)
        procs.together(lambda: compile_now() if procs.is_machines_first else None)  # fills the cache for the others
        procs.together(lambda: None if procs.is_machines_first else compile_now())
        reason += f"; it took {time.perf_counter() - started:.0f} s, cached in {os.environ['TORCHINDUCTOR_CACHE_DIR']}"
    if procs.device.type == "cuda":  # the peak that is logged later is training's own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(procs.device)
    return config, forward, [f"micro-batch: {size} ({why})", f"compile: {'on' if is_on else 'off'} ({reason})"]


@contextmanager
def out_of_memory_explained(procs: Processes) -> Iterator[None]:
    """Turns PyTorch's out-of-memory error in the block into a UserError, because a restart would not help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Cannot finish {procs.activity}: out of memory on {procs.device}, {str(error).splitlines()[0]} Rerun with "
            "--train.micro-batch-size auto or a smaller one to resume; accumulation keeps the steps the same. For "
            "samples lower --eval.samples-per-prompt, for HellaSwag set --eval.hellaswag-items 0."
        ) from error


def compile_problem(kind: str) -> str:
    """The reason why torch.compile cannot work on this type of device, with a remedy; "" if none is known."""
    folder, headers = os.path.dirname(torch.__file__), sysconfig.get_path("include")
    if kind == "cpu" and any(map(str.isspace, folder)):  # PyTorch does not quote its own path for the compiler
        return f"PyTorch's folder {folder} has a space in its name. Use an environment in another folder"
    cache = existing_folder(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    if os.statvfs(cache).f_flag & os.ST_NOEXEC:
        return f"the disk of {cache} forbids programs (noexec). Set TORCHINDUCTOR_CACHE_DIR to a folder on another"
    # Triton starts its kernels through C code.
    compiler = os.environ.get("CC", "gcc") if kind == "cuda" else os.environ.get("CXX", "g++")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"there is no Python.h in {headers}. Install Python's headers (Debian and Ubuntu: python3-dev)"
    if kind == "cuda" and find_spec("triton") is None:
        return "Triton is missing. Install the PyTorch that requirements.txt pins"
    return "" if shutil.which(compiler) else f"the compiler {compiler} is missing. Install it"


def _micro_batch_size(
    config: Config, was: dict[str, Any] | None, model: LLM, precision: torch.dtype, procs: Processes
) -> tuple[int, str]:
    share = config.batch_size // procs.world_size
    before = was["micro_batch_size"] if was else None
    sizes = divisors(share)
    fits = partial(_fits, model, precision, procs)
    if before in sizes and all(procs.gather(procs.together(lambda: fits(before)))):
        return before, "as in the checkpoint"

    def largest() -> int:
        if size := next(filter(fits, sizes), 0):
            return size
        raise UserError(
            f"Cannot train on {procs.device}: not even one sequence of {config.model.n_ctx} tokens fits into its "
            "memory. Use a smaller model or --model.n-ctx, or free memory."
        )

    size = min(procs.gather(procs.together(largest)))
    why = f"the largest divisor of {share} sequences that fits uncompiled"
    return size, why if before is None else f"{why}; {before} until now: the same samples, but not the same bits"


def _fits(model: LLM, precision: torch.dtype, procs: Processes, size: int) -> bool:
    """True if a micro-batch of `size` fits: tested on a GPU, estimated elsewhere."""
    device, has_ddp = procs.device, procs.world_size > 1
    if device.type != "cuda":
        needed = estimate_memory(Step(model.config, size, precision.itemsize, device.type, 1 + has_ddp)).total
        return needed <= (1 - SPARE_CPU) * hardware.available_memory_bytes() / processes_here()
    fits = True
    try:
        total = torch.cuda.get_device_properties(device).total_memory
        # Stands for AdamW's moments (8 bytes per parameter), DDP's buckets (4 bytes), and memory that stays free.
        held = (12 if has_ddp else 8) * count_parameters(model) + int(SPARE_GPU * total)
        room = torch.empty(held, dtype=torch.uint8, device=device)
        for _ in range(2):  # the second pass runs while the gradients of the first exist
            _one_pass(model, model.config, size, precision, device)
        del room
    except torch.OutOfMemoryError:
        fits = False
    model.zero_grad()  # only here, because inside `except` the error keeps the tensors of its pass alive
    torch.cuda.empty_cache()
    return fits


def _compile(config: Config, was: dict[str, Any] | None, procs: Processes) -> tuple[bool, str]:
    setting, reason, kind = config.train.compile, "as set", procs.device.type
    if setting == "auto":
        setting, reason = "on" if kind == "cuda" else "off", f"the default on {kind}"
        if was and was["compile"] != "auto":
            setting, reason = was["compile"], "as in the checkpoint"
    if setting == "on" and (problem := max(procs.gather(compile_problem(kind)))):
        if config.train.compile == "on":
            raise UserError(f"Cannot compile the model: {problem}, or rerun with --train.compile off.")
        return False, problem
    return setting == "on", reason


def _compile_now(forward: nn.Module, config: Config, precision: torch.dtype, device: torch.device) -> None:
    try:
        _one_pass(forward, config.model, config.micro_batch_size, precision, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PyTorch's compilers fail in many ways and wrap a backend's error
        cause = getattr(error, "inner_exception", error)
        lines = (str(cause) or type(cause).__name__).strip().splitlines()
        line = lines[-1 if lines[0].endswith(":") else 0]  # a traceback from a worker process ends with the error
        raise UserError(f"Cannot compile the model: {line.rstrip('.')}. Rerun with --train.compile off.") from error
    finally:
        forward.zero_grad()


def _one_pass(forward: nn.Module, config: ModelConfig, size: int, precision: torch.dtype, device: torch.device) -> None:
    inputs_BT, targets_BT = (torch.randint(config.n_vocab, (size, config.n_ctx), device=device) for _ in range(2))
    with hardware.autocast(device, precision):
        loss = forward(inputs_BT, targets_BT)
    loss.backward()
    loss.item()  # waits for a GPU, so that its errors appear here
