"""A dataset is made: documents from their sources into a folder of shards.

Sources -> batches -> token ids (in processes) -> runs sorted by key (on disk) -> shards -> manifest. A preparation
that was stopped goes on behind the last whole run, or the last shard, and ends in the same bytes.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data_processing import text_sources
from src.data_processing.dataset_writer import WORK, claimed, plan_shards, start_over, write_shards
from src.data_processing.document_sort import (
    RUN_DOCUMENTS,
    RUN_TOKENS,
    SortedDocuments,
    read_states,
    sort_documents,
    write_run,
)
from src.data_processing.encoding import EncodedBatch, KeyRange, encode_all
from src.data_processing.file_formats import Documents
from src.data_processing.progress import Progress
from src.data_processing.shards import (
    MANIFEST,
    TOKEN_DTYPE,
    Manifest,
    check_shard,
    read_manifest,
    replacing,
    write_manifest,
)
from src.data_processing.text_sources import Source
from src.data_processing.tokenizer import Tokenizer
from src.data_processing.verification import stamp
from src.utils.disk import free_bytes, size_text
from src.utils.errors import BusyError, StorageError, UserError

# Changes where batches come to be divided differently: then unfinished work is begun anew.
_WORK_VERSION = 1


@dataclass(frozen=True)
class Request:
    """The arguments that decide a dataset's content."""

    source: list[str]
    """Of pydocs, files and fineweb-edu."""
    paths: list[str]
    text_field: str
    tokens_per_shard: int
    seed: int
    max_documents: int | None = None
    max_tokens: int | None = None
    drop_duplicates: bool = False


class _Place(NamedTuple):
    """Where the next batch is found, and the share of its unit that lies before it."""

    source: int
    unit: int
    batch: int
    share: float


def prepare(request: Request, folder: Path, workers: int) -> Manifest:
    """The dataset that `request` describes, in `folder`: the one that is there, or a new one.

    Raises UserError, StorageError, or BusyError where another process prepares the same folder.
    """
    if os.path.exists(folder / MANIFEST):  # False, where Path.exists raises, for a folder that cannot be searched
        return _existing(request, folder)
    with ExitStack() as stack:
        work = stack.enter_context(claimed(folder))
        if (folder / MANIFEST).exists():  # since a moment ago
            return _existing(request, folder)
        details = _begin(request, folder, work, workers, stack)
        documents = sort_documents(work, request.drop_duplicates)
        try:
            plans = plan_shards(documents, request.tokens_per_shard)
        except UserError:  # nothing to go on with
            start_over(folder, work)
            raise
        _say(f"writing {len(plans)} shards")
        counts, sources, lengths = _statistics(documents, details, read_states(work))
        shards = write_shards(documents, plans, folder, "+".join(request.source), work / "shards.json")
        manifest = Manifest(
            sources=sources,
            request=asdict(request),
            tokenizer=Tokenizer.name,
            tokenizer_sha256=Tokenizer.sha256,
            n_vocab=Tokenizer.n_vocab,
            end_of_text=Tokenizer.end_of_text,
            seed=request.seed,
            counts=counts,
            document_lengths=lengths,
            shards=shards,
        )
        stamp(folder, manifest)
        write_manifest(folder, manifest)
    if counts["replaced_invalid"]:
        _say(f"invalid UTF-8 in {counts['replaced_invalid']} document(s) was replaced by the character U+FFFD")
    return read_manifest(folder)


def open_sources(request: Request, pinned: Sequence[dict[str, Any]], work: Path, stack: ExitStack) -> list[Source]:
    """The sources of a request, in order; the hub's files as they were at the time of the details `pinned`, if any.

    Downloads go to `work`. `stack` closes the sources. Raises UserError.
    """
    sources: list[Source] = []
    for name in request.source:
        if name == "pydocs":
            sources.append(text_sources.PythonDocs())
        elif name == "files":
            sources += text_sources.open_files(request.paths, request.text_field)
        else:
            try:
                from src.data_processing.hub_sources import fineweb_edu
            except ImportError as error:  # these packages are for the hub alone
                raise UserError(
                    f"--source fineweb-edu needs a package more ({error}); run: pip install -r requirements.txt"
                ) from None
            details = next((entry for entry in pinned if entry["name"] == name), None)
            is_part = request.max_tokens is not None or request.max_documents is not None
            sources.append(fineweb_edu(details, request.seed if is_part else None, work))
        stack.callback(sources[-1].close)
    return sources


def encode_sources(
    sources: Sequence[Source], request: Request, work: Path, workers: int, wanted: Sequence[KeyRange] | None = None
) -> None:
    """Encodes the documents into runs in `work`, from where the runs that are there end, up to the request's limits.

    With `wanted`, only documents whose keys are in one of these ranges. Raises what reading and writing raise.
    """
    states = read_states(work)
    start = place = _Place(*states[-1]["next"]) if states else _Place(0, 0, 0, 0.0)
    count = _Count(request, sum(state["read"] for state in states), sum(state["tokens"] for state in states))
    run: list[tuple[int, EncodedBatch]] = []
    with Progress(lambda: ", ".join(filter(None, (source.status() for source in sources)))) as progress:
        progress.begin(_share(sources, place, count), count.documents, count.tokens)
        for place, batch in encode_all(_batches(sources, start), workers, request.seed, wanted):
            batch = count.add(batch)
            run.append((place.source, batch))
            progress.update(_share(sources, place, count), batch.documents, batch.tokens.size)
            if count.is_reached:
                break
            tokens, documents = sum(b.tokens.size for _, b in run), sum(len(b.token_counts) for _, b in run)
            if tokens >= RUN_TOKENS or documents >= RUN_DOCUMENTS:
                _write_run(work, run, place, complete=False)
                for source in sources[: place.source]:
                    source.release(len(source.unit_bytes))
                sources[place.source].release(place.unit)
                run = []
        _write_run(work, run, place, complete=True)


def _existing(request: Request, folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    _check_same_request(manifest, request, folder)
    for shard in manifest.shards:
        check_shard(folder, shard, manifest.n_vocab)
    if (folder / WORK).exists():  # stopped between its last two steps
        with suppress(BusyError, StorageError), claimed(folder):
            pass
    _say(f"already prepared: {folder}")
    return manifest


def _begin(request: Request, folder: Path, work: Path, workers: int, stack: ExitStack) -> list[dict[str, Any]]:
    """Encodes all documents into `work`, or those that are missing there; returns the sources' details."""
    plan = {"version": _WORK_VERSION, "request": asdict(request)}
    path = work / "plan.json"
    saved = json.loads(path.read_bytes()) if path.exists() else {}
    goes_on = {name: saved.get(name) for name in plan} == plan
    states = read_states(work)
    if goes_on and states and states[-1]["complete"]:
        _say(f"going on with {folder}: all documents are tokenised")
        return saved["sources"]
    _say(f"preparing {folder} from {', '.join(request.source)}")
    sources = open_sources(request, saved["sources"] if goes_on else [], work, stack)
    details = [source.details for source in sources]
    if goes_on and saved["sources"] == details:
        _say(f"going on after {sum(state['tokens'] for state in states):,} tokens that are there")
    else:
        if saved:
            _say("the sources or the request have changed since this was begun: starting over")
        start_over(folder, work)
        with replacing(path) as file:
            file.write(json.dumps(plan | {"sources": details}).encode())
    _check_disk(sources, request, work)
    encode_sources(sources, request, work, workers)
    return details


def _batches(sources: Sequence[Source], start: _Place) -> Iterator[tuple[_Place, Documents]]:
    """All batches from `start` on, each with the place behind it."""
    for number, source in enumerate(sources):
        for unit in range(len(source.unit_bytes)):
            if (number, unit) < start[:2]:
                continue
            skip = start.batch if (number, unit) == start[:2] else 0
            for batch, (documents, share) in enumerate(source.batches(unit, skip), start=skip + 1):
                yield _Place(number, unit, batch, share), documents


class _Count:
    """What was read so far, and how much more the request allows."""

    def __init__(self, request: Request, documents: int, tokens: int) -> None:
        self.documents, self.tokens = documents, tokens
        self.max_documents, self.max_tokens = request.max_documents, request.max_tokens
        self.is_reached = False

    def add(self, batch: EncodedBatch) -> EncodedBatch:
        """The part of `batch` that fits; after it the limit is reached, if there was more."""
        allowed = batch.documents
        if self.max_documents is not None:
            allowed = min(allowed, self.max_documents - self.documents)
        if self.max_tokens is not None:
            ends = np.cumsum(batch.token_counts)
            allowed = min(allowed, int(np.searchsorted(ends, self.max_tokens - self.tokens, side="right")))
        self.is_reached = allowed < batch.documents
        if self.is_reached:
            batch = batch.first(allowed)
        self.documents += batch.documents
        self.tokens += batch.tokens.size
        return batch

    @property
    def share(self) -> float:
        """Of what the request allows."""
        of_documents = self.documents / self.max_documents if self.max_documents else 0.0
        return max(of_documents, self.tokens / self.max_tokens if self.max_tokens else 0.0)


def _write_run(work: Path, run: list[tuple[int, EncodedBatch]], place: _Place, complete: bool) -> None:
    state = {
        "next": place,
        "complete": complete,
        "tokens": sum(batch.tokens.size for _, batch in run),
        "read": sum(batch.documents for _, batch in run),
        "skipped_empty": sum(batch.skipped_empty for _, batch in run),
        "replaced_invalid": sum(batch.replaced_invalid for _, batch in run),
    }
    write_run(work, len(read_states(work)), run, state)


def _share(sources: Sequence[Source], place: _Place, count: _Count) -> float:
    """Of the whole, how much is done."""
    before = sum(sum(source.unit_bytes) for source in sources[: place.source])
    here = sources[place.source].unit_bytes
    done = before + sum(here[: place.unit]) + place.share * sum(here[place.unit : place.unit + 1])
    total = sum(sum(source.unit_bytes) for source in sources)
    return min(1.0, max(done / max(1, total), count.share))


def _check_disk(sources: Sequence[Source], request: Request, work: Path) -> None:
    """Says what disk is needed and free; raises StorageError where it certainly won't do."""
    tokens = sum(source.estimated_tokens for source in sources)
    if request.max_documents is not None:
        tokens = min(tokens, request.max_documents * 1_100)  # FineWeb-Edu's mean
    if request.max_tokens is not None:
        tokens = min(tokens, request.max_tokens)
    # The unsorted tokens, which go as the shards come, with an eighth for what is there twice meanwhile.
    needed = tokens * TOKEN_DTYPE.itemsize * 9 // 8 + sum(source.download_bytes for source in sources)
    needed -= sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    free = free_bytes(work)
    line = f"some {size_text(max(0, needed))} of disk needed, {size_text(free)} free at {work.parent}"
    if needed > free and all(source.estimate_is_sure for source in sources):
        raise StorageError(f"{line}; make room, choose another disk with --out or TEMP_DATA_DIR, or use --max-tokens")
    if needed > free or needed > 1e8:
        _say(f"warning: {line}" if needed > free else line)


def _statistics(
    documents: SortedDocuments, details: Sequence[dict[str, Any]], states: Sequence[dict[str, Any]]
) -> tuple[dict[str, int], list[dict[str, Any]], list[int]]:
    """For the manifest: its counts, its sources and the lengths of the documents."""
    n_documents, tokens, text_bytes = (np.zeros(len(details), np.int64) for _ in range(3))
    lengths = np.zeros(33, np.int64)
    for records in documents:
        n_documents += np.bincount(records["source"], minlength=len(details))
        np.add.at(tokens, records["source"], records["tokens"].astype(np.int64))
        np.add.at(text_bytes, records["source"], records["text_bytes"].astype(np.int64))
        lengths += np.bincount(np.frexp(records["tokens"])[1] - 1, minlength=len(lengths))
    total = {"documents": int(n_documents.sum()), "tokens": int(tokens.sum()), "text_bytes": int(text_bytes.sum())}
    left_out = {name: sum(state[name] for state in states) for name in ("skipped_empty", "replaced_invalid")}
    read = total["documents"] + documents.dropped_duplicates + left_out["skipped_empty"]
    sources = [
        {
            **details[number],
            "documents": int(n_documents[number]),
            "tokens": int(tokens[number]),
            "text_bytes": int(text_bytes[number]),
            "share": round(float(tokens[number]) / max(1, total["tokens"]), 6),
        }
        for number in range(len(details))
    ]
    counts = {**total, "documents_read": read, "dropped_duplicates": documents.dropped_duplicates, **left_out}
    return counts, sources, np.trim_zeros(lengths, "b").tolist()


def _check_same_request(manifest: Manifest, request: Request, folder: Path) -> None:
    """Raises UserError where the dataset in `folder` was asked for differently, or its files have changed since."""
    there, asked = manifest.request, asdict(request)
    differences = [
        f"{name} is {there.get(name)!r} there, {value!r} asked"
        for name, value in asked.items()
        if there.get(name) != value
    ]
    if not differences and "files" in request.source:
        differences = _changed_files(manifest, request.paths)
    if differences:
        raise UserError(
            f"{folder} holds another dataset: {'; '.join(differences)}; "
            "choose another --out, or delete that folder to prepare it anew"
        )


def _changed_files(manifest: Manifest, paths: list[str]) -> list[str]:
    """What differs between the files of the dataset and those that `paths` lead to now, by name and size."""
    try:
        now = {str(path): path.stat().st_size for path in text_sources.find_files(paths)[0]}
    except (UserError, OSError):
        return []  # gone since; the dataset stands without them
    then = {entry["path"]: entry["bytes"] for source in manifest.sources for entry in source.get("files", ())}
    changes = []
    for path in sorted({path for path, _ in then.items() ^ now.items()}):
        if path not in then:
            changes.append(f"{path} is new")
        elif path not in now:
            changes.append(f"{path} is gone")
        else:
            changes.append(f"{path} has {then[path]} bytes there, {now[path]} now")
    return changes


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
