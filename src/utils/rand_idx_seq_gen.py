"""Random orders as pure functions of their seed: nothing to save, nothing to restore."""

import numpy as np


def permutation(n: int, *seed: int) -> np.ndarray:
    """The numbers 0 to n - 1, int64, in an order decided by `seed` (several non-negative integers mix into one).

    Sorts by n random 64-bit words, because NumPy promises the words of a bit generator for ever (NEP 19)
    but not the order its own shuffle makes of them. Ties, one in about 2^64 / n^2, fall to the lower number.
    """
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(words, kind="stable")
