"""How long a dataset's documents are: what the manifest's counts tell, as rows of a table and as a picture.

The counts are those of `Manifest.document_lengths`: entry k counts the documents of 2^k to 2^(k+1) - 1 tokens.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import matplotlib
from matplotlib.ticker import FuncFormatter, MaxNLocator

from src.utils.plot_style import BLUE, GREY, ORANGE, STYLE, as_png, new_figure, plain

_EIGHTHS = " ▏▎▍▌▋▊▉"


def median(counts: Sequence[int]) -> float:
    """The length that half of the documents stay below, interpolated on a log scale within its range of lengths.

    Exact to the range, 2^k to 2^(k+1) - 1 with k = floor(log2(median)). Needs a document.
    """
    half = sum(counts) / 2
    k, below = next((k, end - counts[k]) for k, end in enumerate(accumulate(counts)) if counts[k] and end >= half)
    return min(2.0 ** (k + (half - below) / counts[k]), 2.0 ** (k + 1) - 1)


def token_shares(counts: Sequence[int], tokens: int) -> list[float]:
    """The share of all `tokens` that lies in the documents of each entry, estimated.

    The mean length of each entry's documents is taken to lie the same part of the way from the entry's shortest
    to its longest length; that part is what makes the sum come out right. So the estimate is exact where one entry
    has all the documents, and never outside what the counts allow. Needs a token.
    """
    shortest = [count * 2**k for k, count in enumerate(counts)]
    room = [count * (2**k - 1) for k, count in enumerate(counts)]
    part = (tokens - sum(shortest)) / max(1, sum(room))
    return [(low + part * more) / tokens for low, more in zip(shortest, room, strict=True)]


def rows(counts: Sequence[int], tokens: int, bar_width: int) -> list[list[str]]:
    """Lengths, documents, their share, the share of tokens, and a bar as long as the share of documents."""
    first, last = _range(counts)
    shares = token_shares(counts, tokens)
    table = []
    for k in range(first, last + 1):
        label = f"{2**k:,} to {2 ** (k + 1) - 1:,}" if k else "1"
        bar = _bar(counts[k] / max(counts), bar_width)
        table.append([label, f"{counts[k]:,}", f"{counts[k] / sum(counts):.1%}", f"{shares[k]:.1%}", bar])
    return table


def draw(counts: Sequence[int], tokens: int, name: str) -> bytes:
    """The PNG: for each length the share of documents and the estimated share of tokens. `name`: the dataset's."""
    first, last = _range(counts)
    lengths = range(first, last + 1)  # log2 of each entry's shortest
    shares = token_shares(counts, tokens)
    with matplotlib.rc_context(STYLE):
        figure = new_figure()
        axes = figure.subplots()
        for at, color, whole, height in (
            (0.29, BLUE, "of documents", [counts[k] / sum(counts) for k in lengths]),
            (0.71, ORANGE, "of tokens, estimated", [shares[k] for k in lengths]),
        ):
            axes.bar([k + at for k in lengths], height, 0.42, color=color, label=whole)
        middle = median(counts)
        axes.axvline(math.log2(middle), color=GREY, linestyle="--", linewidth=1.3, label=f"median, about {middle:,.0f}")
        axes.set_xticks(range(first, last + 2, 1 + len(lengths) // 12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: _short(2 ** round(k))))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("tokens a document")
        axes.set_ylabel("share")
        axes.set_title(f"Document lengths, {plain(name, 40)}")
        figure.legend(loc="outside lower center", ncols=3)
        return as_png(figure)


def _range(counts: Sequence[int]) -> tuple[int, int]:
    """The first and the last entry that has a document."""
    filled = [k for k, count in enumerate(counts) if count]
    return filled[0], filled[-1]


def _bar(share: float, width: int) -> str:
    """A bar of `share` of `width` characters, to an eighth of one, and never none of one for a share that isn't 0."""
    eighths = max(round(8 * width * share), 1 if share else 0)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _short(length: int) -> str:
    """A power of two as people say it: 512, 4k, 2M."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if length >= size:
            return f"{length // size}{unit}"
    return str(length)
