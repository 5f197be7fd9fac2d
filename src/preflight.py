"""Eight checks that training can start. They take seconds and may save hours.

    python -m src.preflight PRESET [the same overrides as pretrain.py]

Nothing is trained, downloaded or written, except a dataset's stamp. Prints a line per check on stderr and one JSON
object on stdout. The launcher describes its start in variables: WORLD_SIZE processes, NPROC of them on this machine, in
the folder STARTED_IN. DATA=prepare: it will prepare the dataset that DATA_SOURCE and the other variables describe.
DATA=wait: another machine does.
"""

import src  # noqa: F401 (before torch: it sets the environment)
from src.utils.stop_signals import end_at_once_on_ctrl_c

if __name__ == "__main__":
    end_at_once_on_ctrl_c()  # before the seconds that importing torch takes

import os
import platform
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants as hub_settings

from src import available_cores
from src.data_processing.data_downloader import disk_needed, refuse_other
from src.data_processing.shards import MANIFEST, read_manifest
from src.data_processing.text_sources import SOURCES, Request, find_files
from src.data_processing.tokenizer import Tokenizer
from src.data_processing.training_data_loader import WindowDataset
from src.launcher_settings import requested
from src.model_assessment.hellaswag_items import cached_items, load_items, refuse_silent_hub
from src.model_assessment.run_history import duration
from src.model_assessment.trackers import require_packages
from src.model_configs.my_llm_config import config_from_command_line
from src.model_utils.autotune import compile_problem
from src.model_utils.checkpoint_saver import MAKE_ROOM, checkpoints_need
from src.model_utils.checkpoint_utils import checkpoint_steps, read_unverified, step_dir
from src.model_utils.llama_format import architecture
from src.model_utils.load_model import read_initial
from src.model_utils.planner import GPU, REFERENCE_MFU, cost, describe
from src.model_utils.training_state import check_settings, refuse_lost, requested_dir
from src.params import Config, ConfigError
from src.utils import hardware, root
from src.utils.errors import (
    BusyError,
    StorageError,
    UserError,
    connection_advice,
    exit_with,
    hub_answers,
    print_result,
    say,
)
from src.utils.files import check_writable, existing_folder, free_bytes, refuse_claimed, refuse_dangling, size_text
from src.utils.handle_ddp import device_and_backend, processes_here, world_size

# Measured: a training step of 2,048 tokens with 17.1M parameters took 1.42 s on two cores with AVX512 (LOG.md).
CPU_FLOPS_PER_CORE = 7e10
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Start:
    config: Config
    world_size: int
    processes_here: int
    request: Request | None = None
    """The dataset that the launcher prepares if it does not exist; None if any dataset will do."""
    awaited: bool = False
    """True if another machine prepares the dataset."""

    @property
    def dataset(self) -> Path:
        return root.dataset_dir(self.config.data.dir)

    @property
    def to_prepare(self) -> Request | None:
        return None if os.path.exists(self.dataset / MANIFEST) else self.request

    @property
    def run_dir(self) -> Path:
        return root.RUNS / self.config.run_name


class Doubt(str):
    """The result of a check that warns without failing."""


def main() -> int:
    os.chdir(os.environ.get("STARTED_IN") or ".")
    config = config_from_command_line(
        "Check whether pretrain.py can start with these settings, with WORLD_SIZE processes, NPROC of them here. Exit "
        "codes: 0 it can; 4 no, only storage fails; 5 no, only another process holds the run; 2 no, for other reasons.",
        prog="python -m src.preflight",
    )
    data = os.environ.get("DATA")
    request = requested(os.environ) if data == "prepare" else None
    start = Start(config, world_size(), processes_here(), request, awaited=data == "wait")
    results: dict[str, dict[str, str]] = {}
    codes: set[int] = set()
    for check in CHECKS:
        try:
            text = check(start)
            status = "warn" if isinstance(text, Doubt) else "ok"
        except (ConfigError, UserError, BusyError, OSError) as error:  # StorageError is an OSError
            codes.add(getattr(error, "exit_code", StorageError.exit_code))
            status, text = "FAIL", "; ".join(error.problems) if isinstance(error, ConfigError) else str(error)
        results[check.__name__] = {"status": status, "found": text}
        say(f"{status:<6}{check.__name__ + ':':<12}{text}".replace("\n", "\n" + " " * len("FAIL  checkpoint: ")))
    code = UserError.exit_code if len(codes) > 1 else max(codes, default=0)
    failed, warnings = ([name for name in results if results[name]["status"] == bad] for bad in ("FAIL", "warn"))
    if failed:
        say(f"\nnot started: {len(failed)} check(s) failed: {', '.join(failed)}")
    result = {"exit_code": code, "failed": failed, "warnings": warnings, "checks": results}
    print_result(result, "" if failed else "\nall checks passed: training can start")
    return code


def settings(start: Start) -> str:
    steps = start.config.grad_accumulation_steps(start.world_size)
    here = f" ({start.processes_here} on this machine)" if start.processes_here != start.world_size else ""
    try:
        if start.processes_here > 1:  # a container without a network may keep them from connecting
            with socket.create_server(("127.0.0.1", 0)) as server:
                socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"Cannot connect processes on this machine: 127.0.0.1: {error.strerror or error}. Run "
            "ip link set lo up, or set NPROC=1."
        ) from None
    size = f"{start.config.train.micro_batch_size} x {start.config.model.n_ctx}"
    text = f"{start.world_size} process(es){here}, micro-batch {size}, {steps} accumulation step(s)"
    try:
        architecture(start.config.model)
    except UserError as error:
        return Doubt(f"{text}; no export later: {error}")
    return text


def device(start: Start) -> str:
    """Checks the device of each process, and the compiler."""
    compile = start.config.train.compile
    kind = device_and_backend(start.config.train.device, start.processes_here - 1, start.world_size)[0].type
    text = f"{kind}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    problem = compile_problem(kind) if compile == "on" or (compile == "auto" and kind == "cuda") else ""
    if problem and compile == "on":
        raise UserError(f"Cannot compile the model: {problem}, or leave out --train.compile on.")
    if kind == "cpu" and start.config.train.device == "auto" and NVIDIA_DRIVER.exists():
        driver = f"PyTorch {torch.__version__} cannot use this machine's NVIDIA driver, so training runs on the CPU"
        return Doubt(f"{text}; {driver}. Install a newer driver, or a PyTorch built for CUDA")
    if kind == "cpu" and start.config.train.device == "auto":
        operations = describe(start.config)["total_flops"]
        days = operations / (CPU_FLOPS_PER_CORE * available_cores()) / 86_400
        if days > 14:
            return Doubt(f"{text}; no GPU found, and all steps would take about {days:,.0f} days on this CPU")
    if peak := hardware.peak_tflops(torch.device(kind), torch.bfloat16):
        text += f"\n{expected_cost(start.config, start.world_size, peak)}"
    return Doubt(f"{text}; {problem}; until then nothing is compiled") if problem else text


def expected_cost(config: Config, gpus: int, peak_tflops: float) -> str:
    """Hours and dollars of all steps, on GPUs with this dense bf16 peak and at the reference's MFU."""
    per_hour = config.price_per_gpu_hour
    estimate = cost(config, GPU(0, peak_tflops, ""), gpus, price=per_hour)
    price = "; --price-per-gpu-hour DOLLARS shows the cost"
    if estimate.dollars is not None:
        price = f", {estimate.dollars:,.2f} dollars at {per_hour:,.2f} per GPU-hour"
    steps = f"{config.total_steps:,} steps take about {duration(3600 * estimate.hours)}{price}"
    return f"{steps}. Assumes {REFERENCE_MFU:.0%} of the GPU's peak, the reference's MFU on A100, and no evaluation"


def dataset(start: Start) -> str:
    """Checks the dataset, or the source that it will be prepared from."""
    config, folder = start.config, start.dataset
    # os.path.exists is False for a folder that cannot be searched; Path.exists would raise.
    is_to_come = start.to_prepare or (start.awaited and not os.path.exists(folder / MANIFEST))
    manifest = None if is_to_come else read_manifest(folder)
    if manifest and start.request:
        refuse_other(start.request, folder, manifest)
    name, n_vocab = (manifest.tokenizer, manifest.n_vocab) if manifest else (Tokenizer.name, Tokenizer.n_vocab)
    if n_vocab > config.model.n_vocab:
        raise UserError(
            f"Cannot train on {folder}: its token ids ({name}) go up to {n_vocab - 1}, but model.n_vocab = "
            f"{config.model.n_vocab}. Set --model.n-vocab {n_vocab}."
        )
    if request := start.to_prepare:
        found = find_files(request.paths, quiet=True) if request.paths else {}
        files = f", {sum(map(len, found.values())):,} of them" if found else ""
        return f"{folder}, to be prepared from {request.sources[0]}{files}"
    if manifest is None:
        return f"{folder}, which node 0 prepares"
    for shards, at_least in ((manifest.train, config.batch_size), (manifest.validation, 1)):
        WindowDataset(folder, shards, config.model.n_ctx, config.model.n_vocab, at_least)
    return f"{folder}, {manifest.counts['tokens']:,} tokens in {len(manifest.shards)} shards"


def folder(start: Start) -> str:
    """Checks that the run's folder is free and writable, and the dataset's folder too if it will be prepared."""
    to_write = [start.run_dir, start.run_dir / "checkpoints"] + ([start.dataset] if start.to_prepare else [])
    for path in to_write:
        refuse_dangling(path)
    for path in sorted({existing_folder(path) for path in to_write}):
        check_writable(path)
    refuse_claimed(start.run_dir)
    return f"{start.run_dir}, free and writable"


def disk(start: Start) -> str:
    """Checks that the disk has room for the checkpoints and the dataset."""
    checkpoints = checkpoints_need(start.config, start.run_dir / "checkpoints")
    place, data_place = existing_folder(start.run_dir), existing_folder(start.dataset)
    request, data = start.to_prepare, 0
    with suppress(UserError):  # the check of the dataset reports it
        data = disk_needed(request, start.dataset) if request else 0
    free, free_for_data = free_bytes(place), free_bytes(data_place)
    on_one_disk = place.stat().st_dev == data_place.stat().st_dev
    is_full, data_is_full = checkpoints + on_one_disk * data > free, data > free_for_data
    only, only_for_data = ("only " if full else "" for full in (is_full, data_is_full))
    together = f" and at least {size_text(data)} for data" if data and on_one_disk else ""
    text = f"{size_text(checkpoints)} for checkpoints{together} needed, {only}{size_text(free)} free at {place}"
    if data and not on_one_disk:
        text += f"; at least {size_text(data)} for data, {only_for_data}{size_text(free_for_data)} free at {data_place}"
    if is_full or data_is_full:
        raise StorageError(f"{text}; {MAKE_ROOM}, or prepare less with DATA_MAX_TOKENS")
    return text


def hub(start: Start) -> str:
    """Checks the source of HellaSwag's items, and the hub if the dataset comes from it."""
    source = start.to_prepare.sources[0] if start.to_prepare else ""
    offline, evaluation = hub_settings.HF_HUB_OFFLINE, start.config.eval
    if source and SOURCES[source].uses_hub and not offline and not hub_answers():
        raise UserError(
            f"Cannot prepare {source}: {hub_settings.ENDPOINT} does not answer. {connection_advice()}, or set "
            "DATA_SOURCE to files or pydocs. If everything was downloaded before, set HF_HUB_OFFLINE=1."
        )
    if not evaluation.hellaswag_items or evaluation.hellaswag_data == "held-out":
        return "not needed for HellaSwag"
    if evaluation.hellaswag_data != "auto":
        items = load_items(Path(evaluation.hellaswag_data), evaluation.hellaswag_items)
        return f"not needed: {len(items):,} HellaSwag items in {evaluation.hellaswag_data}"
    refuse_silent_hub()
    if offline and not cached_items():
        raise UserError(
            "Cannot download HellaSwag: HF_HUB_OFFLINE is set. Give a local copy with --eval.hellaswag-data FILE, use "
            "--eval.hellaswag-data held-out for a stand-in, or --eval.hellaswag-items 0 for none."
        )
    return "HellaSwag is downloaded" if cached_items() else f"HellaSwag will come from {hub_settings.ENDPOINT}"


def trackers(start: Start) -> str:
    require_packages(start.config.report_to)
    return ", ".join(start.config.report_to) or "none"


def checkpoint(start: Start) -> str:
    """Checks the checkpoint to resume from, except the hashes of its files, which training verifies."""
    folder, resume = start.run_dir / "checkpoints", start.config.resume
    steps = [int(resume)] if resume.isdecimal() else checkpoint_steps(folder) if resume == "auto" else []
    if not steps:
        origin, rest = "none", "an existing run is set aside"
        if resume == "auto":
            rest = "training starts at step 0"
            refuse_lost(folder)
        if start.config.init_from:
            _, path, step = read_initial(start.config)
            origin = f"the weights of {path}, step {step}"
        return f"{origin}; {rest}"
    try:
        saved = read_unverified(step_dir(folder, steps[-1]) if resume == "auto" else requested_dir(folder, steps[-1]))
    except UserError as error:
        if resume != "auto":
            raise
        return Doubt(f"an earlier one than step {steps[-1]}, because: {error}")
    check_settings(saved, start.config)
    return f"step {saved.step} of {start.config.total_steps}, if its files verify"


CHECKS = (settings, device, dataset, folder, disk, hub, trackers, checkpoint)

if __name__ == "__main__":
    exit_with(main)
