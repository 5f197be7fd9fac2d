"""Pieces of a dataset's shards as text to read on a terminal, with the boundaries of the documents.

    │ the last lines of a document
    ──── document ────
    │ The next one begins.

Boundaries come from token ids, not from text, and they alone leave the margin: a document that spells out
`<|endoftext|>`, or a line like the second one above, is seen to do so. Control characters are shown as escapes.
"""

import shutil
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from src.data_processing.shards import TOKEN_DTYPE, Manifest, Shard, check_shard
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.utils.errors import UserError, harmless

BOUNDARY = "──── document ────"
_MARGIN = "│ "
_NO_TERMINAL = (100, 24)  # columns and lines where stdout isn't one

# A sample: its tokens, those of them before its first boundary, and the same of the lines that are shown.
_TOKENS, _TOKENS_BEFORE = 400, 100
_LINES, _LINES_BEFORE = 12, 4
_SEARCHED_TOKENS = 32_768  # for a boundary: 64 KiB


def excerpt(folder: Path, manifest: Manifest, shard_index: int, first_token: int, n_tokens: int) -> str:
    """The text of `n_tokens` tokens of a shard from `first_token` on, or of those that there are, in lines.

    `shard_index` counts all of `manifest.shards`: shard i of the training split is len(manifest.validation) + i.
    A window of a run lies at first_token = window * n_ctx, with n_tokens = n_ctx + 1.

    Lines of text begin with "│ "; each end-of-text token is a line of its own, which does not. Lines are at most
    as wide as the terminal, or 100 columns. A character that the piece cuts through is U+FFFD. Ids of another
    tokenizer than ours are shown as numbers. Only these tokens are read, after the shard's header.

    Raises UserError where there is no such token, where the shard is missing or cut short, or has impossible ids.
    """
    if not 0 <= shard_index < len(manifest.shards):
        raise UserError(f"there is no shard {shard_index} in {folder}: it has shards 0 to {len(manifest.shards) - 1}")
    shard = manifest.shards[shard_index]
    if not 0 <= first_token < shard.tokens or n_tokens < 1:
        raise UserError(
            f"cannot show {n_tokens} token(s) from token {first_token} of {folder / shard.file}: "
            f"name at least one of its tokens 0 to {shard.tokens - 1}"
        )
    ids = _read(folder, manifest, shard, first_token, n_tokens)
    before, *documents = np.split(ids, np.flatnonzero(ids == manifest.end_of_text))
    lines = list(_text_lines(before, manifest)) if before.size else []
    for document in documents:
        lines += [BOUNDARY, *_text_lines(document[1:], manifest)]
    return "\n".join(lines)


def is_ours(manifest: Manifest) -> bool:
    """Whether our tokenizer gives the text of the dataset's ids."""
    theirs = (manifest.tokenizer, manifest.tokenizer_sha256, manifest.n_vocab, manifest.end_of_text)
    return theirs == (Tokenizer.name, Tokenizer.sha256, Tokenizer.n_vocab, Tokenizer.end_of_text)


def samples(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Three samples, each under a heading: halfway through validation, and a third and two thirds through training.

    A sample is some lines around the first document boundary from there on; where none is near, the text there.
    One whose shard is damaged says so instead, and how to check the dataset.
    """
    check = f"check the dataset with: python -m src.data_processing.data_downloader --verify --out '{folder}'"
    for split, name, fraction in (
        ("validation", "validation", 1 / 2),
        ("train", "training", 1 / 3),
        ("train", "training", 2 / 3),
    ):
        index, token = _place(manifest, split, fraction)
        try:
            token, lines = _sample(folder, manifest, index, token)
        except UserError as fault:
            lines = [harmless(f"cannot be shown: {fault}"), harmless(check)]
        heading = f"{name}, around token {token:,} of {manifest.shards[index].file}"
        yield "\n".join([harmless(heading), *lines])


def columns() -> int:
    """The width of the terminal on stdout, or 100; at least 40."""
    return max(40, shutil.get_terminal_size(_NO_TERMINAL).columns)


def _read(folder: Path, manifest: Manifest, shard: Shard, first: int, count: int) -> np.ndarray:
    """The ids, read as such: a memory map would make the system fetch megabytes around them."""
    check_shard(folder, shard, manifest.n_vocab)  # so the file ends with the last token
    path = folder / shard.file
    left = shard.tokens - first
    ids = np.fromfile(path, TOKEN_DTYPE, min(count, left), offset=path.stat().st_size - left * TOKEN_DTYPE.itemsize)
    if (wrong := np.flatnonzero(ids >= manifest.n_vocab)).size:
        raise UserError(
            f"{path}: token {first + wrong[0]} is {ids[wrong[0]]}; expected ids below "
            f"{manifest.n_vocab}: the content changed"
        )
    return ids


def _text_lines(ids: np.ndarray, manifest: Manifest) -> Iterator[str]:
    """`ids`, none of them a boundary, as lines behind the margin."""
    text = load_tokenizer().decode(ids.tolist()) if is_ours(manifest) else " ".join(map(str, ids))
    for line in text.split("\n"):
        for part in _wrapped(harmless(line.expandtabs(4)), columns() - len(_MARGIN)):
            yield (_MARGIN + part).rstrip(" ")


def _wrapped(line: str, width: int) -> Iterator[str]:
    """`line` in parts of at most `width` columns, at least one, cut behind a space where there is one."""
    while (end := _fitting(line, width)) < len(line):
        end = line.rfind(" ", 0, end) + 1 or end
        yield line[:end]
        line = line[end:]
    yield line


def _fitting(line: str, width: int) -> int:
    """How many characters of `line` fit into `width` columns; Chinese and Japanese ones take two, accents none."""
    used = 0
    for number, char in enumerate(line):
        used += 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if used > width:
            return number
    return len(line)


def _place(manifest: Manifest, split: str, fraction: float) -> tuple[int, int]:
    """Shard and token that lie `fraction` of the way through a split."""
    of_split = [index for index, shard in enumerate(manifest.shards) if shard.split == split]
    ends = list(accumulate(manifest.shards[index].tokens for index in of_split))
    token = int(fraction * ends[-1])
    turn = bisect_right(ends, token, hi=len(ends) - 1)
    return of_split[turn], token - (ends[turn - 1] if turn else 0)


def _sample(folder: Path, manifest: Manifest, index: int, token: int) -> tuple[int, list[str]]:
    """The first boundary from `token` on, or `token` where there is none near, and the lines around it."""
    shard = manifest.shards[index]
    token = max(0, min(token, shard.tokens - _TOKENS))  # not just the last words of a shard
    near = _read(folder, manifest, shard, token, _SEARCHED_TOKENS)
    boundaries = np.flatnonzero(near == manifest.end_of_text)
    if boundaries.size:
        token += int(boundaries[0])
    first = max(0, token - _TOKENS_BEFORE) if boundaries.size else token
    lines = excerpt(folder, manifest, index, first, _TOKENS).split("\n")
    boundary = lines.index(BOUNDARY) if BOUNDARY in lines else 0
    start = max(0, boundary - _LINES_BEFORE)
    return token, lines[start : start + _LINES]
