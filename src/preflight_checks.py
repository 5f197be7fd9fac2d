"""What a start needs, one check a function, for src/preflight.py: each looks, changes nothing, and takes a second.

A check returns what it found, or None where it has nothing to say; what training would refuse it raises as training
does, with the value found and what to do.
"""

import os
import platform
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
from huggingface_hub import constants as hub

from src.data_processing import text_sources
from src.data_processing.document_shuffle import disk_needed
from src.data_processing.shards import MANIFEST, check_in_seconds, read_manifest
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.data_processing.training_data_loader import WindowDataset
from src.model_assessment.hellaswag_items import cached_items, hub_answers, load_items, refuse_silent_hub
from src.model_assessment.trackers import require_packages
from src.model_utils.autotune import compile_problem
from src.model_utils.checkpoint_saver import MAKE_ROOM, checkpoint_bytes, checkpoints_need
from src.model_utils.checkpoint_utils import checkpoint_steps, read_unverified, step_dir
from src.model_utils.memory_estimate import Step, estimate_memory
from src.model_utils.training_state import check_settings, refuse_lost
from src.params import Config
from src.utils import root
from src.utils.errors import StorageError, UserError
from src.utils.files import check_writable, existing_folder, free_bytes, refuse_claimed, refuse_dangling, size_text
from src.utils.handle_ddp import device_and_backend
from src.utils.hardware import available_memory_bytes, choose_precision, describe_machine

PYTHON_VERSIONS, TORCH_VERSIONS = ((3, 10), (3, 13)), ((2, 11), (2, 13))  # from the first to the last that are tested
_CLOCK_TOLERANCE_S = 60  # a file server's clock may differ a little


@dataclass(frozen=True)
class Preparation:
    """What the launcher will make the dataset from, once the checks are done."""

    source: str
    """pydocs, files or fineweb-edu; or node 0, which prepares it while this machine waits."""
    paths: tuple[str, ...] = ()
    max_tokens: int | None = None


@dataclass(frozen=True)
class Start:
    """The start to be checked."""

    config: Config
    world_size: int
    processes_here: int
    preparation: Preparation | None = None
    """None where the dataset must be there already."""

    @property
    def dataset(self) -> Path:
        return root.dataset_dir(self.config.data.dir)

    @property
    def is_prepared(self) -> bool:
        return os.path.exists(self.dataset / MANIFEST)

    @property
    def run_dir(self) -> Path:
        return root.RUNS / self.config.run_name

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def device(self) -> tuple[torch.device, str]:
        """Device and backend of the last process of this machine. Raises UserError where there is none for it."""
        return device_and_backend(self.config.train.device, self.processes_here - 1, self.world_size)


@dataclass(frozen=True)
class Found:
    """What a check found."""

    words: str
    is_doubtful: bool = False
    """Whether it is worth a warning, though no reason not to start."""


def python(_: Start) -> Found:
    return _version(platform.python_version(), PYTHON_VERSIONS)


def pytorch(_: Start) -> Found:
    return _version(torch.__version__, TORCH_VERSIONS)


def processes(start: Start) -> Found:
    steps = start.config.grad_accumulation_steps(start.world_size)
    here = f", {start.processes_here} of them on this machine" if start.processes_here != start.world_size else ""
    micro_batch = f"{start.config.train.micro_batch_size} x {start.config.model.n_ctx}"
    return Found(f"{start.world_size}{here}, micro-batch {micro_batch}, {steps} accumulation step(s)")


def device(start: Start) -> Found:
    chosen, _ = start.device()
    if chosen.type != "cuda":
        machine = describe_machine(chosen)
        return Found(
            f"{chosen.type}, {machine['cpu']}, {machine['cores']} core(s), {machine['memory_gb']} GB of memory"
        )
    count, used = torch.cuda.device_count(), []
    for number in range(start.processes_here):
        free, total = torch.cuda.mem_get_info(number)
        if free < 0.9 * total:
            used.append(f"GPU {number} has {size_text(free)} free; does another program use it? See nvidia-smi")
    names = sorted({torch.cuda.get_device_name(number) for number in range(start.processes_here)})
    words = f"{start.processes_here} of {count} GPU(s), {', '.join(names)}, {size_text(total)} of memory each"
    return Found("; ".join([words, *used]), bool(used))


def backend(start: Start) -> Found | None:
    name = start.device()[1]
    if start.world_size == 1:
        return None
    for part in (pair.split(":")[-1] for pair in name.split(",")):
        if torch.distributed.is_available() and getattr(torch.distributed, f"is_{part}_available")():
            continue
        raise UserError(
            f"{part} is missing from PyTorch {torch.__version__}, and {start.world_size} processes need it; install "
            "the build that requirements.txt pins, or start one process"
        )
    return Found(name)


def precision(start: Start) -> Found:
    chosen, _ = start.device()
    asked = start.config.train.precision
    name, best = (str(choose_precision(how, chosen)).removeprefix("torch.") for how in (asked, "auto"))
    if asked == "bf16" and name != best:
        return Found(f"{name}, which this {chosen.type} only emulates; --train.precision auto takes {best}", True)
    return Found(f"{name} ({'the faster one here' if asked == 'auto' else 'as asked for'})")


def compiler(start: Start) -> Found:
    """Whether torch.compile finds what it needs on this kind of device."""
    requested, kind = start.config.train.compile, start.device()[0].type
    if requested == "off" or (requested == "auto" and kind != "cuda"):
        return Found("not needed: nothing is compiled")
    if problem := compile_problem(kind):
        if requested == "on":
            raise UserError(f"Cannot compile the model: {problem}, or leave out --train.compile on.")
        return Found(f"{problem}; until then nothing is compiled", True)
    return Found(f"ready; results are kept in {os.environ['TORCHINDUCTOR_CACHE_DIR']}")


def watching(start: Start) -> Found | None:
    """Whether the programs are there that the run is to be watched with."""
    names = start.config.report_to
    require_packages(names)
    return Found(", ".join(names)) if names else None


def memory(start: Start) -> Found | None:
    """On a CPU, of a process: PyTorch with its compiler, a training step, and a save's copy of weights and moments."""
    chosen, _ = start.device()
    if chosen.type != "cpu":
        return None
    config = start.config
    number_bytes = choose_precision(config.train.precision, chosen).itemsize
    step = estimate_memory(Step(config.model, config.micro_batch_size, number_bytes, chosen.type)).total
    # The 1.4: what is freed and kept (hardware.keep_freed_memory), as measured (LOG.md, the planner's estimates).
    needed = start.processes_here * int(700_000_000 + 1.4 * step + checkpoint_bytes(config))
    free = available_memory_bytes()
    words = f"roughly {size_text(needed)} needed, {size_text(free)} free"
    if needed > free:
        return Found(f"{words}; use a smaller --train.micro-batch-size or model, fewer processes, or a GPU", True)
    return Found(words)


def tokenizer(_: Start) -> Found:
    load_tokenizer()
    return Found(f"{Tokenizer.name}, sha256 {Tokenizer.sha256[:12]}..., as it should be")


def hellaswag(start: Start) -> Found:
    """Whether there are items to ask, without fetching them."""
    data, limit = start.config.eval.hellaswag_data, start.config.eval.hellaswag_items
    if not limit:
        return Found("off")
    if data == "held-out":
        return Found("held-out text instead")
    if data != "auto":
        return Found(f"{len(load_items(Path(data), limit)):,} items in {data}")
    refuse_silent_hub()
    if copy := cached_items():
        return Found(f"fetched before, in {copy.parent}")
    if hub.HF_HUB_OFFLINE:
        raise UserError(
            "not in the cache, and HF_HUB_OFFLINE is set; give a local copy with --eval.hellaswag-data FILE, use "
            "--eval.hellaswag-data held-out for a stand-in, or --eval.hellaswag-items 0 for none"
        )
    return Found(f"to be fetched from {hub.ENDPOINT}, which answers")


def dataset(start: Start) -> Found:
    config, folder = start.config, start.dataset
    if not start.is_prepared and start.preparation:
        return _to_be_prepared(start, start.preparation)
    manifest = read_manifest(folder)
    _check_vocabulary(config, folder, manifest.tokenizer, manifest.n_vocab)
    unread = check_in_seconds(folder, manifest)
    for shards, at_least in ((manifest.train, config.batch_size), (manifest.validation, 1)):
        WindowDataset(folder, shards, config.model.n_ctx, config.model.n_vocab, at_least)
    words = f"{folder}, {manifest.counts['tokens']:,} tokens in {len(manifest.shards)} shards, "
    if unread:
        return Found(f"{words}all as long as they should be; {size_text(unread)} will be read before the first step")
    return Found(f"{words}verified")


def data_folder(start: Start) -> Found:
    folder = existing_folder(start.dataset)
    try:
        check_writable(folder)
    except StorageError as error:
        if not start.is_prepared:
            raise
        return Found(f"{error}; or every start will read all of the dataset", True)
    return Found(f"{folder} can be written")


def run_folder(start: Start) -> Found:
    refuse_dangling(start.run_dir)
    folders = {existing_folder(folder) for folder in (root.RUNS, start.run_dir, start.checkpoints)}
    for folder in sorted(folders):
        check_writable(folder)
    refuse_claimed(start.run_dir)
    steps, resume = checkpoint_steps(start.checkpoints), start.config.resume
    if resume.isdecimal() and int(resume) not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"--resume {resume}: {start.checkpoints} has no such checkpoint; steps that have one: {there}. Leave out "
            "--resume to go on from the newest"
        )
    if resume == "never":
        is_there = start.run_dir.is_dir() and any(start.run_dir.iterdir())
        return Found(f"{start.run_dir}, {'begun anew, the old one set aside' if is_there else 'new'}")
    if not steps:
        refuse_lost(start.checkpoints)
        return Found(f"{start.run_dir}, new")
    at = steps[-1] if resume == "auto" else int(resume)
    try:
        checkpoint = read_unverified(step_dir(start.checkpoints, at))
    except UserError as error:
        if resume != "auto":
            raise
        return Found(f"{start.run_dir}, goes on from a checkpoint before step {at}, because: {error}", True)
    check_settings(checkpoint, start.config)
    return Found(f"{start.run_dir}, goes on after step {at} of {start.config.total_steps}, if its files verify")


def disk(start: Start) -> Found:
    """Room for the run's checkpoints and a dataset that is to be prepared, together where they share a file system."""
    data, data_is_sure = _data_need(start)
    checkpoints = checkpoints_need(start.config, start.checkpoints)
    needs = [(existing_folder(start.run_dir), "checkpoints", checkpoints, True)]
    needs += [(existing_folder(start.dataset), "data", data, data_is_sure)] if data else []
    places, too_small, doubtful = [], False, False
    for device_id in dict.fromkeys(folder.stat().st_dev for folder, *_ in needs):
        here = [need for need in needs if need[0].stat().st_dev == device_id]
        folder, free = here[0][0], free_bytes(here[0][0])
        is_short = sum(size for *_, size, _ in here) > free
        too_small |= sum(size for *_, size, is_sure in here if is_sure) > free
        doubtful |= is_short
        parts = " + ".join(f"{size_text(size)} for {name}" for _, name, size, _ in here)
        places.append(f"{parts} needed, {'only ' if is_short else ''}{size_text(free)} free at {folder}")
    words = "; ".join(places)
    if too_small:
        raise StorageError(f"{words}; {MAKE_ROOM}" + (", or prepare less with DATA_MAX_TOKENS" if data else ""))
    return Found(f"{words}; perhaps too little, but the data can only be estimated" if doubtful else words, doubtful)


def clock(start: Start) -> Found:
    """Nothing depends on it but the times in the logs."""
    now = time.time()
    words = _utc(now)
    files = [start.dataset / MANIFEST, *start.checkpoints.glob("step_*/*.json")]
    times = {file: os.stat(file).st_mtime for file in files if os.path.exists(file)}
    newest = max(times, key=lambda file: times[file], default=None)
    if newest is None or times[newest] <= now + _CLOCK_TOLERANCE_S:
        return Found(words)
    behind = timedelta(seconds=round(times[newest] - now))
    return Found(
        f"{words}, {behind} behind {newest}, written at {_utc(times[newest])}; "
        "set the clock, or times in the logs will be wrong, and only these",
        True,
    )


def _version(found: str, tested: tuple[tuple[int, int], tuple[int, int]]) -> Found:
    major, minor = found.split(".")[:2]
    first, last = (".".join(map(str, version)) for version in tested)
    if tested[0] <= (int(major), int(minor)) <= tested[1]:
        return Found(found)
    return Found(f"{found}; tested are {first} to {last}", True)


def _to_be_prepared(start: Start, preparation: Preparation) -> Found:
    _check_vocabulary(start.config, start.dataset, Tokenizer.name, Tokenizer.n_vocab)
    if preparation.source == "node 0":
        return Found(f"{start.dataset}, to be prepared by node 0")
    words = f"{start.dataset}, to be prepared from {preparation.source}"
    if preparation.source == "files":
        if not preparation.paths:
            raise UserError(
                "DATA_PATH is not set; it names your text: a file, folder or pattern, or several, one a line"
            )
        return Found(f"{words}, {len(text_sources.find_files(preparation.paths)[0]):,} of them")
    if preparation.source == "fineweb-edu" and not hub.HF_HUB_OFFLINE and not hub_answers(hub.ENDPOINT):
        instead = "set DATA_SOURCE to files or pydocs, unless all was downloaded before"
        return Found(f"{words}, but {hub.ENDPOINT} does not answer; {instead}", True)
    return Found(words)


def _check_vocabulary(config: Config, folder: Path, name: str, n_vocab: int) -> None:
    if n_vocab > config.model.n_vocab:
        raise UserError(
            f"{folder} has or will have {n_vocab} different ids, those of {name}, but model.n_vocab = "
            f"{config.model.n_vocab}; set --model.n-vocab {n_vocab}"
        )


def _data_need(start: Start) -> tuple[int, bool]:
    """Bytes that preparing the data needs, and whether that is sure enough to refuse a start."""
    preparation = start.preparation
    if start.is_prepared or preparation is None or preparation.source == "node 0":
        return 0, True
    download_bytes = 0
    if preparation.source == "fineweb-edu":
        from src.data_processing.hub_dataset import USUAL_DOWNLOAD_BYTES, USUAL_TOKENS  # imports pyarrow and the hub

        tokens = USUAL_TOKENS
        download_bytes = USUAL_DOWNLOAD_BYTES if preparation.max_tokens is None else 0
    elif preparation.source == "pydocs":
        tokens = text_sources.PythonDocs().estimated_tokens
    else:
        try:
            files = text_sources.find_files(preparation.paths)[0]
        except UserError:  # said by the check of the dataset
            files = []
        tokens = text_sources.estimated_tokens({file: file.stat().st_size for file in files})
    tokens = min(tokens, preparation.max_tokens or tokens)
    return disk_needed(start.dataset, tokens, download_bytes), bool(download_bytes)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
