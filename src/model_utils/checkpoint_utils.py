"""Checkpoints: named tensors and plain data <-> a directory that can be verified.

`checkpoints/step_0000050/` holds safetensors files, state.json, and manifest.json with the size and sha256 of each. The
hashes are computed from memory, so they also reveal changes by the disk. A save writes into `step_0000050.tmp-<pid>`,
syncs every file, writes the manifest last, renames, reads everything back from disk, and only then removes older
checkpoints. A directory under its final name is never written to again. Nothing here is unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from src.params import MAX_STEPS, ConfigError, from_dict
from src.utils.errors import StorageError, UserError, cause_of
from src.utils.files import fingerprint, free_bytes, lies_in, move, read_json, storage_errors, sync
from src.utils.root import instead_of

STEP_NAME = re.compile(r"step_([0-9]{7,})")
_LEFTOVER = re.compile(r"step_[0-9]{7,}\.(tmp|removed)-[0-9]+")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; `open_checkpoint` also verifies its files."""

    path: Path
    step: int
    state: dict[str, Any]
    """The plain data of state.json."""

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of `name`.safetensors, mapped from the file. Raises UserError if they cannot be read."""
        try:
            return load_file(self.path / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise UserError(f"Cannot read {self.path / name}.safetensors: {cause_of(error)}.") from None


def step_dir(root: Path, step: int) -> Path:
    """The folder of the checkpoint of `step` under `root`, a run's checkpoints folder."""
    return root / f"step_{step:07d}"


def save_checkpoint(root: Path, step: int, parts: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> int:
    """Saves `parts` (file name to tensors) and `state` as the checkpoint of `step`; returns its bytes.

    When it returns, the checkpoint is on disk and has been verified by reading it back. Raises StorageError.
    """
    final = step_dir(root, step)
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        files = {f"{name}.safetensors": _write_tensors(temporary, name, tensors) for name, tensors in parts.items()}
        files["state.json"] = _write_json(temporary / "state.json", {"step": step, **state})
        _write_json(temporary / "manifest.json", {"step": step, "files": files})  # last: it makes the checkpoint valid
        sync(temporary)  # the names of the files, before the folder gets its own
        os.rename(temporary, final)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(t.numel() * t.element_size() for tensors in parts.values() for t in tensors.values())
        raise StorageError(
            f"Cannot save the checkpoint of step {step} in {root}: {cause_of(error)}. It needs {needed:,} bytes, "
            f"{free_bytes(root):,} are free; earlier ones are untouched. To resume, fix that and rerun."
        ) from error
    if problem := damage(final, from_disk=True):
        raise StorageError(
            f"Cannot trust the checkpoint just saved: {final}: {problem}. Earlier ones are untouched. Check the disk, "
            "then rerun to resume."
        )
    return sum(int(entry["bytes"]) for entry in files.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in `path`, a step_* directory, with every file verified. Raises UserError naming a bad file."""
    if problem := damage(path):
        raise UserError(f"Cannot use the checkpoint {path}: {problem}.")
    return read_unverified(path)


def read_unverified(path: Path) -> Checkpoint:
    """The checkpoint in `path`; its tensors may be damaged. Raises UserError for a damaged state.json."""
    try:
        state = read_json(path / "state.json")
    except OSError as error:
        raise UserError(f"Cannot read {path / 'state.json'}: {cause_of(error)}. Restore it from a copy.") from None
    if problem := _wrong_claim(path, state):
        raise UserError(f"Cannot use {path / 'state.json'}: {problem}. Restore it from a copy.")
    return Checkpoint(path, state["step"], state)


def newest_checkpoint(root: Path, remedy: str = "") -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint under `root` that verifies, and the damage of each newer one.

    None if `root` holds no checkpoint. Raises UserError if it holds some but none verifies, because silently starting
    over would hide the loss. `remedy`: an alternative to restoring one, for the message.
    """
    rejected = []
    for step in reversed(checkpoint_steps(root)):
        if problem := damage(step_dir(root, step)):
            rejected.append(f"{step_dir(root, step)}: {problem}")
        else:
            return read_unverified(step_dir(root, step)), rejected
    if rejected:
        raise UserError(
            "Cannot use any checkpoint of this run:\n  - "
            + "\n  - ".join(rejected)
            + "\nRestore one from a copy"
            + remedy
            + "."
        )
    return None, []


def find_checkpoint(path: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that `--checkpoint` names: a step_* directory, or a run directory's newest good one.

    Also returns the damage of newer ones. Raises UserError if none can be used.
    """
    if STEP_NAME.fullmatch(path.name) and os.path.exists(path):
        return open_checkpoint(path), []
    root = path if path.name == "checkpoints" else path / "checkpoints"
    if not os.path.isdir(root) and not os.path.exists(path / "log.txt"):  # a run that has begun has a log
        cause = "is not a run, a step_* folder or an export" if os.path.exists(path) else "does not exist"
        raise UserError(
            f"Cannot load a checkpoint: {path} {cause}. Give a run (its folder, or its name under temp_data/runs), one "
            "of its checkpoints/step_* folders, or an exported folder." + instead_of(path)
        )
    checkpoint, rejected = newest_checkpoint(root)
    if checkpoint is None:
        raise UserError(f"Cannot load a checkpoint: {root} holds none yet. Train first, or wait for the first save.")
    return checkpoint, rejected


def checkpoint_steps(root: Path) -> list[int]:
    """The steps that have a directory under `root`, damaged or not, in order."""
    if not root.is_dir():
        return []
    with storage_errors(root, "read"):
        return sorted(int(match[1]) for entry in root.iterdir() if (match := STEP_NAME.fullmatch(entry.name)))


def prune(root: Path, keep_last: int, keep_every_steps: int, verified: set[int]) -> None:
    """Removes all but the newest `keep_last` checkpoints and the multiples of `keep_every_steps`, if that is not 0.

    Keeps more if fewer than two of them verify. `verified`: steps known to verify; those that it had to read are added.
    """
    steps = checkpoint_steps(root)
    doomed = [step for step in steps[:-keep_last] if not (keep_every_steps and step % keep_every_steps == 0)]
    if not doomed:
        return
    sound = 0
    for step in reversed(steps):
        if sound < 2 and (step in verified or damage(step_dir(root, step)) is None):
            verified.add(step)
            sound += 1
        elif step in doomed:
            # Renamed first: an interrupted removal must not look like a damaged checkpoint.
            path = step_dir(root, step)
            removed = move(path, path.with_name(f"{path.name}.removed-{os.getpid()}"))
            shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(root: Path) -> list[str]:
    """Removes the leftovers of an interrupted save or removal under `root`; returns their names."""
    if not root.is_dir():
        return []
    names = sorted(entry.name for entry in root.iterdir() if _LEFTOVER.fullmatch(entry.name))
    for name in names:
        shutil.rmtree(root / name, ignore_errors=True)
    return names


def damage(path: Path, from_disk: bool = False) -> str | None:
    """The first problem of the checkpoint directory `path`, or None if every file verifies.

    `from_disk`: see `fingerprint`. Raises StorageError for missing read permission, which is not damage.
    """
    name = "manifest.json"
    try:
        manifest = read_json(path / name)
        files = {file: (entry["bytes"], entry["sha256"]) for file, entry in manifest["files"].items()}
        if not _is_step_of(path, step := manifest["step"]):
            return f"it holds step {repr(step)[:80]}, but its name says otherwise"
        for name, (size, sha256) in files.items():
            # A file outside this folder may change or vanish.
            if not lies_in(path, name):
                return f"manifest.json lists {name!r}, which is not in this folder"
            actual = fingerprint(path / name, from_disk)
            if actual["bytes"] != size:
                return f"{name} has {actual['bytes']} bytes, expected {size}"
            if actual["sha256"] != sha256:
                return f"{name} has sha256 {actual['sha256']}, expected {sha256}: its content changed"
        name = "state.json"
        n_processes = read_unverified(path).state.get("world_size", 0)
    except PermissionError as error:
        raise StorageError(
            f"Cannot read {path / name}: Permission denied. Fix the permissions of it and its folder, then rerun."
        ) from error
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} is damaged ({cause_of(error)})"
    # A resume would use unlisted files without verifying them. `min`, because a wrong number could be billions.
    ranks = [f"rank_{rank:05d}.safetensors" for rank in range(min(n_processes, len(files)))]
    needed = ["state.json", "model.safetensors", *(["optimizer.safetensors"] if n_processes else []), *ranks]
    missing = next((file for file in needed if file not in files), None)
    return missing and f"manifest.json does not list {missing}"


def _is_step_of(path: Path, step: Any) -> bool:
    """True if `step` is a valid step number and, for a folder named step_*, the one in its name."""
    match = STEP_NAME.fullmatch(path.name)
    return type(step) is int and 0 <= step <= MAX_STEPS and (not match or match[1] == f"{step:07}")


def _wrong_claim(path: Path, state: dict[str, Any]) -> str | None:
    """Describes the first entry of a state.json that later code could not use, such as one edited by hand."""
    step, processes = state.get("step", -1), state.get("world_size", 1)
    progress = state.get("progress", {})
    is_dict = isinstance(progress, dict)
    losses = progress.get("recent_losses", []) if is_dict else None
    numbers = [value for name, value in progress.items() if name != "recent_losses"] if is_dict else []
    is_good = {
        "step": _is_step_of(path, step),
        "world_size": type(processes) is int and 1 <= processes <= MAX_STEPS,
        "precision": state.get("precision", "torch.float32") in ("torch.float32", "torch.bfloat16"),
        "dataset_sha256": isinstance(state.get("dataset_sha256", ""), str),
        "progress": isinstance(losses, list)
        and progress.get("step", step) == step
        and all(isinstance(each, int | float) for each in (*numbers, *losses)),
    }
    if wrong := next((name for name, good in is_good.items() if not good), ""):
        return f"{wrong} = {repr(state.get(wrong))[:80]} cannot be that of {path.name}"
    needed = ("config", "dataset_sha256", "precision", "progress", "world_size")  # for a resume
    if missing := [name for name in needed if name not in state] if "progress" in state else []:
        return f"it lacks {missing[0]}"
    try:
        # Only the settings that determine the run's length: other limits may be stricter than when it was saved.
        deciding = {name: state["config"][name] for name in ("model", "train") if name in state.get("config", {})}
        if "config" in state and step > (total := from_dict(deciding).total_steps):
            return f"step = {step} is beyond the {total} of its run"
    except (ConfigError, TypeError) as error:
        return "; ".join(getattr(error, "problems", [f"config is {type(state['config']).__name__}"]))
    return None


def _write_tensors(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, int | str]:
    """Writes and syncs `name`.safetensors in `folder`; returns the fingerprint that it should have.

    Only the header, which has each tensor's offsets, is read from the file. Raises OSError, SafetensorError.
    """
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    sync(path)
    kinds = [{key: (t.shape, t.dtype) for key, t in each.items()} for each in (tensors, load_file(path))]
    if kinds[0] != kinds[1]:
        raise OSError(f"{path.name} does not read back as it was written")
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    layout = json.loads(header)
    layout.pop("__metadata__", None)
    digest, size = hashlib.sha256(length + header), len(length) + len(header)
    # In the file's order, which differs from that of `tensors`: safetensors puts wide types first.
    for key in sorted(layout, key=lambda key: layout[key]["data_offsets"]):
        content = tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content.data)
        size += content.nbytes
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write_json(path: Path, content: dict[str, Any]) -> dict[str, int | str]:
    """Writes and syncs `content`; returns the fingerprint that the file should have."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
    sync(path)
    return {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
