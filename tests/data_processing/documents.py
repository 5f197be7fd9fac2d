"""Small corpora for the tests of data preparation, and a look into what they became."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from src.data_processing.document_shuffle import JOURNAL, WORK
from src.data_processing.shards import STAMP, read_manifest
from src.data_processing.text_sources import Request
from src.data_processing.tokenizer import load_tokenizer

MODULE = "src.data_processing.data_downloader"


WORDS = ["the", "of", "a", "model", "token", "learns", "slowly", "from", "every", "word", "and", "forgets", "again"]


def some_texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    chooser = random.Random(seed)
    return [f"Document {i}. " + " ".join(chooser.choices(WORDS, k=words)) for i in range(count)]


def write_json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def request(path: Path, **changes: Any) -> Request:
    settings: dict[str, Any] = {
        "sources": ["files"],
        "paths": [str(path)],
        "text_field": "text",
        "tokens_per_shard": 100_000_000,
        "seed": 42,
    }
    return Request(**(settings | changes))


def has_progress(folder: Path) -> bool:
    """True once the preparation of `folder` has an entry to resume from."""
    journal = folder / WORK / JOURNAL
    return journal.exists() and json.loads(journal.read_text())["counts"]["tokens"] > 0


def decoded(folder: Path, shard: str) -> list[str]:
    """The documents of a shard, each decoded from behind its end-of-text token."""
    tokens = np.load(folder / shard)
    assert tokens[0] == 50256
    parts = np.split(tokens, np.flatnonzero(tokens == 50256))[1:]
    return [load_tokenizer().decode(part[1:].tolist()) for part in parts]


def all_decoded(folder: Path) -> list[str]:
    return [text for shard in read_manifest(folder).shards for text in decoded(folder, shard.file)]


def contents(folder: Path) -> dict[str, bytes]:
    """The folder's files, but for the stamp, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != STAMP}
