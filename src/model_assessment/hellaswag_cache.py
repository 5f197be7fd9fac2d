"""Token ids of HellaSwag's texts, kept on disk: encoding its 10,042 items takes a second, reading their ids 0.1.

A file of ids belongs to the very texts it was made of, in their order, and to the tokenizer: all of these are in the
hash that names it. It holds a sha256 of the rest, the number of ids of each text (uint32), and the ids (uint16). One
that is damaged is made anew, and where none can be written nothing is kept; any file may be deleted at any time.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from src.data_processing.tokenizer import Tokenizer
from src.utils.root import TEMP_DATA

EVAL_CACHE = TEMP_DATA / "eval_cache"
FORMAT = 1
AT_LEAST = 5_000  # texts, which take a tenth of a second: below that a file is not worth having
_DIGEST = hashlib.sha256().digest_size


def cached_encode(texts: Sequence[str], tokenizer: Tokenizer, name: str) -> Callable[[str], list[int]]:
    """What `tokenizer.encode` does, with the ids of `texts` at hand. `name` begins the file's, for people."""
    texts = list(dict.fromkeys(texts))
    if len(texts) < AT_LEAST:
        return tokenizer.encode
    key = hashlib.sha256(json.dumps([FORMAT, name, tokenizer.sha256, texts]).encode())
    path = EVAL_CACHE / f"{name}_{key.hexdigest()}.ids"
    ids = _read(path, len(texts))
    if ids is None:
        ids = [np.array(tokenizer.encode(text), dtype="<u2") for text in texts]
        _keep(path, ids)
    by_text = dict(zip(texts, ids, strict=True))

    def encode(text: str) -> list[int]:
        return by_text[text].tolist() if text in by_text else tokenizer.encode(text)

    return encode


def _read(path: Path, n_texts: int) -> list[np.ndarray] | None:
    """The ids of each text, or None where there is no good file."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
        return None
    lengths = np.frombuffer(content, "<u4", n_texts, offset=_DIGEST)
    ids = np.frombuffer(content, "<u2", offset=_DIGEST + lengths.nbytes)
    return np.split(ids, np.cumsum(lengths)[:-1])


def _keep(path: Path, ids: list[np.ndarray]) -> None:
    """Whole or not at all, also where several processes do the same at once."""
    lengths = np.array([len(each) for each in ids], dtype="<u4")
    content = lengths.tobytes() + np.concatenate(ids).tobytes()
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    with suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
