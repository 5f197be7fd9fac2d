"""The settings of a run as plain data, for config.json, and as three lines for the start of its log."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import torch

from src.model import LLM
from src.model_utils.debugging import count_parameters, flops_per_token
from src.params import Config, to_dict
from src.utils import hardware
from src.utils.handle_ddp import Processes


def run_settings(
    config: Config, procs: Processes, model: LLM, precision: torch.dtype, dataset: dict[str, Any]
) -> dict[str, Any]:
    """Every setting, the numbers derived from it, versions and machine. `dataset` describes the data."""
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


def summary(settings: dict[str, Any], train_tokens: int) -> str:
    """The most important settings in three lines. `train_tokens`: of the dataset."""
    config, derived, machine = settings["config"], settings["derived"], settings["machine"]
    train = config["train"]
    epochs = derived["total_steps"] * train["batch_tokens"] / train_tokens
    others = "" if derived["precision"] == "float32" else "; weights, norms, softmax, loss and optimizer in float32"
    return (
        f"run {config['run_name']}: {derived['parameters']:,} parameters, {derived['total_steps']} steps of "
        f"{train['batch_tokens']:,} tokens, {epochs:.2g} epochs of dataset {config['data']['dir']} "
        f"({train_tokens:,} tokens)\n"
        f"on {derived['world_size']} x {machine.get('gpu') or machine['cpu']} ({machine['device']}), "
        f"micro-batch {train['micro_batch_size']} x {config['model']['n_ctx']}, "
        f"{derived['grad_accumulation_steps']} accumulation step(s)\n"
        f"precision: matmuls in {derived['precision']}{others}"
    )
