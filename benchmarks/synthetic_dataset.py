"""Make a dataset of any size in little disk space, to measure reading: sparse shards of zeros."""

import os
from pathlib import Path

import numpy as np

from src.data_processing import shards

N_VOCAB = 50_257


def make_sparse_dataset(folder: Path, n_shards: int = 100, tokens_per_shard: int = 100_000_000) -> shards.Manifest:
    """Write the dataset and return its manifest, which is correct except for the hashes.

    The file system must support sparse files. The first shard is the validation split.
    """
    folder.mkdir(parents=True)
    listed = []
    for index in range(n_shards):
        file = f"sparse_i_{index:06d}_t_{tokens_per_shard}.npy"
        with open(folder / file, "wb") as shard:
            header = {"descr": shards.TOKEN_DTYPE.str, "fortran_order": False, "shape": (tokens_per_shard,)}
            np.lib.format.write_array_header_1_0(shard, header)
            os.truncate(shard.fileno(), shard.tell() + tokens_per_shard * shards.TOKEN_DTYPE.itemsize)
        split = "train" if index else "validation"
        listed.append(shards.Shard(file, split, tokens_per_shard, 1, tokens_per_shard, "0" * 64, "0" * 32, "f" * 32))
    totals = {name: sum(getattr(shard, name) for shard in listed) for name in ("documents", "tokens", "text_bytes")}
    manifest = shards.Manifest(
        sources=[{"name": "sparse", **totals, "share": 1.0}],
        request={"source": ["sparse"]},
        tokenizer="r50k_base",
        tokenizer_sha256="0" * 64,
        n_vocab=N_VOCAB,
        end_of_text=N_VOCAB - 1,
        seed=0,
        counts=totals,
        document_lengths=[],
        shards=tuple(listed),
    )
    shards.write_manifest(folder, manifest)
    return shards.read_manifest(folder)
