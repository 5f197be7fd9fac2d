"""Median and shares of tokens are close to the exact ones, and never outside what the counts allow."""

import warnings
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from src.data_processing import document_lengths


def corpus(seed: int, spread: float) -> tuple[np.ndarray, list[int]]:
    """Lengths of documents, as of web pages, and their counts by powers of two."""
    lengths = 1 + np.random.default_rng(seed).lognormal(6.4, spread, 20_000).astype(int)
    return lengths, np.bincount([int(length).bit_length() - 1 for length in lengths]).tolist()


@pytest.mark.parametrize("spread", [0.1, 0.9, 2.0])
def test_the_median(spread: float) -> None:
    lengths, counts = corpus(0, spread)
    exact, estimate = np.median(lengths), document_lengths.median(counts)
    assert np.floor(np.log2(estimate)) == np.floor(np.log2(exact))
    assert estimate == pytest.approx(exact, rel=0.3 if spread < 0.5 else 0.05)


def test_the_median_of_few_documents() -> None:
    assert document_lengths.median([3]) == 1  # three documents of a single token, the mark of their start
    assert 4 <= document_lengths.median([0, 0, 1]) <= 7
    assert 4 <= document_lengths.median([1, 0, 5, 0, 1]) <= 7


@pytest.mark.parametrize("spread", [0.9, 2.0])
def test_shares_of_tokens(spread: float) -> None:
    lengths, counts = corpus(1, spread)
    exact = np.bincount(np.floor(np.log2(lengths)).astype(int), weights=lengths) / lengths.sum()
    shares = np.array(document_lengths.token_shares(counts, int(lengths.sum())))
    np.testing.assert_allclose(shares, exact, atol=0.05)
    assert shares.sum() == pytest.approx(1)
    shortest = 2 ** np.arange(len(counts)) * np.array(counts)
    assert (shares * lengths.sum() >= shortest - 1e-6).all()
    assert (shares * lengths.sum() <= 2 * shortest - counts + 1e-6).all()


def test_one_entry_with_all_documents_is_exact() -> None:
    assert document_lengths.token_shares([0, 0, 0, 0, 7], 7 * 19) == [0, 0, 0, 0, 1]
    assert document_lengths.token_shares([5], 5) == [1]


def test_rows_run_from_the_shortest_to_the_longest_document() -> None:
    rows = document_lengths.rows([0, 0, 1, 0, 4, 0], 90, bar_width=8)
    assert [row[:3] for row in rows] == [["4 to 7", "1", "20.0%"], ["8 to 15", "0", "0.0%"], ["16 to 31", "4", "80.0%"]]
    assert [row[4] for row in rows] == ["██", "", "████████"]
    assert document_lengths.rows([10_000, 1], 10_002, bar_width=8)[1][4] == "▏"  # one in ten thousand is seen
    assert document_lengths.rows([5], 5, bar_width=8)[0][0] == "1"


@pytest.mark.parametrize("counts", [corpus(2, 0.9)[1], corpus(2, 3.0)[1], [7], [0, 0, 2], [1] * 24])
def test_the_picture_is_drawn_for_any_lengths_and_names(counts: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as for a character that the font hasn't
        png = document_lengths.draw(counts, sum(count << k for k, count in enumerate(counts)), "文 $x$ " + "long" * 40)
    picture = imread(BytesIO(png), format="png")[..., :3]
    assert picture.shape[1] > picture.shape[0] > 600
    for color in ("1f5fbf", "c8500a"):  # bars of documents and bars of tokens
        pixels = np.abs(picture * 255 - [int(color[i : i + 2], 16) for i in (0, 2, 4)]).max(axis=-1) < 3
        assert pixels.sum() > 1_000
