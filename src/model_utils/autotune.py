"""What a run chooses by measuring before its first step: how many sequences at a time, and whether to compile.

A choice is made once: the run's checkpoints hold it, and a later start takes it over, so that going on gives the
same bits. All is tried out on random tokens; nothing of it stays in the model.
"""

import os
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from src.lm_loss import LOGIT_POSITIONS, compile_softmax, linear_cross_entropy
from src.model import LLM
from src.params import Config
from src.rope import rope_tables
from src.utils import hardware
from src.utils.errors import PeerError, UserError
from src.utils.handle_ddp import Processes, processes_here, world_size

# What compiling a block and the loss takes with cold caches, seconds, and the least share of a step that it saves where
# it helps: measured on CPUs (LOG.md), guessed for GPUs, where only runs of minutes depend on it. Runs that cannot win
# the time back do not try.
COMPILE_SECONDS = {"cpu": 25.0, "cuda": 60.0}
LIKELY_GAIN = {"cpu": 0.08, "cuda": 0.3}
FASTER = 0.97  # of the eager time: a smaller gain is noise
# Kept free by a micro-batch that is found, as shares of the memory: of the GPU's, for what is not PyTorch's own, such
# as NCCL's; of what is available to a CPU's processes, for everything else that the machine does.
SPARE_GPU, SPARE_CPU = 0.03, 0.5


class CompiledForward(nn.Module):
    """`model(inputs_BT, targets_BT)` with its blocks and the loss's softmax compiled, for batches of one shape.

    The compiling happens at the first batch. All blocks share the code of one, so it takes a fraction of the time of
    compiling the whole model. `model` itself stays eager, so validation and sampling compile nothing.
    """

    def __init__(self, model: LLM, backend: str | Callable[..., Any] = "inductor") -> None:
        super().__init__()
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        config, device = model.config, model.embedding.weight.device
        rope_tables(config.n_ctx, config.head_dim, config.rope_theta, device)  # tracing must find them in the cache
        self.model = model
        self._blocks = [compiled(block) for block in model.blocks]  # a plain list: their parameters are the model's
        self._softmax = compile_softmax(compiled)

    def forward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """The mean loss in nats, as the model gives it."""
        x_BTD = self.model.embedding(inputs_BT)
        for block in self._blocks:
            x_BTD = block(x_BTD)
        hidden_ND = self.model.norm(x_BTD).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, self.model.head.weight, targets_BT.flatten(), self._softmax)


@dataclass
class Trial:
    """Tries forward and backward passes over random tokens; the model is left without gradients."""

    model: LLM
    precision: torch.dtype
    device: torch.device
    _activations: dict[int, int] = field(default_factory=dict)
    forward: nn.Module = field(init=False)
    """What gives the loss: the model, or its compiled form."""

    def __post_init__(self) -> None:
        self.forward = self.model

    def seconds(self, batch_size: int) -> float:
        """How long one pass takes. Raises UserError where it needs more memory than there is."""
        started = time.perf_counter()
        try:
            self._pass(batch_size)
            return time.perf_counter() - started
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, self.device, batch_size, "a trial step") from error
        finally:
            self.model.zero_grad()

    def fits(self, batch_size: int) -> bool:
        """Whether a micro-batch fits beside gradients, AdamW's moments and what others need of the device's memory."""
        if self.device.type != "cuda":
            return self._bytes_of(batch_size) <= (1 - SPARE_CPU) * hardware.available_memory_bytes() / processes_here()
        fits = True
        try:
            total = torch.cuda.get_device_properties(self.device).total_memory
            # AdamW's moments, and DDP's buckets, beside which lie the gradients of all passes but a step's last
            held = (12 if world_size() > 1 else 8) * self._parameters + int(SPARE_GPU * total)
            room = torch.empty(held, dtype=torch.uint8, device=self.device)
            self._pass(batch_size)
            self._pass(batch_size)  # beside the gradients of the first
            del room
        except torch.OutOfMemoryError:
            fits = False
        self.model.zero_grad()  # and the error is gone, which held on to the tensors of its pass
        torch.cuda.empty_cache()
        return fits

    def _bytes_of(self, batch_size: int) -> int:
        """What a process needs for it on a CPU: gradients, moments, what autograd keeps, and logits."""
        one, two = (self._activations.get(n) or self._activation_bytes(n) for n in (1, 2))
        config = self.model.config
        logits = min(batch_size * config.n_ctx, LOGIT_POSITIONS) * config.n_vocab * self.precision.itemsize
        return 12 * self._parameters + one + (batch_size - 1) * (two - one) + logits

    def _activation_bytes(self, batch_size: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.seconds(batch_size)
        for parameter in self.model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        self._activations[batch_size] = sum(kept.values())
        return self._activations[batch_size]

    @property
    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _pass(self, batch_size: int) -> None:
        config = self.model.config
        shape = (batch_size, config.n_ctx)
        inputs_BT, targets_BT = (torch.randint(config.n_vocab, shape, device=self.device) for _ in range(2))
        with hardware.autocast(self.device, self.precision):
            loss = self.forward(inputs_BT, targets_BT)
        loss.backward()
        loss.item()  # waits for a GPU


def settle(
    config: Config,
    was: dict[str, Any] | None,
    steps_left: int,
    model: LLM,
    precision: torch.dtype,
    procs: Processes,
    say: Callable[[str], None],
) -> tuple[Config, nn.Module, list[str]]:
    """`config` without "auto" in train.micro_batch_size and train.compile, what gives the loss, and notes for the log.

    What gives the loss is the model, or a CompiledForward where that was chosen. `was`: the settings `train` of the
    checkpoint that the run goes on from, if any. `say` hears beforehand of what takes long. All processes call it
    together, before the model takes part in anything that they share. Raises UserError where not even one sequence
    fits, or where compiling was asked for and fails.
    """
    trial, notes = Trial(model, precision, procs.device), []
    if config.train.micro_batch_size == "auto":
        size, why = _micro_batch_size(config, was, trial, procs)
        notes.append(f"micro-batch: {size} ({why})")
        config = replace(config, train=replace(config.train, micro_batch_size=size))
    on, why = _compile(config, was, steps_left, trial, procs, say)
    notes.append(f"compile: {'on' if on else 'off'} ({why})")
    if procs.device.type == "cuda":  # the peak that is logged is the training's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(procs.device)
    return replace(config, train=replace(config.train, compile="on" if on else "off")), trial.forward, notes


def out_of_memory(error: Exception, device: torch.device, micro_batch_size: int, where: str) -> UserError:
    """What to do about it: a GPU too small for a run will not become larger by starting again."""
    return UserError(
        f"out of memory on {device} in {where}, with a micro-batch of {micro_batch_size} sequences: "
        f"{str(error).splitlines()[0]} Start again with --train.micro-batch-size auto or less than {micro_batch_size}; "
        "the steps stay the same, and a run goes on from its last checkpoint"
    )


def _micro_batch_size(config: Config, was: dict[str, Any] | None, trial: Trial, procs: Processes) -> tuple[int, str]:
    share = config.batch_size // procs.world_size
    before = was["micro_batch_size"] if was else None
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    if before in sizes and not procs.any(not procs.together(lambda: trial.fits(before))):
        return before, "as this run has had it"

    def largest() -> int:
        for size in sizes:
            if trial.fits(size):
                return size
        raise UserError(
            f"not even one sequence of {config.model.n_ctx} tokens fits into the memory of {trial.device} beside the "
            "model, its gradients and the optimizer; make the model or --model.n-ctx smaller, or free memory"
        )

    size = min(procs.gather(procs.together(largest)))
    why = f"the largest of {share} sequences that divides them and fits, tried without compiling, which takes more"
    return size, why if before is None else f"{why}; {before} until now: the same samples, but not the same bits"


def _compile(
    config: Config,
    was: dict[str, Any] | None,
    steps_left: int,
    trial: Trial,
    procs: Processes,
    say: Callable[[str], None],
) -> tuple[bool, str]:
    asked, kind, size = config.train.compile, procs.device.type, config.micro_batch_size
    if asked == "off":
        return False, "as asked for"
    reason = "as asked for"
    if asked == "auto":
        if kind not in COMPILE_SECONDS:
            return False, f"not tried on {kind}"
        reason = "as this run has had it" if was and was["compile"] != "auto" else ""
        if reason and was and was["compile"] == "off":
            return False, reason
    if failure := next(filter(None, procs.gather(compiling_fails(kind))), ""):  # on any machine: none compiles
        if asked == "on":
            raise UserError(f"{failure}, or start with --train.compile off")
        return False, failure
    if reason:
        trial.forward = CompiledForward(trial.model)
        return True, f"{reason}; {_took(_try_compiled(size, trial, procs, 1, say)[0])}"

    eager = _mean(procs.together(lambda: [trial.seconds(size) for _ in range(2)])[1:], procs)
    micro_steps = steps_left * config.grad_accumulation_steps(procs.world_size)
    if eager * micro_steps * LIKELY_GAIN[kind] <= COMPILE_SECONDS[kind]:
        return False, f"{micro_steps} micro-batches of {eager:.2g} s: compiling would take longer than it saves"
    trial.forward = CompiledForward(trial.model)
    try:
        first, *later = _try_compiled(size, trial, procs, 4, say)
    except (UserError, PeerError) as error:  # here, or in another process: none compiles
        trial.forward = trial.model
        return False, str(error).split(";")[0]
    compiled = _mean(later, procs)
    if compiled > eager * FASTER:
        trial.forward = trial.model
        return False, f"a micro-batch takes {compiled:.3g} s compiled and {eager:.3g} s as it is"
    return True, f"a micro-batch takes {compiled:.3g} s instead of {eager:.3g} s; {_took(first)}"


def compiling_fails(kind: str) -> str:
    """Why torch.compile cannot work on this kind of device and what to do, as far as is known beforehand; or ""."""
    place = os.path.dirname(torch.__file__)
    if kind == "cpu" and any(map(str.isspace, place)):
        return (
            f"PyTorch lies in {place}, and its commands for the compiler do not take a space; use an environment in "
            "another folder"
        )
    headers = sysconfig.get_path("include")  # for a CPU's code, and for what starts Triton's kernels
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"there is no Python.h in {headers}; install Python's headers (Debian and Ubuntu: python3-dev)"
    return ""


def _took(seconds: float) -> str:
    return f"compiling took {seconds:.1f} s, its results are kept in {os.environ['TORCHINDUCTOR_CACHE_DIR']}"


def _try_compiled(size: int, trial: Trial, procs: Processes, times: int, say: Callable[[str], None]) -> list[float]:
    """Seconds of each pass of the compiled model; the first compiles. Where one process fails, all raise."""
    say("compiling the model, which takes seconds to a minute; a request to stop is heard afterwards")

    def attempt() -> list[float]:
        try:
            return [trial.seconds(size) for _ in range(times)]
        except UserError:
            raise
        except Exception as error:  # a missing compiler comes in many guises
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"torch.compile failed: {what}; install a C++ compiler such as g++, or start with --train.compile off"
            ) from error

    return procs.together(attempt)


def _mean(seconds: list[float], procs: Processes) -> float:
    """Of the fastest of each process: the same number everywhere."""
    return procs.sum([min(seconds)])[0] / procs.world_size
