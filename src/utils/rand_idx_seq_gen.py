"""Random orders as pure functions of their seed: nothing to save, nothing to restore."""

import numpy as np


def permutation(n: int, seed: int, *stream: int) -> np.ndarray:
    """The numbers 0 to n - 1, int64, in an order decided by `seed` and `stream`.

    All are non-negative; each stream, such as an epoch and a shard, has a separate order.

    Sorts by n random 64-bit words, because NumPy promises the words of a bit generator for ever (NEP 19)
    but not the order its own shuffle makes of them. Two words agree with a chance below n^2 / 2^64.
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(n)
    return np.argsort(words, kind="stable")
