"""Training steps on the stand-in: `python -m tests.gpu_stand_in.steps SETTINGS` prints one JSON object.

SETTINGS is a JSON object: preset, data (a folder), micro (sequences, or "auto"), compile, deterministic, steps.
Numbers are of the last step, bytes and launches of a micro-batch of two.
"""

import json
import sys

import src  # noqa: F401 (before torch: see there)
from src.utils.handle_ddp import Processes

# isort: split
import ctypes
import os
import re
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

import pretrain
from src.data_processing.shards import read_manifest
from src.data_processing.training_data_loader import TrainingDataLoader, WindowDataset
from src.model_configs.my_llm_config import PRESETS
from src.utils.logger import RunLogger

ACCUMULATION = 2


def main() -> None:
    asked = json.loads(sys.argv[1])
    preset, folder = PRESETS[asked["preset"]](), Path(asked["data"])
    micro = asked.get("micro", preset.micro_batch_size)
    batch = 64 if micro == "auto" else micro * ACCUMULATION
    train = replace(
        preset.train,
        total_steps=1_000,
        micro_batch_size=micro,
        batch_tokens=batch * preset.model.n_ctx,
        compile=asked["compile"],
        deterministic=asked.get("deterministic", False),
    )
    config = replace(preset, train=train, data=replace(preset.data, dir=str(folder)))
    device, manifest, chosen = torch.device("cuda", 0), read_manifest(folder), attention(config)
    torch.backends.cuda.enable_cudnn_sdp(False)  # the real cuDNN finds no GPU
    log = RunLogger(Path(tempfile.mkdtemp()), is_main=False)
    run = pretrain.prepare(config, Processes(0, 0, 1, device), manifest, None, torch.bfloat16, log, lambda: False)
    config = run.config
    windows = WindowDataset(folder, manifest.train, config.model.n_ctx, config.model.n_vocab, at_least=1)
    options = {"seed": 1, "batch_size": config.batch_size, "micro_batch_size": config.micro_batch_size}
    runtime = ctypes.CDLL("libcudart.so.13")
    runtime.stand_in_counts.restype = ctypes.c_char_p
    batches = TrainingDataLoader(windows, **options, rank=0, world_size=1, device=device, first_step=0)
    for _ in range(asked.get("steps", 3)):
        torch.cuda.reset_peak_memory_stats()
        runtime.stand_in_reset()
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            pretrain.train_step(run, batches)
            torch.cuda.set_sync_debug_mode("default")
    lines = (line.rsplit("\t", 1) for line in runtime.stand_in_counts().decode().splitlines())
    counts = {name: int(number) for name, number in lines}
    triton = {name.removeprefix("triton "): n for name, n in counts.items() if name.startswith("triton ")}
    kernels = sum(triton.values()) + counts.get("kernel", 0) + counts.get("matmul", 0)
    print(
        json.dumps(
            {
                "micro_batch_size": config.micro_batch_size,
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "waits": [str(wait.message) for wait in waits if "synchronizing" in str(wait.message)],
                "launches": kernels,
                "triton_gb": round(sum(kernel_gb(triton).values()) / ACCUMULATION, 1),
                "by_kernel": kernel_gb(triton),
                "counts": {name: n for name, n in counts.items() if not name.startswith("triton ")},
                "attention": chosen,
            }
        )
    )


def kernel_gb(launches: dict[str, int]) -> Counter[str]:
    """GB that each Triton kernel reads and writes in all its launches, by Inductor's count."""
    bytes_of: dict[str, float] = {}
    for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.py"):
        for part in path.read_text().split("async_compile.triton(")[1:]:
            name = re.match(r"'(\w+)'", part)
            gb = re.search(r"'kernel_num_gb': ([0-9.e-]+)", part)
            if name and gb:
                bytes_of[name.group(1)] = max(bytes_of.get(name.group(1), 0.0), float(gb.group(1)))
    return Counter({name: n * bytes_of.get(name, 0.0) for name, n in launches.items()})


def attention(config: pretrain.Config) -> str:
    """The attention that PyTorch chooses in training."""
    shape = (config.micro_batch_size, config.model.n_ctx, config.model.n_head, config.model.head_dim)
    q = torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True).transpose(1, 2)
    return ["math", "flash", "efficient", "cudnn"][int(torch._fused_sdp_choice(q, q, q, is_causal=True))]


if __name__ == "__main__":
    main()
