"""Measurements and checks in short runs that need a GPU. benchmarks/on_gpu.sh runs all of them.

python -m benchmarks.gpu_parts PART PRESET --data DATASET --batch-tokens N [--out FOLDER]

uncompiled, compiled   20 steps: the medians of speed, MFU and memory, and the last loss
profile                a profile of two steps, copied to --out
plain_model            losses and gradients of compiled blocks and fused loss, compared with the plain model's
skip                   a non-finite loss changes no weights, with both optimizers
texts                  speed of sampling and scoring with our choice of attention kernels, and with PyTorch's
same_bits              a deterministic run, resumed halfway, is bit-identical to an uninterrupted one; its speed
waits                  the operators of each step that wait for the device
nccl                   one process under torchrun with NCCL, or Gloo on a CPU, saved and resumed
auto_micro_batch       the micro-batch that --train.micro-batch-size auto chooses
"""

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F

import pretrain
from benchmarks import print_figures
from src.model import LLM
from src.model_assessment import hellaswag, sampling
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS, fast_model
from src.model_utils.autotune import CompiledForward
from src.model_utils.weight_init import init_weights
from src.params import CheckpointConfig, Config
from src.utils.errors import exit_with
from src.utils.hardware import autocast, choose_device, describe_machine
from src.utils.root import ROOT, RUNS

Result = dict[str, Any]


def main() -> None:
    parser = Parser(
        prog="python -m benchmarks.gpu_parts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", default="pydocs", help="a dataset's name or folder")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--out", type=Path, default=RUNS, help="folder for the profile")
    args = parser.parse_args()
    print_figures(PARTS[args.part](args) | {"machine": describe_machine(choose_device("auto"))})


def short(args: argparse.Namespace, name: str, steps: int, **changes: Any) -> Config:
    """Return the preset with little evaluation, as run gpu-NAME. Remove an earlier run of that name."""
    shutil.rmtree(RUNS / f"gpu-{name}", ignore_errors=True)
    preset = PRESETS[args.preset]()
    train = {"total_steps": steps, "batch_tokens": args.batch_tokens, "log_every_steps": 1, **changes}
    return replace(
        preset,
        run_name=f"gpu-{name}",
        data=replace(preset.data, dir=args.data),
        train=replace(preset.train, **train),
        eval=replace(preset.eval, val_tokens=args.batch_tokens, hellaswag_items=0, sample_prompts=()),
        checkpoint=CheckpointConfig(every_steps=max(1, steps // 2)),
    )


def finished(config: Config) -> Path:
    """Train; return the run's folder."""
    outcome = pretrain.train(config)
    gc.collect()  # the next run needs the memory
    return outcome.run_dir


def training_lines(run_dir: Path) -> list[Result]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "train"]


def speed(run_dir: Path) -> Result:
    """Return medians over the training lines, without the first two, which compile and warm up."""
    lines = training_lines(run_dir)[2:]
    names = [n for n in ("step_ms", "tokens_per_second", "mfu", "memory_gb") if lines[0][n] is not None]
    return {n: statistics.median(line[n] for line in lines) for n in names} | {"last_loss": lines[-1]["loss"]}


def twenty(args: argparse.Namespace, compiling: Literal["on", "off"]) -> Result:
    return speed(finished(short(args, f"compile-{compiling}", 20, compile=compiling)))


def profile(args: argparse.Namespace) -> Result:
    run_dir = finished(replace(short(args, "profile", 6), profile=2))
    copied = shutil.copytree(run_dir / "profile", args.out / "profile", dirs_exist_ok=True)
    return {"files": sorted(path.name for path in copied.iterdir())}


def plain_model(_: argparse.Namespace) -> Result:
    device, result = choose_device("auto"), {}
    for name in ("faithful", "fast"):
        shape = replace(PRESETS["lf_llm_269m"]().model, n_ctx=256, n_embd=512, n_head=8, n_layer=2)
        if name == "fast":
            shape = replace(fast_model(shape), zero_init=False)  # zero projections would hide most gradients
        model = LLM(replace(shape, residual_dropout=0.0, ffn_dropout=0.0))
        init_weights(model, shape, seed=0)
        model.to(device)
        ids = torch.randint(shape.n_vocab, (8, 257), device=device)

        def plain(inputs: torch.Tensor, targets: torch.Tensor, model: LLM = model) -> torch.Tensor:
            return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())

        for dtype in (torch.float32, torch.bfloat16):
            values = []
            for forward in (plain, CompiledForward(model)):
                with autocast(device, dtype):
                    loss = forward(ids[:, :-1], ids[:, 1:])
                values.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
            errors = [float((ours - theirs).norm() / theirs.norm()) for theirs, ours in zip(*values, strict=True)]
            result[f"{name} {str(dtype)[6:]}"] = {
                "loss": float(values[1][0]),
                "loss_error": errors[0],
                "largest_gradient_error": max(errors[1:]),
            }
    return result


def skip(args: argparse.Namespace) -> Result:
    original, steps = pretrain.train_step, 0

    def train_step(run: pretrain.Run, batches: Iterator[Any]) -> pretrain.StepResult:
        nonlocal steps
        steps += 1
        if steps % 4 != 2:
            return original(run, batches)
        before = [p.detach().clone() for p in run.state.model.parameters()]
        broken = replace(run, forward=lambda x, y: run.forward(x, y) * float("nan"))  # type: ignore[arg-type]
        result = original(broken, batches)
        after = run.state.model.parameters()
        assert "not finite" in result.skipped
        assert all(bool((a == b).all()) for a, b in zip(before, after, strict=True))
        return result

    for optimizer in ("adamw", "muon"):
        config = short(args, f"skip-{optimizer}", 4, compile="off")
        with patch.object(pretrain, "train_step", train_step):
            finished(replace(config, optim=replace(config.optim, optimizer=optimizer)))
    return {"skipped_steps_changed_nothing": True}


def texts(args: argparse.Namespace) -> Result:
    device, shape = choose_device("auto"), PRESETS[args.preset]().model
    model = LLM(shape)
    init_weights(model, shape, seed=0)
    model.to(device).eval()
    # Endings and contexts of many lengths, like HellaSwag's.
    questions = [(list(range(40 + i % 50)), [list(range(10 + i % 20))] * 4) for i in range(400)]
    settings = sampling.SamplingConfig(max_new_tokens=100)
    counts: dict[str, Callable[[], int]] = {
        "tokens_per_second": lambda: sum(1 for _ in sampling.generate(model, [[1, 2, 3]], settings, [0])),
        "endings_per_second": lambda: 4 * len(hellaswag.score_endings(model, questions)),
    }
    ours, result = sampling.attention_for_any_shape, {}
    for name, context in (("ours", ours), ("pytorchs", nullcontext)):
        with (
            patch.object(sampling, "attention_for_any_shape", context),
            patch.object(hellaswag, "attention_for_any_shape", context),
            autocast(device, torch.bfloat16),
        ):
            for unit, count in counts.items():
                started = time.perf_counter()
                result[f"{unit}_{name}"] = round(count() / (time.perf_counter() - started), 1)
    return result


def same_bits(args: argparse.Namespace) -> Result:
    whole = finished(short(args, "whole", 8, deterministic=True))
    config = short(args, "halves", 8, deterministic=True)
    finished(config)
    halves = finished(replace(config, resume="4"))
    weights = [(folder / "checkpoints/step_0000008/model.safetensors").read_bytes() for folder in (whole, halves)]
    return {"same_bits": weights[0] == weights[1], "deterministic": speed(whole)}


def waits(args: argparse.Namespace) -> Result:
    original, counts = pretrain.train_step, []

    def train_step(run: pretrain.Run, batches: Iterator[Any]) -> pretrain.StepResult:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            result = original(run, batches)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(each.message) for each in caught))
        return result

    with patch.object(pretrain, "train_step", train_step):
        finished(short(args, "waits", 4))
    return {"waits_of_each_step": counts}


def nccl(args: argparse.Namespace) -> Result:
    name = short(args, "nccl", 4).run_name
    command = [sys.executable, "-m", "src.utils.torchrun", "--standalone", "--nproc-per-node", "1", "pretrain.py"]
    command += [args.preset, "--run-name", name, "--data.dir", args.data, "--train.total-steps", "4"]
    command += ["--train.batch-tokens", str(args.batch_tokens), "--eval.val-tokens", str(args.batch_tokens)]
    command += ["--eval.hellaswag-items", "0", "--eval.sample-prompts", "--checkpoint.every-steps", "2"]
    for resume in ("never", "2"):
        subprocess.run([*command, "--resume", resume], cwd=ROOT, check=True, stdout=sys.stderr)
    return {"saved_and_resumed": True}


def auto_micro_batch(args: argparse.Namespace) -> Result:
    preset = PRESETS[args.preset]().train
    run_dir = finished(short(args, "auto", 2, micro_batch_size="auto", batch_tokens=preset.batch_tokens))
    lines = (run_dir / "log.txt").read_text().splitlines()
    return {"chosen": next(line for line in lines if "micro-batch: " in line)}


PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "uncompiled": lambda args: twenty(args, "off"),
    "compiled": lambda args: twenty(args, "on"),
    "profile": profile,
    "plain_model": plain_model,
    "skip": skip,
    "texts": texts,
    "same_bits": same_bits,
    "waits": waits,
    "nccl": nccl,
    "auto_micro_batch": auto_micro_batch,
}

if __name__ == "__main__":
    exit_with(main)
