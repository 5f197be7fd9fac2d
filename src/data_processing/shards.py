"""Datasets on disk: token shards and the manifest that vouches for them. NumPy and the standard library only.

A dataset is a folder holding `manifest.json` and the .npy files it lists, one-dimensional arrays of
little-endian uint16 token ids. Shard 0 is validation, the rest are training. Files the manifest does
not list are not part of the dataset.

    manifest = read_manifest(folder)            checks the manifest itself; opens no shard
    manifest.validation, manifest.train         tuples of Shard(file, split, tokens, documents, text_bytes, sha256)
    check_shard(folder, shard, n_vocab)         header and size, microseconds; full=True also hash and every id
    np.load(folder / shard.file, mmap_mode="r", allow_pickle=False)    the tokens

`manifest.sha256` identifies the dataset: it covers every shard's hash. The downloader writes with
`write_shard` and, last of all, `write_manifest`; a folder without a manifest is not a dataset.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.utils.errors import StoppedError, UserError
from src.utils.files import lies_in, replacing

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
TOKEN_DTYPE = np.dtype("<u2")
SHARD_NAME = re.compile(r".+_i_(\d{6})_t_(\d+)\.npy")

_COMMAND = "python -m src.data_processing.data_downloader"
REPAIR = f"{_COMMAND} --repair --out"
_REDO = "delete the folder and prepare the dataset again"
_CHUNK_BYTES = 4 << 20


class _Damaged(ValueError):
    """A shard that is not what its manifest says."""


@dataclass(frozen=True)
class Shard:
    """One file of token ids, as the manifest describes it."""

    file: str
    """Name inside the dataset's folder."""
    split: str
    """"validation" or "train"."""
    tokens: int
    """Token ids in the file, the end-of-text tokens included."""
    documents: int
    """Documents in the file; each one is whole and is preceded by the end-of-text token."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    sha256: str
    """Of the whole file, its .npy header included."""
    first_key: str
    """Documents lie in the order of their keys, 32 hexadecimal digits that follow from the seed and the text; the
    shard holds every document of the dataset from this key ..."""
    last_key: str
    """... to this one."""


@dataclass(frozen=True)
class Manifest:
    """What a dataset's manifest.json says."""

    sources: list[dict[str, Any]]
    """Where the documents came from, one entry a source: its name, package versions, files with hashes, or the
    hub's revision; its documents, tokens and text_bytes, and its share of the tokens."""
    request: dict[str, Any]
    """The arguments that decide the output."""
    tokenizer: str
    tokenizer_sha256: str
    n_vocab: int
    end_of_text: int
    seed: int
    counts: dict[str, int]
    """Over all shards documents, tokens and text_bytes. Of the documents_read, some were left out for holding nothing
    but white space (skipped_empty) or for repeating another exactly (dropped_duplicates, only on request); of others,
    bytes that are not UTF-8 became U+FFFD (replaced_invalid)."""
    document_lengths: list[int]
    """Entry k counts the documents of 2^k to 2^(k+1) - 1 tokens, the end-of-text token included."""
    shards: tuple[Shard, ...]
    """In index order, the validation shard first."""
    sha256: str = ""
    """Of the manifest file, once it is read from one."""

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
    """The manifest of the dataset in `folder`; raises UserError where there is none or it makes no sense."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        what = "it has no manifest.json, so its preparation did not finish" if folder.is_dir() else "no such folder"
        raise UserError(f"no dataset at {folder}: {what}; prepare it with: {_preparing(folder)}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        content = json.loads(raw)
        version = content.pop("format")
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format {version!r}; this program reads format {FORMAT_VERSION}; {_REDO}")
        shards = tuple(Shard(**entry) for entry in content.pop("shards"))
        manifest = Manifest(**content, shards=shards, sha256=hashlib.sha256(raw).hexdigest())
        _check_manifest(manifest)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); {_REDO}") from None
    return manifest


def check_shard(folder: Path, shard: Shard, n_vocab: int, full: bool = False) -> None:
    """Raises UserError with path, expected and actual where the file is not what the manifest says.

    Always: the file exists, its .npy header gives one-dimensional uint16 of `shard.tokens`, and its size
    fits the header to the byte. With `full`, also every id is below `n_vocab` and the sha256 agrees; this
    reads the file once, 4 MiB at a time.
    """
    if fault := shard_fault(folder, shard, n_vocab, full):
        raise UserError(f"{fault}; repair it with: {REPAIR} '{folder}'")


def shard_fault(
    folder: Path,
    shard: Shard,
    n_vocab: int,
    full: bool = False,
    stop: Callable[[], object] = lambda: False,
    end_of_text: int | None = None,
) -> str | None:
    """What `check_shard` finds wrong with the file, with path, expected and actual; None if nothing.

    With `full` and `end_of_text`, also whether this id stands there as often as documents are listed. Raises
    StoppedError once `stop()` is true, which is asked before every 4 MiB.
    """
    path = folder / shard.file
    if not lies_in(folder, shard.file):
        return f"{path} leads to {path.resolve()}; expected a file in the folder itself"
    try:
        with open(path, "rb") as file:
            _check_header(file, path, shard)
            if full:
                _check_content(file, path, shard, n_vocab, stop, end_of_text)
    except FileNotFoundError:
        return f"{path} is missing: expected a shard of {shard.tokens} tokens"
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"
    except _Damaged as damage:
        return str(damage)
    return None


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names in `folder` that are not part of the dataset, sorted; hidden files don't count."""
    listed = {MANIFEST, *(shard.file for shard in manifest.shards)}
    return sorted(name for name in os.listdir(folder) if name not in listed and not name.startswith("."))


def stray_files(folder: Path, manifest: Manifest) -> str | None:
    """One line about files in the dataset's folder that are not part of it, or None."""
    strays = unlisted_files(folder, manifest)
    if not strays:
        return None
    return f"ignoring {len(strays)} file(s) in {folder} that its manifest does not list: {', '.join(strays[:3])}"


def write_shard(folder: Path, prefix: str, index: int, tokens: int, arrays: Iterable[np.ndarray]) -> tuple[str, str]:
    """Writes `arrays`, each 1-D uint16, `tokens` ids in all, as one shard; returns its file name and sha256.

    The file gets its name only when it is complete and on the disk. Raises StorageError.
    """
    name = f"{prefix}_i_{index:06d}_t_{tokens}.npy"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": TOKEN_DTYPE.str, "fortran_order": False, "shape": (tokens,)})
    digest = hashlib.sha256(header.getvalue())
    with replacing(folder / name, expected_bytes=tokens * TOKEN_DTYPE.itemsize) as file:
        file.write(header.getvalue())

        def put(array: np.ndarray) -> None:
            assert (array.ndim, array.dtype) == (1, TOKEN_DTYPE), "another type's larger ids would wrap around"
            content = np.ascontiguousarray(array).data.cast("B")
            file.write(content)
            digest.update(content)

        with ThreadPoolExecutor(1) as beside:  # while the next array is made
            last: Future[None] | None = None
            for array in arrays:
                if last is not None:
                    last.result()
                last = beside.submit(put, array)
            if last is not None:
                last.result()
        assert file.tell() == header.tell() + tokens * TOKEN_DTYPE.itemsize, "the shard is not as long as announced"
    return name, digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, which makes `folder` a dataset; `manifest.sha256` is left out. Raises StorageError."""
    content = {"format": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    del content["sha256"]
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _preparing(folder: Path) -> str:
    """The command that prepares `folder` from what its name says: a dataset's folder is named after its source."""
    named = (source for source in ("fineweb-edu", "pydocs") if folder.name.startswith(source))
    return f"{_COMMAND} --source {next(named, 'files --path FILES')} --out {shlex.quote(str(folder))}"


def _check_manifest(manifest: Manifest) -> None:
    """Raises ValueError for a manifest that no preparation writes."""
    if not manifest.validation or not manifest.train or manifest.shards[0].split != "validation":
        raise ValueError("it needs a validation shard first, then at least one training shard")
    check_names(manifest.shards)
    for name, unit in (("tokens", "tokens"), ("documents", "documents"), ("text_bytes", "bytes of text")):
        total = sum(getattr(shard, name) for shard in manifest.shards)
        if manifest.counts[name] != total:
            raise ValueError(f"its shards hold {total} {unit}, its total says {manifest.counts[name]}")


def check_names(shards: Iterable[Shard]) -> None:
    """Raises ValueError where the file of one is not named as `write_shard` names it."""
    for number, shard in enumerate(shards):
        name = SHARD_NAME.fullmatch(shard.file)
        if name is None or Path(shard.file).name != shard.file or not shard.file.isprintable():
            raise ValueError(f"{shard.file!r} is not the name of a shard")
        if (int(name[1]), int(name[2])) != (number, shard.tokens):
            raise ValueError(f"{shard.file!r} is listed as shard {number} of {shard.tokens} tokens")


def _check_header(file: BinaryIO, path: Path, shard: Shard) -> None:
    size = os.fstat(file.fileno()).st_size
    try:
        major, _ = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    except ValueError as error:
        found = "an empty file" if size == 0 else f"{size} bytes that are not ({str(error).splitlines()[0]})"
        raise _Damaged(f"{path}: expected a .npy file of {shard.tokens} {TOKEN_DTYPE} tokens, found {found}") from None
    if dtype != TOKEN_DTYPE:
        raise _Damaged(f"{path}: expected dtype {TOKEN_DTYPE}, found {dtype}")
    if shape != (shard.tokens,):
        raise _Damaged(f"{path}: expected shape {(shard.tokens,)}, found {shape}")
    expected = file.tell() + shard.tokens * TOKEN_DTYPE.itemsize
    if size != expected:
        what = "cut short" if size < expected else "followed by bytes that don't belong to it"
        raise _Damaged(f"{path}: expected {expected} bytes, found {size}: the array is {what}")


def _check_content(
    file: BinaryIO, path: Path, shard: Shard, n_vocab: int, stop: Callable[[], object], end_of_text: int | None
) -> None:
    """`file` stands at the first token, after the header."""
    header_bytes = file.tell()
    file.seek(0)
    digest = hashlib.sha256(file.read(header_bytes))
    offset = documents = 0
    for chunk in _chunks(file):
        if stop():
            raise StoppedError(f"stopped on request while {path} was being read")
        digest.update(chunk)
        ids = np.frombuffer(chunk, TOKEN_DTYPE)
        if ids.max() >= n_vocab:
            first = int(np.argmax(ids >= n_vocab))
            raise _Damaged(f"{path}: token {offset + first} is {ids[first]}; expected ids below {n_vocab}")
        offset += ids.size
        documents += np.count_nonzero(ids == end_of_text)
    if digest.hexdigest() != shard.sha256:
        raise _Damaged(f"{path}: expected sha256 {shard.sha256}, found {digest.hexdigest()}: the content changed")
    if end_of_text is not None and documents != shard.documents:
        raise _Damaged(
            f"{path}: expected {shard.documents} documents, found {documents}: the id {end_of_text} begins each of "
            "them; the content is as prepared, so its manifest was changed"
        )


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
