"""A checkpoint file of the reference implementation as a run directory, which every command opens like a run of ours.

The file lies on this disk, or is fetched from the Hugging Face hub where that is asked for.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError

from src.model import LLM
from src.model_configs.command_line import config_from_command_line
from src.model_configs.my_llm_config import lf_llm_269m
from src.model_utils.checkpoint_utils import save_checkpoint, step_dir
from src.model_utils.reference_format import ReferenceCheckpoint, read_reference
from src.model_utils.run_records import run_settings
from src.model_utils.training_state import Progress, seed_random_state
from src.params import Config, DataConfig, to_dict
from src.utils.errors import UserError, exit_with, hub_errors, hub_failure, say
from src.utils.files import fingerprint, refuse_claimed, refuse_dangling, storage_errors, sync
from src.utils.handle_ddp import Processes
from src.utils.logger import RunLogger
from src.utils.root import dataset_dir, run_dir


def import_reference(path: Path, config: Config, to_train: bool = False) -> dict[str, Any]:
    """Makes the run `config.run_name` of the reference's checkpoint file `path`, whole or not at all.

    `to_train`: `config` is what pretrain.py shall go on with; it has to agree with the file, and its dataset has to be
    there. Otherwise what the file says replaces what `config` does, and no dataset is named. Returns what was made, as
    plain data. Raises UserError for a run that is there already, a file that is none of the reference's, or settings
    that do not agree with it; StorageError.
    """
    run = run_dir(config.run_name)
    refuse_taken(run)
    dataset = _dataset(config) if to_train else {}
    found = read_reference(path)
    config = _checked(config, found) if to_train else _adapted(config, found)
    temporary = run.with_name(f".{run.name}.tmp-{os.getpid()}")
    with storage_errors(run):
        try:
            temporary.mkdir(parents=True)
            _write_run(temporary, path, found, config, dataset)
            sync(temporary)
            temporary.rename(run)  # fails where something came into it meanwhile
            sync(run.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {
        "run": str(run),
        "checkpoint": str(step_dir(run / "checkpoints", found.step)),
        "step": found.step,
        "parameters": sum(tensor.numel() for tensor in found.weights.values()),
        "optimizer_state": bool(found.optimizer),
    }


def refuse_taken(run: Path) -> None:
    """Raises UserError or BusyError where `run` is there already, StorageError where its disk is not."""
    refuse_dangling(run)
    with storage_errors(run, "make"):
        refuse_claimed(run)
        taken = run.exists()
    if taken:
        raise UserError(f"{run} is there already; choose another --run-name, or move it away")


def _dataset(config: Config) -> dict[str, Any]:
    """The dataset to train on, as far as a checkpoint has to name it."""
    manifest = dataset_dir(config.data.dir) / "manifest.json"
    try:
        return {"name": config.data.dir, "manifest_sha256": fingerprint(manifest)["sha256"]}
    except OSError as error:
        raise UserError(
            f"cannot read {manifest}: {error.strerror}; prepare the dataset to train on, name another with --data.dir, "
            "or leave out the preset, to import the model without a way to train it"
        ) from None


def _checked(config: Config, found: ReferenceCheckpoint) -> Config:
    """`config`, which has to agree with the file."""
    asked, said = to_dict(config), {"model": to_dict(found.model), "optim": found.optim}
    different = [
        f"{group}.{name} = {asked[group][name]}, in the file {value}"
        for group, values in said.items()
        for name, value in values.items()
        if asked[group][name] != value
    ]
    if config.total_steps < found.step:
        different.append(f"train.total_steps = {config.total_steps}, of which the file has taken {found.step}")
    if different:
        raise UserError(f"the settings to go on with are not those of the file: {'; '.join(different)}")
    return config


def _adapted(config: Config, found: ReferenceCheckpoint) -> Config:
    """`config` as the file says, and with a batch and a number of steps that can be."""
    rows = config.micro_batch_size
    sequences = max(1, config.train.batch_tokens // (rows * found.model.n_ctx)) * rows
    train = replace(config.train, batch_tokens=sequences * found.model.n_ctx)
    if found.step > replace(config, model=found.model, train=train).total_steps:
        train = replace(train, total_steps=found.step)
    optim = replace(config.optim, **found.optim)
    return replace(config, model=found.model, train=train, optim=optim, data=DataConfig(dir="unknown"))


def _write_run(folder: Path, path: Path, found: ReferenceCheckpoint, config: Config, dataset: dict[str, Any]) -> None:
    started, step = time.perf_counter(), found.step
    # In what the reference computes, unless something else is asked for.
    precision = torch.float32 if config.train.precision == "float32" else torch.bfloat16
    with torch.random.fork_rng(devices=[]):
        seed_random_state(config.train.seed, rank=0, step=step)
        random_states = {"cpu": torch.get_rng_state()}
    parts = {"model": found.weights, "optimizer": found.optimizer, "rank_00000": random_states}
    state = {
        "progress": asdict(Progress(step=step)),
        "config": to_dict(config),
        "dataset_sha256": dataset.get("manifest_sha256", ""),
        "precision": str(precision),
        "world_size": 1,
        "torch": torch.__version__,
    }
    size = save_checkpoint(folder / "checkpoints", step, parts, state)
    seconds = time.perf_counter() - started

    with torch.device("meta"):
        model = LLM(config.model)
    alone = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    settings = run_settings(config, alone, model, precision, dataset)
    del settings["machine"]  # not the one that trained it
    imported = {"file": path.name, **fingerprint(path)}
    log = RunLogger(folder, is_main=True)
    log.write_json("config.json", {**settings, "imported": imported})
    log.event("import", step, "; ".join([f"from {path.name}", *found.notes]), **imported)
    checkpoint = step_dir(Path("checkpoints"), step)
    log.metric("checkpoint", step, path=str(checkpoint), seconds=seconds, held_up_seconds=None, bytes=size)
    log.sync()
    done = step == config.total_steps
    log.write_status("done" if done else "stopped", step, config.total_steps, None, f"imported from {path.name}")


def _fetch(repository: str, file: str) -> Path:
    """The file of the hub's repository, in the user's Hugging Face cache. Raises UserError where it cannot be had."""
    try:
        get_hf_file_metadata(hf_hub_url(repository, file))  # asks once; what follows would ask for half a minute
        return Path(hf_hub_download(repository, file))
    except HFValidationError as error:
        raise UserError(f"--hub {repository!r} cannot be a repository ({error})") from None
    except hub_errors() as error:
        remedy = "Check the names, and for a repository that is not public the token in HF_TOKEN"
        raise hub_failure(f"get {file} of {repository} from", error, remedy) from error


def main() -> int:
    """The command line."""
    args, settings = _parser().parse_known_args()
    if settings and settings[0].startswith("-"):
        raise UserError(f"{settings[0]} is unknown here; settings to train with come after a preset's name, see --help")
    config = lf_llm_269m()
    if settings:
        sys.argv[1:] = settings
        config = config_from_command_line("Settings to go on with.", prog="python -m src.model_utils.reference_import")
    config = replace(config, run_name=args.run_name)
    refuse_taken(run_dir(config.run_name))  # before a long download
    started = time.perf_counter()
    path = _fetch(*args.hub) if args.hub else args.checkpoint
    say(f"reading {path}")
    made = import_reference(path, config, to_train=bool(settings))
    print(json.dumps({**made, "seconds": round(time.perf_counter() - started, 3)}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_utils.reference_import",
        usage="%(prog)s [-h] (--checkpoint FILE | --hub OWNER/NAME FILE) --run-name NAME [PRESET [SETTINGS]]",
        allow_abbrev=False,
        description="Make a run of a checkpoint file of the reference implementation, for sampling, evaluation and "
        "export. To train on from it, add the preset and settings of pretrain.py that shall go on, with a dataset that "
        "is there; then give pretrain.py the same. The file is read as data; nothing in it is run. Prints one JSON "
        "object as the last line.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="the file, .pth")
    source.add_argument("--hub", nargs=2, metavar=("OWNER/NAME", "FILE"), help="fetch it from this repository first")
    parser.add_argument("--run-name", required=True, metavar="NAME", help="the run to make, under temp_data/runs")
    return parser


if __name__ == "__main__":
    exit_with(main)
