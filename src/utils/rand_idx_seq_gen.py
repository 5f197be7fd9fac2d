"""Random orders as pure functions of their seed: nothing to save, nothing to restore."""

import numpy as np


def permutation(n: int, seed: int, *stream: int) -> np.ndarray:
    """A permutation of 0 to n - 1, int64, determined by `seed` and `stream`.

    All arguments are non-negative. Each stream, such as an epoch and a shard, has a separate order.

    Sorts by n random 64-bit words, because NumPy guarantees the output of a bit generator forever (NEP 19)
    but not that of its shuffle. The chance that two words are equal is below n^2 / 2^64.
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(n)
    return np.argsort(words, kind="stable")
