"""What a run chooses by measuring before its first step: how many sequences at a time, and whether to compile.

A choice is made once: the run's checkpoints hold it, and a later start takes it over, so that going on gives the
same bits. All is tried out on random tokens; nothing of it stays in the model.
"""

import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from src.model import LLM
from src.params import Config
from src.utils import hardware
from src.utils.errors import PeerError, UserError
from src.utils.handle_ddp import Processes, processes_here

# What compiling a block and the loss takes with cold caches, seconds, and the least share of a step that it saves where
# it helps: measured on CPUs (LOG.md), guessed for GPUs, where only runs of minutes depend on it. Runs that cannot win
# the time back do not try.
COMPILE_SECONDS = {"cpu": 25.0, "cuda": 60.0}
LIKELY_GAIN = {"cpu": 0.08, "cuda": 0.3}
FASTER = 0.97  # of the eager time: a smaller gain is noise
MEMORY_SHARE = {"cuda": 0.92}  # of what is free, for a micro-batch found by itself; 0.5 elsewhere


def settle(
    config: Config,
    was: dict[str, Any] | None,
    steps_left: int,
    model: LLM,
    precision: torch.dtype,
    procs: Processes,
) -> tuple[Config, list[str]]:
    """`config` without "auto" in train.micro_batch_size and train.compile, and what was found out, in words.

    The model is compiled from then on where that was chosen. `was`: the settings `train` of the checkpoint that the run
    goes on from, if any. All processes call it together, before the model takes part in anything that they share.
    Raises UserError where not even one sequence fits, or where compiling was asked for and fails.
    """
    notes = []
    if config.train.micro_batch_size == "auto":
        size, why = _micro_batch_size(config, was, model, precision, procs)
        notes.append(f"micro-batch: {size} ({why})")
        config = replace(config, train=replace(config.train, micro_batch_size=size))
    on, why = _compile(config, was, steps_left, model, precision, procs)
    notes.append(f"compile: {'on' if on else 'off'} ({why})")
    return replace(config, train=replace(config.train, compile="on" if on else "off")), notes


def _micro_batch_size(
    config: Config, was: dict[str, Any] | None, model: LLM, precision: torch.dtype, procs: Processes
) -> tuple[int, str]:
    share = config.batch_size // procs.world_size
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    if was and was["micro_batch_size"] in sizes:
        before = was["micro_batch_size"]
        fits = procs.device.type != "cuda" or _runs(before, model, precision, procs.device)
        if not procs.any(not fits):  # it may go on on a smaller GPU
            return before, "as this run has had it"
    found = procs.together(lambda: _largest_that_fits(sizes, model, precision, procs.device))
    size = min(procs.gather(found))
    return size, f"the largest of {share} sequences that divides them and fits, found by trying it without compiling"


def _largest_that_fits(sizes: list[int], model: LLM, precision: torch.dtype, device: torch.device) -> int:
    one = _bytes_of(1, model, precision, device)
    each = max(1, _bytes_of(2, model, precision, device) - one)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # a micro-batch grows by `each` a sequence; AdamW's two moments, and on a CPU the gradients, come on top
    room = _free_bytes(device) * MEMORY_SHARE.get(device.type, 0.5) - 8 * parameters
    if device.type != "cuda":
        room -= 4 * parameters
    for size in sizes:
        if one + (size - 1) * each <= room and _runs(size, model, precision, device):
            return size
    raise UserError(
        f"not even one sequence of {model.config.n_ctx} tokens fits into the memory of {device}: it takes "
        f"{(one + 8 * parameters) / 1e9:.1f} GB with the optimizer, and {_free_bytes(device) / 1e9:.1f} GB are free; "
        "make the model or --model.n-ctx smaller, or free memory"
    )


def _bytes_of(batch_size: int, model: LLM, precision: torch.dtype, device: torch.device) -> int:
    """What a forward and backward pass takes at its peak: measured on a GPU, else what autograd keeps and logits."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        if not _runs(batch_size, model, precision, device):
            return 1 << 62
        return torch.cuda.max_memory_allocated(device) - before
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _seconds_of(batch_size, model, precision, device)
    activations = sum(size for pointer, size in kept.items() if pointer not in parameters)
    logits = batch_size * model.config.n_ctx * model.config.n_vocab * precision.itemsize
    return activations + logits


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return hardware.available_memory_bytes() // processes_here()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _runs(batch_size: int, model: LLM, precision: torch.dtype, device: torch.device) -> bool:
    try:
        _seconds_of(batch_size, model, precision, device)
    except torch.OutOfMemoryError:
        model.zero_grad()
        torch.cuda.empty_cache()
        return False
    return True


def _compile(
    config: Config,
    was: dict[str, Any] | None,
    steps_left: int,
    model: LLM,
    precision: torch.dtype,
    procs: Processes,
) -> tuple[bool, str]:
    asked, kind = config.train.compile, procs.device.type
    if asked == "off":
        return False, "as asked for"
    if asked == "on":
        model.compile_blocks(config.micro_batch_size)
        seconds = _try_compiled(config, model, precision, procs, 1)
        return True, f"as asked for; {_took(seconds[0])}"
    if kind not in COMPILE_SECONDS:
        return False, f"not tried on {kind}"
    if was and was["compile"] != "auto":
        if was["compile"] == "on":
            model.compile_blocks(config.micro_batch_size)
            _try_compiled(config, model, precision, procs, 1)
        return was["compile"] == "on", "as this run has had it"
    _seconds_of(config.micro_batch_size, model, precision, procs.device)
    eager = _mean([_seconds_of(config.micro_batch_size, model, precision, procs.device)], procs)
    micro_steps = steps_left * config.grad_accumulation_steps(procs.world_size)
    if eager * micro_steps * LIKELY_GAIN[kind] <= COMPILE_SECONDS[kind]:
        return False, (f"{micro_steps} micro-batches of {eager:.2g} s: compiling would take longer than it saves")
    model.compile_blocks(config.micro_batch_size)
    try:
        first, *later = _try_compiled(config, model, precision, procs, 4)
    except (UserError, PeerError) as error:  # here, or in another process: none compiles
        model.compile_nothing()
        return False, str(error).split(";")[0]
    compiled = _mean(later, procs)
    if compiled > eager * FASTER:
        model.compile_nothing()
        return False, f"a micro-batch takes {compiled:.3g} s compiled and {eager:.3g} s as it is"
    return True, f"a micro-batch takes {compiled:.3g} s instead of {eager:.3g} s; {_took(first)}"


def _took(seconds: float) -> str:
    return f"compiling took {seconds:.1f} s, its results are kept in {os.environ['TORCHINDUCTOR_CACHE_DIR']}"


def _try_compiled(config: Config, model: LLM, precision: torch.dtype, procs: Processes, times: int) -> list[float]:
    """Seconds of each pass of the compiled model; the first compiles. Where one process fails, all raise UserError."""

    def attempt() -> list[float]:
        try:
            return [_seconds_of(config.micro_batch_size, model, precision, procs.device) for _ in range(times)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a missing compiler comes in many guises
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"torch.compile failed: {what}; install a C++ compiler such as g++, or start with --train.compile off"
            ) from error

    return procs.together(attempt)


def _mean(seconds: list[float], procs: Processes) -> float:
    """Of the median of each process: the same number everywhere."""
    return procs.sum([statistics.median(seconds)])[0] / procs.world_size


def _seconds_of(batch_size: int, model: LLM, precision: torch.dtype, device: torch.device) -> float:
    """A forward and backward pass over random tokens."""
    shape = (batch_size, model.config.n_ctx)
    inputs_BT, targets_BT = (torch.randint(model.config.n_vocab, shape, device=device) for _ in range(2))
    started = time.perf_counter()
    with hardware.autocast(device, precision):
        loss = model(inputs_BT, targets_BT)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds
