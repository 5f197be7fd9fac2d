import numpy as np
import pytest

from src.utils.rand_idx_seq_gen import permutation


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_holds_every_number_once(n: int):
    np.testing.assert_array_equal(np.sort(permutation(n, 42, 0)), np.arange(n))


def test_is_decided_by_every_part_of_the_seed():
    orders = [tuple(permutation(100, *seed)) for seed in [(1, 0), (1, 1), (2, 0), (1, 0, 0), (0, 1)]]
    assert len(set(orders)) == len(orders)
    assert orders[0] == tuple(permutation(100, 1, 0))


def test_is_the_same_on_every_machine_and_numpy():
    """Computed once with numpy 2.2.6; a change would silently reorder the data of a resumed run."""
    assert permutation(8, 42, 0, 1).tolist() == GOLDEN


GOLDEN = [0, 2, 5, 3, 4, 1, 6, 7]


def test_is_uniform():
    """Each number falls in each place about equally often: chi-square of a 6 x 6 table, 25 degrees of freedom."""
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), permutation(6, seed)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 60  # p about 0.0001
