"""The parquet files that belong to a config and a split of a hub dataset, by the conventions of the datasets library.

The `configs` in the dataset card's YAML decide. Without them, a config is a folder, and names decide the split:
`data/NAME-00000-of-00003.parquet` is split NAME, and a word such as `train` or `dev` in a file's or folder's name
counts too. A dataset whose names mention no split is all train.
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from src.utils.errors import UserError

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def choose_files(
    repository: str, all_paths: Sequence[str], card: dict[str, Any], config: str | None, split: str
) -> list[str]:
    """Return those of `all_paths` that hold `split` of `config`, sorted. `card`: the YAML of the dataset's card.

    Raises UserError that lists the choices if the config or split is missing or unclear. Raises KeyError, TypeError or
    AttributeError for a card that makes no sense.
    """
    paths = [path for path in all_paths if path.endswith(".parquet")]
    if not paths:
        raise UserError(
            f"Cannot use {repository}: it holds no parquet file, but {_some(all_paths) or 'nothing'}. Download its "
            "files and use --source files --path FOLDER."
        )
    entries = {str(entry["config_name"]): entry for entry in card.get("configs") or []}
    if config is None:
        default = [name for name, entry in entries.items() if entry.get("default") is True or name == "default"]
        config = default[0] if default else next(iter(entries)) if len(entries) == 1 else None
    entry = entries.get(config) if config else None if entries else {}
    if config and entry is None and _below(paths, config):
        entry = {"data_dir": config}
    if entry is None:
        cause = f"it has no config {config!r}" if config else "it has several configs"
        names = entries or {path.split("/")[0] for path in paths if "/" in path}
        raise UserError(f"Cannot choose files of {repository}: {cause}. Give --config and one of: {_some(names)}.")
    splits = _splits(paths, entry)
    if split not in splits:
        raise UserError(
            f"Cannot choose files of {repository}: it has no split {split!r}. Give --split and one of: {_some(splits)}."
        )
    folders = {posixpath.dirname(path) for path in splits[split]}
    if not entry and len(folders) > 1:
        raise UserError(
            f"Cannot choose files of {repository}: its card names no configs, and its files lie in several folders. "
            f"Give --config . for all of them, or --config and one of: {_some(folders)}."
        )
    return sorted(set(splits[split]))


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def _below(paths: Iterable[str], folder: str) -> list[str]:
    prefix = "" if folder == "." else folder.strip("/") + "/"
    return [path for path in paths if path.startswith(prefix)]


def _splits(paths: Iterable[str], entry: dict[str, Any]) -> dict[str, list[str]]:
    """Split -> files: from `data_files` of a config's entry in the card, else from their names."""
    folder, data_files = str(entry.get("data_dir") or "."), entry.get("data_files")
    splits: dict[str, list[str]] = {}
    if not data_files:
        named = {path: _split_of(posixpath.relpath(path, folder)) for path in _below(paths, folder)}
        for path, split in named.items():
            if split or not any(named.values()):  # files without a split's name count only if all are such
                splits.setdefault(split or "train", []).append(path)
        return splits
    for item in [data_files] if isinstance(data_files, str) else data_files:
        split, patterns = (item["split"], item["path"]) if isinstance(item, dict) else ("train", item)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            parts = tuple(posixpath.normpath(f"{folder}/{pattern}").split("/"))
            matches = [path for path in paths if _matches(tuple(path.split("/")), parts)]
            splits.setdefault(str(split), []).extend(matches)
    return {split: files for split, files in splits.items() if files}


def _split_of(path: str) -> str | None:
    """The split that a path names: the last such word counts, because it is nearest to the content."""
    if shard := re.search(r"(?:^|/)data/(\w+)-\d{5}-of-\d{5}[^/]*$", path):
        return shard[1]
    words = re.split(r"[\W_]+", path.lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)


@lru_cache(maxsize=1 << 16)  # bounds the time that a pattern with many ** takes
def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Match folder by folder: `*` stays within a name, `**` spans any number of folders."""
    if not pattern or not path:
        return path == pattern or pattern == ("**",)
    if pattern[0] == "**":
        return _matches(path, pattern[1:]) or _matches(path[1:], pattern)
    return fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
