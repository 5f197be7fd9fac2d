"""A folder that was exported: complete or not there, and with export.json, which says where it comes from.

The files are written into a folder beside it, which takes its name when all are on the disk. export.json lists each
with its size and sha256, so that an export is told from anything else, and nothing that a person added or changed is
replaced.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from src.utils.errors import UserError
from src.utils.files import fingerprint, lies_in, refuse_dangling, storage_errors, sync

EXPORT = "export.json"
_FORMAT = 1


@dataclass(frozen=True)
class Origin:
    """Where an exported model comes from; empty what is not known."""

    step: int
    config: dict[str, Any]
    """The run's, as params.to_dict gives it, but with names in place of paths."""
    dataset_sha256: str
    """Of the manifest of the data it was trained on."""
    sources: list[dict[str, Any]]
    """The dataset's, as its manifest has them, but without folders and lists of files."""
    figures: dict[str, dict[str, Any]]
    """By kind (train, validation, hellaswag) the last line of metrics.jsonl up to the step."""


def check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where `out` has what an export must not replace, StorageError where it cannot be read."""
    refuse_dangling(out)
    with storage_errors(out, "read"):
        if not out.exists():
            return
        if not out.is_dir():
            raise UserError(f"--out {out} is a file; name a folder for the export")
        names = {path.name for path in out.iterdir()}
        if not names:
            return
        if EXPORT not in names:
            raise UserError(f"--out {out} holds files that are no export; choose a folder that is empty or not there")
        if not overwrite:
            raise UserError(f"--out {out} holds an export; choose another folder, or replace it with --overwrite")
        try:
            listed = _read_export(out)["files"]
        except UserError:
            raise UserError(
                f"{out / EXPORT} is damaged, so nothing says what may be replaced; move {out} away"
            ) from None
        for name in sorted(names - {EXPORT}):
            if name not in listed:
                raise UserError(
                    f"{out / name} is no part of the export that it lies in; move it, or choose another --out"
                )
            if _changed(out / name, listed[name]):
                raise UserError(f"{out / name} was changed since its export; move it, or choose another --out")


@contextmanager
def writing(out: Path, origin: Origin, overwrite: bool, expected_bytes: int) -> Iterator[Path]:
    """A folder for the files of an export; it becomes `out`, which `check_out` let pass, when the block ends well.

    A failure removes it, and leaves what was in `out`; a kill leaves it, as OUT.tmp-PID. Raises StorageError where it
    cannot be written.
    """
    out = out.resolve()
    temporary, old = (out.with_name(f"{out.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    with storage_errors(out, needed_bytes=expected_bytes):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            files = {}
            for path in sorted(temporary.iterdir()):
                path.chmod(0o644)  # safetensors makes files for their owner alone, and these are to be given away
                sync(path)
                files[path.name] = fingerprint(path)
            text = json.dumps({"format": _FORMAT, **asdict(origin), "files": files}, indent=2, ensure_ascii=False)
            (temporary / EXPORT).write_text(text + "\n", encoding="utf-8")
            sync(temporary / EXPORT)
            sync(temporary)
            if overwrite and out.exists():
                out.rename(old)
            try:
                temporary.rename(out)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise UserError(f"something came into --out {out} meanwhile; choose another folder") from None
                raise
            sync(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not out.exists():
                with suppress(OSError):
                    old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def exported_files(out: Path) -> dict[str, bool]:
    """The names of an export's files, export.json among them, and whether each was changed since.

    Raises UserError for a folder that is no export, or misses a file.
    """
    if not (out / EXPORT).exists():
        raise UserError(f"--out {out} is no export: it holds no {EXPORT}; make one, with --checkpoint")
    listed = _read_export(out)["files"]
    for name in listed:
        if not lies_in(out, name) or not (out / name).is_file():
            raise UserError(f"{out / EXPORT} lists {name!r}, which is no file in this folder; export the model again")
    return {**{name: _changed(out / name, entry) for name, entry in listed.items()}, EXPORT: False}


def read_origin(folder: Path, *loaded: str) -> Origin | None:
    """What export.json says; None where there is none.

    `loaded` are the names of files that must be as they were exported. Raises UserError where one is not.
    """
    if not (folder / EXPORT).exists():
        return None
    content = _read_export(folder)
    for name in loaded:
        if _changed(folder / name, content["files"].get(name)):
            raise UserError(
                f"{folder / name} is missing or not as it was exported; copy the folder or export the model again, or, "
                f"if it was changed on purpose, remove {EXPORT} beside it, which is no longer true"
            )
    return Origin(**{field.name: content[field.name] for field in fields(Origin)})


def _read_export(folder: Path) -> dict[str, Any]:
    """The content of export.json, its parts of the types that they should have."""
    path = folder / EXPORT
    types = {"step": int, "config": dict, "dataset_sha256": str, "sources": list, "figures": dict, "files": dict}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and {_FORMAT} can be read")
        if wrong := [name for name, kind in types.items() if not isinstance(content.get(name), kind)]:
            raise ValueError(f"it has no sound {wrong[0]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the folder or export the model again") from None
    return content


def _changed(path: Path, listed: Any) -> bool:
    try:
        return not path.is_file() or fingerprint(path) != listed
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
