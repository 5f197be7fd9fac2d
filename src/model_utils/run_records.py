"""What a run says about itself: the content of config.json, and of a training line in metrics.jsonl."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import torch

from src.model import LLM
from src.model_utils.debugging import count_parameters, flops_per_token
from src.model_utils.training_state import Progress
from src.params import Config, to_dict
from src.utils import hardware
from src.utils.handle_ddp import Processes


def run_settings(
    config: Config, procs: Processes, model: LLM, precision: torch.dtype, dataset: dict[str, Any]
) -> dict[str, Any]:
    """Every setting, what follows from it, versions and machine, as plain data. `dataset` describes the data."""
    parameters = count_parameters(model)
    packages = ("torch", "numpy", "tiktoken", "safetensors")
    return {
        "config": to_dict(config),
        "derived": {
            "total_steps": config.total_steps,
            "warmup_steps": config.warmup_steps,
            "grad_accumulation_steps": config.grad_accumulation_steps(procs.world_size),
            "world_size": procs.world_size,
            "parameters": parameters,
            "parameters_without_embedding": parameters - model.embedding.weight.numel(),
            "flops_per_token": flops_per_token(config.model, parameters),
            "precision": str(precision).removeprefix("torch."),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": hardware.describe_machine(procs.device),
        "dataset": dataset,
        "command": shlex.join(sys.argv),
        "launch": os.environ.get("LAUNCH_ID"),
    }


def settings_in_words(settings: dict[str, Any], train_tokens: int) -> str:
    """The same in two lines, for the start of a log. `train_tokens`: those of the dataset."""
    config, derived, machine = settings["config"], settings["derived"], settings["machine"]
    train = config["train"]
    epochs = derived["total_steps"] * train["batch_tokens"] / train_tokens
    return (
        f"run {config['run_name']}: {derived['parameters']:,} parameters, {derived['total_steps']} steps of "
        f"{train['batch_tokens']:,} tokens: {epochs:.2g} times the {train_tokens:,} of {config['data']['dir']}\n"
        f"on {derived['world_size']} x {machine.get('gpu') or machine['cpu']} ({machine['device']}), "
        f"micro-batch {train['micro_batch_size']} x {config['model']['n_ctx']}, "
        f"{derived['grad_accumulation_steps']} accumulation step(s)"
    )


def training_record(
    config: Config, progress: Progress, model: LLM, procs: Processes, precision: torch.dtype
) -> dict[str, Any]:
    """Loss and speed since the last training line, evaluations and saves left out."""
    step_seconds = progress.seconds / progress.loss_steps
    rate = config.train.batch_tokens / step_seconds
    peak = hardware.peak_tflops(procs.device, precision)
    flops = rate * flops_per_token(config.model, count_parameters(model))
    return {
        "loss": progress.loss_sum / progress.loss_steps,
        "tokens_per_second": rate,
        "step_ms": step_seconds * 1e3,
        "mfu": flops / (peak * 1e12 * procs.world_size) if peak else None,
        "memory_gb": hardware.memory_gb(procs.device),
        "tokens_seen": progress.step * config.train.batch_tokens,
    }
