"""Measure how long a save delays training: in the foreground and in the background.

python -m benchmarks.checkpoint PRESET --out FOLDER [--saves 5 --micro-batch-size N]

Steps are real, on random tokens of the preset's shapes. Figures are medians without the first save of each kind.

- `save_s`: a save in the foreground.
- `held_up_s`: the time that the loop waits to start a save in the background.
- `step_s` and `step_while_saving_s`: a step without and during a save in the background.
"""

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import print_figures
from src.model import LLM
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.adamw_opt import build_optimizers
from src.model_utils.checkpoint_saver import CheckpointSaver
from src.model_utils.checkpoint_utils import save_checkpoint
from src.model_utils.training_state import Progress, TrainingState
from src.model_utils.weight_init import init_weights
from src.params import Config
from src.utils.errors import exit_with
from src.utils.handle_ddp import processes
from src.utils.hardware import autocast, choose_precision, describe_machine


def main() -> None:
    parser = Parser(prog="python -m benchmarks.checkpoint", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--out", type=Path, required=True, help="folder on the disk to measure; its saves are removed")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--micro-batch-size", type=int)
    args = parser.parse_args()
    preset = PRESETS[args.preset]()
    micro_batch_size = args.micro_batch_size or preset.micro_batch_size
    config = replace(preset, train=replace(preset.train, micro_batch_size=micro_batch_size))
    with processes("auto", timeout_s=600) as procs:
        model = LLM(config.model)
        init_weights(model, config.model, seed=0)
        model.to(procs.device).train()
        state = TrainingState(model, build_optimizers(model, config.optim), Progress())
        precision = choose_precision(config.train.precision, procs.device)
        step = make_step(config, state, procs.device, precision)
        step()
        parts = state.parts(procs)

        def at(step: int) -> dict[str, Any]:
            state.progress.step = step
            return state.plain(config, "", precision, 1)

        foreground = [
            timed(partial(save_checkpoint, args.out / "waited", n, parts, at(n))) for n in range(args.saves + 1)
        ]
        shutil.rmtree(args.out / "waited")
        step_s = [timed(step) for _ in range(5)]
        saver = CheckpointSaver(args.out / "background", config.checkpoint)
        held_up, step_while_saving, seconds = [], [], []
        for number in range(args.saves + 1):
            held_up.append(timed(partial(saver.start, number, parts, at(number))))
            saved = saver.finished()
            while not saved:
                step_while_saving.append(timed(step))
                saved = saver.finished()
            seconds.append(saved[0].seconds)
        saver.close()
        shutil.rmtree(args.out / "background")
        result = {
            "preset": args.preset,
            "bytes": saved[0].bytes,
            "save_s": statistics.median(foreground[1:]),
            "held_up_s": statistics.median(held_up[1:]),
            "held_up_of_save": statistics.median(held_up[1:]) / statistics.median(foreground[1:]),
            "background_save_s": statistics.median(seconds[1:]),
            "step_s": statistics.median(step_s),
            "step_while_saving_s": statistics.median(step_while_saving[:-1] or step_while_saving),
            "machine": describe_machine(procs.device),
        }
    print_figures(result)


def make_step(config: Config, state: TrainingState, device: torch.device, precision: torch.dtype) -> Callable[[], None]:
    """Return a function that takes one optimizer step on a micro-batch of random tokens."""
    shape = (config.micro_batch_size, config.model.n_ctx)
    inputs_BT, targets_BT = (torch.randint(config.model.n_vocab, shape, device=device) for _ in range(2))

    def step() -> None:
        with autocast(device, precision):
            loss = state.model(inputs_BT, targets_BT)
        loss.backward()
        for optimizer in state.optimizers:
            optimizer.step()
        state.model.zero_grad()
        loss.item()

    return step


def timed(action: Callable[[], object]) -> float:
    """Return the seconds of `action`, including work queued on a GPU."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    exit_with(main)
