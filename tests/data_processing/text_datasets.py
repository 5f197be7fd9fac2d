"""Datasets of known texts, written without the project's writer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from src.data_processing.shards import Manifest, Shard, read_manifest, write_manifest
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import manifest_of

END = 50_256


def write_texts(folder: Path, validation: Sequence[str], *train: Sequence[str]) -> Manifest:
    """A dataset with these documents: the validation shard's, then those of each training shard."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    lengths: list[int] = []
    for index, texts in enumerate([validation, *train]):
        documents = [[END, *load_tokenizer().encode(text)] for text in texts]
        ids = np.concatenate(documents).astype("<u2")
        name = f"texts_i_{index:06d}_t_{ids.size}.npy"
        np.save(folder / name, ids)
        text_bytes = sum(len(text.encode()) for text in texts)
        shards.append(Shard(name, "train" if index else "validation", ids.size, len(texts), text_bytes, "", "", ""))
        lengths += map(len, documents)
    counts = np.bincount(np.log2(lengths).astype(int)).tolist()
    manifest = replace(manifest_of(shards), tokenizer_sha256=Tokenizer.sha256, document_lengths=counts)
    write_manifest(folder, manifest)
    return read_manifest(folder)
