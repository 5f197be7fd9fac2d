"""Where documents come from. A source hands out batches of them, the same ones in the same order every time.

A source is made of units, such as files, and each unit of batches, so that a preparation that was stopped can go
on behind any batch without reading what lies before its unit.
"""

import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from src import available_cores
from src.data_processing import python_docs
from src.data_processing.file_formats import (
    BATCH_BYTES,
    EXTENSIONS,
    TEXT_EXTENSIONS,
    Documents,
    Texts,
    read_batches,
    read_text,
)
from src.utils.errors import UserError, say
from src.utils.files import fingerprint

# One text tokenised by r50k_base has some 4 to 4.6 bytes a token; compressed text is 3 times as dense, roughly.
_BYTES_PER_TOKEN = 4
_COMPRESSION = {".gz": 3, ".zst": 3, ".parquet": 2}
# Of Python 3.11 with NumPy 2.2 and PyTorch 2.13; other versions differ by some percent.
_PYDOCS_BYTES, _PYDOCS_TOKENS = 7_300_000, 2_400_000


@dataclass(frozen=True)
class Download:
    """What a source still has to fetch before all of it can be read."""

    bytes_left: int
    bytes_per_s: float
    """While something is fetched, lately; 0 where nothing came yet, or nothing any more."""
    waited_s: float
    """How long the source's reader has stood still until now, because what it asked for was not there yet."""


class Source(ABC):
    """Documents in units, such as files."""

    details: dict[str, Any]
    """For the manifest: the name, and package versions, files with their hashes, or the hub's revision."""
    unit_bytes: Sequence[int]
    """The size of each unit where it is read from, to tell how far a preparation is."""
    estimated_tokens: int
    """Roughly, to tell how much disk is needed."""
    estimate_is_sure = False
    """Whether a disk that is too small by the estimate is reason enough not to begin."""
    download_bytes = 0
    """Disk that downloads take while they go on."""

    def __init__(self, details: dict[str, Any], unit_bytes: Sequence[int], estimated_tokens: int) -> None:
        self.details, self.unit_bytes, self.estimated_tokens = details, unit_bytes, estimated_tokens

    @abstractmethod
    def batches(self, unit: int, skip: int) -> Iterator[tuple[Documents, float]]:
        """The batches of a unit but the first `skip`, each with the share of the unit that is read after it.

        Raises UserError for what is wrong with the source, StorageError where it needs disk and has none.
        """

    def release(self, unit: int) -> None:  # noqa: B027 (most sources have nothing to give back)
        """The units before `unit` will not be asked for again, not even by a later process."""

    def status(self) -> str:
        """What there is to say beside progress, or nothing."""
        return ""

    def download(self) -> Download | None:
        """How far what is fetched in the background is; None where there is nothing of the kind."""
        return None

    def close(self) -> None:  # noqa: B027
        """Ends what goes on in the background."""


class PythonDocs(Source):
    """The documentation that comes with Python, NumPy and PyTorch, as installed here."""

    def __init__(self) -> None:
        details = {"name": "pydocs", "packages": python_docs.package_versions()}
        super().__init__(details, [_PYDOCS_BYTES], _PYDOCS_TOKENS)

    def batches(self, unit: int, skip: int) -> Iterator[tuple[Documents, float]]:
        batches = enumerate(_batched(python_docs.documents()), start=1)
        for number, texts in islice(batches, skip, None):
            yield Texts(texts), min(1.0, number * BATCH_BYTES / self.unit_bytes[0])


class Files(Source):
    """The documents of one path of the user's: a file, or the files of a folder or a pattern, in order."""

    def __init__(self, path: str, files: Sequence[Path], text_field: str) -> None:
        with ThreadPoolExecutor(available_cores()) as threads:  # hashing runs beside other threads
            described = list(threads.map(_describe, files))
        details = {"name": "files", "path": path, "files": described}
        sizes = {file: entry["bytes"] for file, entry in zip(files, described, strict=True)}
        self._units = _units_of(files, sizes)
        self._text_field = text_field
        super().__init__(details, [sum(sizes[file] for file in unit) for unit in self._units], estimated_tokens(sizes))

    def batches(self, unit: int, skip: int) -> Iterator[tuple[Documents, float]]:
        files = self._units[unit]
        try:
            if len(files) == 1:
                yield from read_batches(files[0], self._text_field, skip)
            elif not skip:
                yield Texts([read_text(file) for file in files]), 1.0
        except OSError as error:
            raise UserError(f"cannot read {error.filename or files[0]}: {error.strerror}") from None


def open_files(paths: Sequence[str], text_field: str) -> list[Files]:
    """A source for each of `paths`; a file that several of them lead to belongs to the first. Raises UserError.

    Text files that are named themselves, such as by a shell's *.txt, are one source together, at the place of the
    first of them.
    """
    texts = [path for path in paths if path.lower().endswith(TEXT_EXTENSIONS) and os.path.isfile(path)]
    grouped = set(texts)
    sources, seen = [], set[str]()
    for group in [texts if path in grouped else [path] for path in paths if path in texts[:1] or path not in grouped]:
        found, skipped = find_files(group)
        name = group[0] if len(group) == 1 else f"{len(group)} text files from {group[0]} on"
        if skipped:
            what = f"{len(skipped)} file(s) of {name} that end in none of {', '.join(EXTENSIONS)}"
            say(f"left out {what}, such as {skipped[0].name}")
        if new := [file for file in found if os.path.realpath(file) not in seen]:
            sources.append(Files(name, new, text_field))
            seen.update(map(os.path.realpath, new))
    return sources


def estimated_tokens(sizes: Mapping[Path, int]) -> int:
    """Roughly the tokens in files of these sizes, in bytes."""
    text_bytes = sum(size * _COMPRESSION.get(file.suffix.lower(), 1) for file, size in sizes.items())
    return text_bytes // _BYTES_PER_TOKEN


def find_files(paths: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files that `paths` name, sorted and each once, and what else lies there, of other kinds.

    A path is a file, a folder, searched to any depth, or a glob pattern. Hidden files of a folder don't count. A link
    keeps its own name, which says what kind of file it leads to: in the Hugging Face cache the target's name is a
    hash. Raises UserError for a path that leads to no file, for a file of an unknown kind that is named itself, and
    for a folder that cannot be read.
    """
    found: set[Path] = set()
    others: set[Path] = set()
    for given in paths:
        matches = [given] if os.path.exists(given) else glob.glob(given, recursive=True)
        if not matches:
            what = "matches nothing" if glob.has_magic(given) else "does not exist"
            raise UserError(f"--path {given} {what} (seen from {Path.cwd()}); name a file, a folder or a pattern")
        tops = [Path(match).absolute() for match in matches]
        inside = {path for top in tops for path in (_files_below(top) if top.is_dir() else [top])}
        readable = {path for path in inside if path.name.lower().endswith(EXTENSIONS) and path.is_file()}
        if not readable:
            is_file = not os.path.isdir(given) and matches == [given]
            what = "expected a file ending in" if is_file else "it holds no file ending in"
            raise UserError(f"--path {given}: {what} {', '.join(EXTENSIONS)}")
        found.update(readable)
        others.update(inside - readable)
    targets = {os.path.realpath(path): path for path in sorted(found, reverse=True)}  # of several names the first
    skipped = {os.path.realpath(path): path for path in sorted(others, reverse=True)}
    return sorted(targets.values()), sorted(path for target, path in skipped.items() if target not in targets)


def _files_below(root: Path) -> Iterator[Path]:
    """All files in a folder and in those below it, also where links lead, but each folder once."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"cannot read the folder {error.filename}: {error.strerror}; mend its permissions or leave it out"
        )

    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _describe(path: Path) -> dict[str, Any]:
    try:
        return {"path": str(path), **fingerprint(path)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend its permissions or leave it out") from None


def _units_of(files: Sequence[Path], sizes: dict[Path, int]) -> list[list[Path]]:
    """Each file alone, but neighbouring files of one document together up to a batch's size."""
    units: list[list[Path]] = []
    room = -1  # in the last unit, for further files of one document
    for file in files:
        is_text = file.name.lower().endswith(TEXT_EXTENSIONS)
        if is_text and sizes[file] <= room:
            units[-1].append(file)
            room -= sizes[file]
        else:
            units.append([file])
            room = max(0, BATCH_BYTES - sizes[file]) if is_text else -1
    return units


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_BYTES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
