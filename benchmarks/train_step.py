"""Compare a training step with others: forward, backward, clipping and optimizer.

python -m benchmarks.train_step PRESET --data DATASET [--micro-batch-size N --rounds N --steps N]

All variants start from the same weights and train on the same batches of real text. Learning rates and precision are
the same, and dropout is off except in one. The benchmark fails if the losses of the others differ. A line on stderr
appears when each variant ends. The variants:

ours                   `pretrain.train_step` with --train.compile on
ours_eager             the same with --train.compile off
ours_dropout           ours with the published recipe's dropout
ours_float32_logits    ours with the plain loss, from float32 logits of all positions
llama                  transformers' Llama or Qwen3 of the same shape with fused AdamW
llama_compiled         the same in torch.compile
reference              the reference implementation: full float32 logits, and rotary tables made on the CPU and moved to
                       the device in every layer. On a GPU it has torch.compile and fused AdamW, on a CPU neither.

On a CPU the variants take turns, so that other load affects all alike. On a GPU each variant has all the memory. Each
figure is the median over rounds of the mean of `--steps` steps. `first_step_s` is the first step, which compiles.
`matmul_tflops` is the speed of square matrix products in the same precision, measured between the rounds.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

import pretrain
from benchmarks import print_figures
from src import model as our_model
from src.data_processing.shards import read_manifest
from src.data_processing.training_data_loader import TrainingDataLoader, WindowDataset
from src.model import LLM
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.adamw_opt import build_optimizers, set_learning_rate
from src.model_utils.debugging import count_parameters, flops_per_token
from src.model_utils.llama_format import llama_settings, llama_tensors
from src.model_utils.weight_init import init_weights
from src.params import Config
from src.rope import apply_rope
from src.utils import hardware
from src.utils.errors import exit_with, say
from src.utils.handle_ddp import Processes
from src.utils.logger import RunLogger
from src.utils.root import dataset_dir

Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[Batch], float]
"""Takes one optimizer step and returns its loss as a float, which waits for the device."""


@dataclass
class Timing:
    first_step_s: float = 0.0
    rounds_ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory_gb: float | None = None


def main() -> None:
    parser = Parser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", default="pydocs", help="a dataset's name or folder")
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    device = hardware.choose_device("auto")
    preset = PRESETS[args.preset]()
    micro_batch_size = args.micro_batch_size or preset.micro_batch_size
    steps = 1 + args.rounds * args.steps
    config = replace(
        preset,
        model=replace(preset.model, residual_dropout=0.0, ffn_dropout=0.0),
        data=replace(preset.data, dir=args.data),
        optim=replace(preset.optim, warmup_steps=0),
        train=replace(
            preset.train,
            total_steps=steps,
            micro_batch_size=micro_batch_size,
            batch_tokens=micro_batch_size * preset.model.n_ctx,
        ),
    )
    precision = hardware.choose_precision(args.precision, device)
    batches = real_batches(config, steps, device)
    timings: dict[str, Timing] = {name: Timing() for name in args.variants}
    rates: list[float] = []
    groups = [list(timings)] if device.type == "cpu" else [[name] for name in timings]
    for names in groups:
        run_group({name: partial(VARIANTS[name], config, precision, device) for name in names}, timings, batches, args)
        rates.append(matmul_tflops(device, precision))
        for name in names:
            step_ms, memory_gb = statistics.median(timings[name].rounds_ms), timings[name].memory_gb
            say(f"{name}: {step_ms:.1f} ms per step, first {timings[name].first_step_s:.1f} s, {memory_gb or 0:.1f} GB")
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    check_losses(timings)
    print_figures(report(args, config, device, precision, timings, statistics.median(rates)))


def run_group(
    builders: dict[str, Callable[[], Step]], timings: dict[str, Timing], batches: list[Batch], args: argparse.Namespace
) -> None:
    """Time the variants in turns, one round each."""
    device = batches[0][0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = {name: build() for name, build in builders.items()}
    turns = iter(batches)
    first = next(turns)
    for name, step in steps.items():
        started = time.perf_counter()
        timings[name].losses.append(step(first))
        timings[name].first_step_s = time.perf_counter() - started
    for _ in range(args.rounds):
        chunk = [next(turns) for _ in range(args.steps)]
        for name, step in steps.items():
            started = time.perf_counter()
            timings[name].losses += map(step, chunk)
            timings[name].rounds_ms.append((time.perf_counter() - started) * 1e3 / len(chunk))
    if device.type == "cuda":
        for name in steps:
            timings[name].memory_gb = torch.cuda.max_memory_allocated() / 1e9


def real_batches(config: Config, steps: int, device: torch.device) -> list[Batch]:
    """Return the first `steps` micro-batches of a run on the dataset, on the device."""
    folder = dataset_dir(config.data.dir)
    manifest = read_manifest(folder)
    windows = WindowDataset(folder, manifest.train, config.model.n_ctx, config.model.n_vocab, at_least=1)
    loader = TrainingDataLoader(
        windows,
        seed=config.train.seed,
        batch_size=config.micro_batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=0,
        world_size=1,
        device=device,
        first_step=0,
    )
    return [(inputs.contiguous(), targets.contiguous()) for inputs, targets in islice(loader, steps)]


def ours(
    config: Config,
    precision: torch.dtype,
    device: torch.device,
    compile_setting: Literal["on", "off"] = "on",
    float32_logits: bool = False,
    dropout: bool = False,
) -> Step:
    """Return the training loop's step, in a run with temporary files."""
    if dropout:
        config = replace(config, model=replace(config.model, residual_dropout=0.1, ffn_dropout=0.15))
    with tempfile.TemporaryDirectory() as folder:
        run = pretrain.prepare(
            replace(config, train=replace(config.train, compile=compile_setting)),
            Processes(rank=0, local_rank=0, world_size=1, device=device),
            read_manifest(dataset_dir(config.data.dir)),
            checkpoint=None,
            precision=precision,
            log=RunLogger(Path(folder), is_main=False),
            stop=lambda: False,
        )

    def step(batch: Batch) -> float:
        original = our_model.linear_cross_entropy
        try:
            if float32_logits:
                our_model.linear_cross_entropy = plain_cross_entropy  # type: ignore[assignment]
            result = pretrain.train_step(run, iter([batch]))
        finally:
            our_model.linear_cross_entropy = original
        assert not result.skipped, "a skipped step does less work"
        return result.loss

    return step


def plain_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, *_: object
) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N)


def llama(config: Config, precision: torch.dtype, device: torch.device, compiled: bool = False) -> Step:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**llama_settings(config.model))
    )
    model.load_state_dict(llama_tensors(dict(first_weights(config).named_parameters())))
    model.to(device).train()
    forward = torch.compile(model) if compiled else model

    def loss_of(batch: Batch) -> torch.Tensor:
        inputs_BT, targets_BT = batch
        return forward(input_ids=inputs_BT, labels=targets_BT, shift_labels=targets_BT, use_cache=False).loss

    return plain_step(model, build_optimizers(model, config.optim), loss_of, config, precision, device)


def reference(config: Config, precision: torch.dtype, device: torch.device) -> Step:
    model = first_weights(config).to(device).train()
    fast = device.type == "cuda"
    optimizers = build_optimizers(model, config.optim)
    if config.optim.optimizer == "adamw":
        groups = [{key: g[key] for key in ("params", "weight_decay", "max_lr")} for g in optimizers[0].param_groups]
        betas = (config.optim.beta1, config.optim.beta2)
        optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fast or None)]
    forward = torch.compile(reference_loss) if fast else reference_loss
    return plain_step(model, optimizers, lambda batch: forward(model, batch), config, precision, device)


def reference_loss(model: Any, batch: Batch) -> torch.Tensor:
    inputs_BT, targets_BT = batch
    B, T = inputs_BT.shape
    config = model.config
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.outer(torch.arange(config.n_ctx), config.rope_theta**-exponents)
    cos, sin = torch.cos(angles), torch.sin(angles)
    x_BTD = model.embedding(inputs_BT)
    for block in model.blocks:
        qkv = block.attn.qkv_proj(block.attn_norm(x_BTD)).view(B, T, 3, config.n_head, config.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = apply_rope(q, cos[:T].to(q.device), sin[:T].to(q.device))
        k = apply_rope(k, cos[:T].to(k.device), sin[:T].to(k.device))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, config.n_embd)
        x_BTD = x_BTD + block.attn.out_proj(y)
        value, gate = block.ffn.in_proj(block.ffn_norm(x_BTD)).chunk(2, dim=-1)
        x_BTD = x_BTD + block.ffn.out_proj(value * F.silu(gate))
    logits_BTV = F.linear(model.norm(x_BTD), model.embedding.weight)
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


VARIANTS: dict[str, Callable[[Config, torch.dtype, torch.device], Step]] = {
    "ours": ours,
    "ours_eager": partial(ours, compile_setting="off"),
    "ours_dropout": partial(ours, dropout=True),
    "ours_float32_logits": partial(ours, float32_logits=True),
    "llama": llama,
    "llama_compiled": partial(llama, compiled=True),
    "reference": reference,
}


def first_weights(config: Config) -> LLM:
    """Return a model with the initial weights of a run of `config`."""
    model = LLM(config.model)
    init_weights(model, config.model, config.train.seed)
    return model


def plain_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_of: Callable[[Batch], torch.Tensor],
    config: Config,
    precision: torch.dtype,
    device: torch.device,
) -> Step:
    """Return a plain training step, with the learning rates of our schedule."""
    steps = iter(range(config.total_steps))

    def step(batch: Batch) -> float:
        set_learning_rate(optimizers, next(steps), config.total_steps, config.warmup_steps, config.optim)
        with hardware.autocast(device, precision):
            loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        return loss.item()

    return step


def matmul_tflops(device: torch.device, precision: torch.dtype) -> float:
    """Return TFLOP/s of the product of two square matrices: the median of 9, after one that is not counted."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:]) / 1e12


def check_losses(timings: dict[str, Timing]) -> None:
    """Raise SystemExit unless all variants without dropout have the same loss at each step, up to bf16 rounding."""
    names = [name for name in timings if name != "ours_dropout"]
    for step, losses in enumerate(zip(*(timings[name].losses for name in names), strict=True)):
        low, high = min(losses), max(losses)
        if high - low > 0.01 * high:
            raise SystemExit(f"Cannot compare: losses differ at step {step}: {dict(zip(names, losses, strict=True))}")


def report(
    args: argparse.Namespace,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
    timings: dict[str, Timing],
    matmul: float,
) -> dict[str, Any]:
    tokens = config.train.batch_tokens
    parameters = count_parameters(first_weights(config))
    flops = flops_per_token(config.model, parameters)
    peak = hardware.peak_tflops(device, precision)
    variants: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        step_ms = statistics.median(timing.rounds_ms)
        tflops = flops * tokens / step_ms / 1e9
        variants[name] = {
            "step_ms": round(step_ms, 2),
            "rounds_ms": [round(ms, 1) for ms in timing.rounds_ms],
            "tokens_per_second": round(tokens / step_ms * 1e3, 1),
            "tflops": round(tflops, 4),
            "of_matmul_rate": round(tflops / matmul, 3),
            "mfu": round(tflops / peak, 4) if peak else None,
            "memory_gb": timing.memory_gb,
            "first_step_s": round(timing.first_step_s, 2),
            "last_loss": timing.losses[-1],
        }
    ours_ms = variants["ours"]["step_ms"] if "ours" in variants else None
    return {
        "preset": args.preset,
        "parameters": parameters,
        "flops_per_token": flops,
        "batch": [config.micro_batch_size, config.model.n_ctx],
        "precision": str(precision).removeprefix("torch."),
        "rounds": args.rounds,
        "steps": args.steps,
        "matmul_tflops": round(matmul, 4),
        "variants": variants,
        "speed_of_ours": {name: round(v["step_ms"] / ours_ms, 3) for name, v in variants.items()} if ours_ms else None,
        "torch": torch.__version__,
        "machine": hardware.describe_machine(device),
    }


if __name__ == "__main__":
    exit_with(main)
