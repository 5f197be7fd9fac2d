"""The golden run: 100 steps of a small fixed configuration, whose losses a change of the code must not change.

python -m tests.golden.run rewrites losses.json, for a change that is meant to change them; say why in the commit.
"""

import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import pretrain
from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from tests.conftest import write_dataset

FILE = Path(__file__).with_name("losses.json")
N_VOCAB = 300
CONFIG = Config(
    run_name="golden",
    model=ModelConfig(n_vocab=N_VOCAB, n_ctx=32, n_embd=48, n_head=4, n_layer=2, residual_dropout=0.0, ffn_dropout=0.0),
    optim=OptimConfig(max_lr=5e-3, warmup_steps=10),
    train=TrainConfig(
        total_steps=100,
        batch_tokens=8 * 32,
        micro_batch_size=4,
        precision="float32",
        compile="off",
        device="cpu",
        log_every_steps=1,
    ),
    eval=EvalConfig(val_every_steps=1_000, val_tokens=32, hellaswag_items=0),
    checkpoint=CheckpointConfig(every_steps=1_000),
)


def losses(folder: Path) -> list[float]:
    """The mean loss of each step, at full precision, of a run under `folder`; the caller sets threads and RUNS."""
    data = write_dataset(folder / "data", train_tokens=[4_000], val_tokens=500, n_vocab=N_VOCAB)
    config = replace(CONFIG, data=DataConfig(dir=str(data)))
    records = map(json.loads, (pretrain.train(config).run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def where() -> dict[str, Any]:
    """What decides the last bits of a sum, as far as PyTorch can tell: machines that agree in it must agree in all."""
    return {
        "torch": torch.__version__.split("+")[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_vendor": _cpu_vendor(),  # MKL goes by it
        "mkl": torch.backends.mkl.is_available(),
    }


def _cpu_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pretrain.RUNS = Path(folder) / "runs"
        found = losses(Path(folder))
    FILE.write_text(json.dumps({"recorded_on": where(), "losses": found}, indent=0) + "\n")


if __name__ == "__main__":
    main()
