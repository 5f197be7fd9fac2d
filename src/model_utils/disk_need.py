"""What checkpoints take of a disk: one of them, and all that the rest of a run will hold at once."""

from pathlib import Path

import torch

from src.model import LLM
from src.model_utils.checkpoint_utils import checkpoint_steps, step_dir
from src.params import Config
from src.utils.errors import StorageError
from src.utils.files import bytes_below, free_bytes, size_text

_HEADER_BYTES = 140  # of a tensor in a safetensors file: its name, type, shape and place
_SMALL_FILES_BYTES = 12_000  # a process's random states, state.json and manifest.json
MAKE_ROOM = (
    "make room, set TEMP_DATA_DIR to another disk, or keep fewer checkpoints with --checkpoint.keep-last and "
    "--checkpoint.keep-every-steps"
)


def checkpoint_bytes(config: Config) -> int:
    """Roughly the bytes of one checkpoint: float32 weights, AdamW's two moments of each, and small files."""
    with torch.device("meta"):
        model = LLM(config.model)
    weights = [*model.parameters()]
    moments = [*model.parameters()] * 2
    tensors = len(weights) + len(moments) + len(moments) // 2  # AdamW also counts each parameter's steps
    content = sum(tensor.numel() * tensor.element_size() for tensor in weights + moments)
    return content + tensors * _HEADER_BYTES + _SMALL_FILES_BYTES


def checkpoints_need(config: Config, root: Path) -> int:
    """Bytes that the run will need under `root`, its checkpoints folder, besides those that lie there now.

    The most it will ever hold at once, the one being written included, less what it holds now: what it will remove on
    the way is not needed again. Checkpoints that it sets aside, to go on from an earlier step or to start anew, stay.
    """
    size, resume, every = checkpoint_bytes(config), config.resume, config.checkpoint.every_steps
    now = {step: bytes_below(step_dir(root, step)) for step in checkpoint_steps(root) if resume != "never"}
    if resume.isdecimal():
        now = {step: held for step, held in now.items() if step <= int(resume)}
    start = max(now, default=0)
    planned = [*range(start - start % every + every, config.total_steps, every)]
    planned += [config.total_steps] if start < config.total_steps else []
    if not planned:
        return 0
    # The number held never falls from one save to the next, but at the first, if fewer are to be kept than before.
    before_last = _kept([*now, *planned[:-1]], config) if len(planned) > 1 else [*now]
    at_last_save = sum(now.get(step, size) for step in before_last) + size
    held_now = sum(now.values())
    leftovers = sum(bytes_below(path) for path in root.glob("step_*.*-*") if ".set-aside-" not in path.name)
    return max(0, max(held_now + size, at_last_save) - held_now - leftovers)


def refuse_full_disk(config: Config, run_dir: Path) -> None:
    """Raises StorageError where the checkpoints that the run will hold cannot fit on the disk of `run_dir`."""
    needed, free = checkpoints_need(config, run_dir / "checkpoints"), free_bytes(run_dir)
    if needed > free:
        raise StorageError(
            f"the disk of {run_dir} is too small for the run's checkpoints: they need {needed:,} bytes more, {free:,} "
            f"are free, and one takes {size_text(checkpoint_bytes(config))}; {MAKE_ROOM}"
        )


def _kept(steps: list[int], config: Config) -> list[int]:
    """Those of `steps`, in order, that are left after the last of them was saved."""
    keep_last, keep_every = config.checkpoint.keep_last, config.checkpoint.keep_every_steps
    return [step for step in steps[:-keep_last] if keep_every and step % keep_every == 0] + steps[-keep_last:]
