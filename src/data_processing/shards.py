"""Datasets on disk: token shards and the manifest that vouches for them. NumPy and the standard library only.

A dataset is a folder with `manifest.json` and the .npy files it lists, one-dimensional arrays of little-endian uint16
token ids. Shard 0 is validation, the rest are training. Other files in the folder are ignored. The manifest is written
last: a folder without one is not a dataset. Its sha256 identifies the dataset, because it covers every shard's hash.

The stamp, .verified.json in the dataset's folder, records sizes, inodes and times of all files when they were verified.
While these are unchanged, no file is read again. Writing to a file, setting its times or renaming another over it
changes its inode or its ctime, which no program can set.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, get_args, get_origin

import numpy as np

from src import available_cores
from src.utils.errors import StoppedError, StorageError, UserError, cause_of, now_and_then, say
from src.utils.files import fingerprint, identity, lies_in, open_regular, read_json, replacing
from src.utils.root import instead_of

MANIFEST = "manifest.json"
STAMP = ".verified.json"
FORMAT_VERSION = 2
STAMP_FORMAT = 2
TOKEN_DTYPE = np.dtype("<u2")
SHARD_NAME = re.compile(r".+_i_([0-9]{6})_t_([0-9]+)\.npy")
MAX_THREADS = 8  # a core hashes more than 1 GB/s, so these are faster than most disks

_COMMAND = "python -m src.data_processing.data_downloader"
_REDO = "Delete the folder and prepare the dataset again."
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Shard:
    """One file of token ids, as the manifest describes it."""

    file: str
    split: str
    """"validation" or "train"."""
    tokens: int
    """Token ids in the file, the end-of-text tokens included."""
    documents: int
    """Documents in the file; each one is whole and is preceded by the end-of-text token."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    sha256: str
    """Hash of the whole file, its .npy header included."""
    first_key: str
    last_key: str
    """Keys of the first and last document, 32 hexadecimal digits derived from seed and text, in ascending order."""


@dataclass(frozen=True)
class Manifest:
    """The content of a dataset's manifest.json."""

    sources: list[dict[str, Any]]
    """One entry per source: its name; package versions, files with hashes, or the hub's revision; its documents, tokens
    and text_bytes, and its share of the tokens."""
    request: dict[str, Any]
    """The arguments that determine the output."""
    tokenizer: str
    tokenizer_sha256: str
    n_vocab: int
    end_of_text: int
    seed: int
    counts: dict[str, int]
    """Sums over all shards: documents, tokens, text_bytes. documents_read also counts documents that were left out:
    skipped_empty hold only white space, dropped_duplicates repeat another (on request). In replaced_invalid documents,
    bytes that are not UTF-8 became U+FFFD."""
    document_lengths: list[int]
    """Entry k counts the documents of 2^k to 2^(k+1) - 1 tokens, the end-of-text token included."""
    shards: tuple[Shard, ...]
    """In index order, the validation shard first."""
    sha256: str = ""
    """Hash of the manifest file, if the manifest was read from one."""

    @property
    def origins(self) -> list[dict[str, Any]]:
        """The sources without their lists of files, which can be long."""
        lists = {"files", "hub_files"}
        return [{name: value for name, value in s.items() if name not in lists} for s in self.sources]

    @property
    def validation(self) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == "validation")

    @property
    def train(self) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == "train")


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the dataset in `folder`; raises UserError if it is missing or damaged."""
    path = folder / MANIFEST
    try:
        content, sha256 = read_json(path), str(fingerprint(path)["sha256"])
    except FileNotFoundError:
        reason = "it has no manifest.json, so its preparation did not finish" if folder.is_dir() else "no such folder"
        command = f"{_COMMAND} --source SOURCE --out {shlex.quote(str(folder))}"
        # On a separate line, so that the command can be copied.
        message = f"Cannot find a dataset at {folder}: {reason}. Prepare it with: {command}\n{instead_of(folder)[1:]}"
        raise UserError(message.rstrip()) from None
    except StorageError as error:  # a pipe, device or folder of that name
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Fix its permissions, or restore it.") from None
    if content.pop("format", None) != FORMAT_VERSION:
        raise UserError(f"Cannot read {path}: this program reads format {FORMAT_VERSION} only. {_REDO}")
    try:
        shards = tuple(Shard(**entry) for entry in content.pop("shards"))
        manifest = Manifest(**content, shards=shards, sha256=sha256)
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"Cannot read {path}: it is damaged ({cause_of(error)}). {_REDO}") from None
    return manifest


def check_shard(folder: Path, shard: Shard, n_vocab: int, full: bool = False) -> None:
    """Raise UserError with path, expected and actual if the file, its header or its size differs from the manifest.

    That takes microseconds. With `full`, also read the file: every id must be below `n_vocab`, and the sha256 match.
    """
    if fault := shard_fault(folder, shard, n_vocab, full):
        raise UserError(f"Cannot use the dataset: {fault}. Repair it with: {_COMMAND} --repair --out '{folder}'")


def shard_fault(
    folder: Path, shard: Shard, n_vocab: int, full: bool = False, stop: Callable[[], object] = lambda: False
) -> str | None:
    """Return the fault that `check_shard` reports; None for a sound file.

    A full check calls `stop()` for every 4 MiB and raises StoppedError once it is true.
    """
    path = folder / shard.file
    if not lies_in(folder, shard.file):
        return f"{path} leads to {path.resolve()}; expected a file in the folder itself"
    try:
        with open_regular(path) as file:
            fault = _header_fault(file, shard) or (full and _content_fault(file, shard, n_vocab, stop))
            return f"{path}: {fault}" if fault else None
    except FileNotFoundError:
        return f"{path} is missing: expected a shard of {shard.tokens} tokens"
    except StorageError as error:  # a pipe or a folder
        return str(error)
    except OSError as error:
        return f"Cannot read {path}: {error.strerror}"


def stray_files(folder: Path, manifest: Manifest) -> str | None:
    """Return one line about files in `folder` that the manifest does not list, or None. Hidden files don't count."""
    listed = {MANIFEST, *(shard.file for shard in manifest.shards)}
    strays = sorted(name for name in os.listdir(folder) if name not in listed and not name.startswith("."))
    if not strays:
        return None
    return f"ignoring {len(strays)} file(s) in {folder} that its manifest does not list: {', '.join(strays[:3])}"


def ensure_verified(
    folder: Path, manifest: Manifest, trust_stamp: bool = True, stop: Callable[[], object] = lambda: False
) -> None:
    """Raise UserError with every fault that `find_faults` returns. May raise StoppedError, too."""
    if faults := find_faults(folder, manifest, trust_stamp, stop):
        lines = "\n".join(f"  {fault}" for fault in faults.values())
        raise UserError(
            f"Cannot use {folder}: {len(faults)} of {len(manifest.shards)} shards differ from the manifest:\n{lines}\n"
            f"Restore the files, or replace them with: {_COMMAND} --repair --out '{folder}'"
        )


def find_faults(
    folder: Path, manifest: Manifest, trust_stamp: bool = True, stop: Callable[[], object] = lambda: False
) -> dict[int, str]:
    """Return the fault of each damaged shard by its number.

    Reads all shards, unless the stamp vouches for them, and stamps them if they are sound. If the stamp cannot be
    written, a line on stderr says so and the next start is slower. Raises StoppedError once `stop()` is true; several
    threads call it.
    """
    # Taken before the content is read. The manifest's hash covers the expected content.
    files = {shard.file: identity(folder / shard.file) for shard in manifest.shards}
    stamp = {"format": STAMP_FORMAT, "manifest": manifest.sha256, "files": files}
    with suppress(OSError, ValueError):  # an absent or damaged stamp: everything is read
        if trust_stamp and read_json(folder / STAMP) == stamp:
            return {}
    faults: dict[int, str] = {}
    say_if_due = now_and_then()
    pool = ThreadPoolExecutor(min(MAX_THREADS, available_cores()))
    try:  # not `with`, because an exception has to cancel the shards that no thread has begun
        check = partial(shard_fault, folder, n_vocab=manifest.n_vocab, full=True, stop=stop)
        for number, fault in enumerate(pool.map(check, manifest.shards)):
            if fault:
                faults[number] = fault
            say_if_due(f"verifying {folder}: {number + 1} of {len(manifest.shards)} shards read")
    finally:
        pool.shutdown(cancel_futures=True)
    if not faults and all(files.values()):
        try:
            with replacing(folder / STAMP) as file:
                file.write(json.dumps(stamp, indent=1).encode() + b"\n")
        except StorageError as error:
            say(f"the next start will read the dataset again: {cause_of(error)}")
    return faults


def write_shard(folder: Path, prefix: str, index: int, tokens: int, arrays: Iterable[np.ndarray]) -> tuple[str, str]:
    """Write `arrays`, each 1-D uint16, `tokens` ids in total, as one shard; return its file name and sha256.

    The file gets its name only once it is complete and on disk. Raises StorageError.
    """
    name = f"{prefix}_i_{index:06d}_t_{tokens}.npy"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": TOKEN_DTYPE.str, "fortran_order": False, "shape": (tokens,)})
    digest = hashlib.sha256(header.getvalue())
    # Hashed while writing, so that a corpus of 20 GB need not be read again.
    with replacing(folder / name, expected_bytes=tokens * TOKEN_DTYPE.itemsize) as file:
        file.write(header.getvalue())
        for array in arrays:
            assert (array.ndim, array.dtype) == (1, TOKEN_DTYPE), "another type's larger ids would wrap around"
            content = np.ascontiguousarray(array).data.cast("B")
            file.write(content)
            digest.update(content)
        assert file.tell() == header.tell() + tokens * TOKEN_DTYPE.itemsize, "the shard is not as long as announced"
    return name, digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, which makes `folder` a dataset. Omits `manifest.sha256`. Raises StorageError."""
    content = {"format": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    del content["sha256"]
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError or TypeError for a manifest that no preparation writes."""
    check_types(manifest, Manifest, "manifest")
    check_sources(manifest.sources)
    if manifest.n_vocab > 1 << 16 or manifest.end_of_text >= manifest.n_vocab or len(manifest.document_lengths) > 64:
        raise ValueError("n_vocab, end_of_text or document_lengths do not fit uint16 token ids")
    for number, shard in enumerate(manifest.shards):  # as `write_shard` names them
        match = SHARD_NAME.fullmatch(shard.file)
        if match is None or Path(shard.file).name != shard.file or not shard.file.isprintable():
            raise ValueError(f"{shard.file!r} is not the name of a shard")
        if (int(match[1]), int(match[2])) != (number, shard.tokens):
            raise ValueError(f"{shard.file!r} is listed as shard {number} of {shard.tokens} tokens")
    if not manifest.validation or not manifest.train or manifest.shards[0].split != "validation":
        raise ValueError("it needs a validation shard first, then at least one training shard")
    for name in ("tokens", "documents", "text_bytes"):
        total = sum(getattr(shard, name) for shard in manifest.shards)
        if manifest.counts[name] != total:
            raise ValueError(f"its shards hold {total} {name}, its total says {manifest.counts[name]}")


def check_sources(sources: Any) -> None:
    """Raise TypeError or KeyError unless these can be the sources of a manifest."""
    check_types(sources, list[dict[str, Any]], "sources")
    kinds = {"documents": int, "tokens": int, "text_bytes": int, "files": list[dict[str, Any]], "packages": dict}
    for source in sources:
        check_types(source["name"], str, "name")
        for name in kinds.keys() & source.keys():
            check_types(source[name], kinds[name], name)
        for entry in source.get("files", ()):
            check_types([entry["path"], entry["sha256"]], list[str], "files")
            check_types(entry["bytes"], int, "bytes")


def check_types(value: Any, kind: Any, name: str) -> None:
    """Raise TypeError unless `value` and all inside it has that very type: a bool is not an int. An int is a size."""
    expected = get_origin(kind) or kind
    if expected is not Any and (type(value) is not expected or (expected is int and not 0 <= value < 2**63)):
        raise TypeError(f"{name} is {str(value)[:60]!r}, expected {expected.__name__}")
    for field, field_kind in getattr(kind, "__annotations__", {}).items():  # of a dataclass or named tuple
        check_types(getattr(value, field), field_kind, field)
    if inner := get_args(kind):  # of a list, tuple or dictionary
        for each in value.values() if expected is dict else value:
            check_types(each, inner[expected is dict], name)


def _header_fault(file: IO[bytes], shard: Shard) -> str | None:
    size = os.fstat(file.fileno()).st_size
    try:
        major, _ = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    except ValueError as error:
        found = "an empty file" if size == 0 else f"{size} bytes that are not ({str(error).splitlines()[0]})"
        return f"expected a .npy file of {shard.tokens} {TOKEN_DTYPE} tokens, found {found}"
    if (dtype, shape) != (TOKEN_DTYPE, (shard.tokens,)):
        return f"expected dtype {TOKEN_DTYPE} and shape {(shard.tokens,)}, found {dtype} and {shape}"
    expected = file.tell() + shard.tokens * TOKEN_DTYPE.itemsize
    what = "cut short" if size < expected else "followed by bytes that don't belong to it"
    return None if size == expected else f"expected {expected} bytes, found {size}: the array is {what}"


def _content_fault(file: IO[bytes], shard: Shard, n_vocab: int, stop: Callable[[], object]) -> str | None:
    """Check hash and ids; `file` stands at the first token, after the header."""
    header_bytes = file.tell()
    file.seek(0)
    digest = hashlib.sha256(file.read(header_bytes))
    while chunk := file.read(_CHUNK_BYTES):
        if stop():
            raise StoppedError("stopped on request before anything was trained")
        digest.update(chunk)
        ids = np.frombuffer(chunk, TOKEN_DTYPE)
        if ids.max() >= n_vocab:
            first = int(np.argmax(ids >= n_vocab))
            number = (file.tell() - header_bytes) // TOKEN_DTYPE.itemsize - ids.size + first
            return f"expected ids below {n_vocab}, found {ids[first]} as token {number}"
    if digest.hexdigest() != shard.sha256:
        return f"expected sha256 {shard.sha256}, found {digest.hexdigest()}: the content changed"
    return None
