"""Our tokenizer as other programs' files have it: byte-level BPE, each byte written as one printable character.

Files such as tokenizer.json hold text, but a token may be part of a character. So a byte that is a visible character of
Latin-1 stands for itself, and the others, in order, for the characters from U+0100 on, as in GPT-2's own files.
"""

import itertools
from collections.abc import Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"


def printable(tokens: Sequence[bytes]) -> list[str]:
    """Each of `tokens` as text, one character a byte."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return ["".join(letters[byte] for byte in token) for token in tokens]


def merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The two parts of each of `tokens` that has several bytes. `tokens` are all of a vocabulary, in the order of rank.

    Of the neighbours in a text, BPE merges first those that make the token of the lowest rank. So the bytes of a token
    merged as far as lower ranks go leave the two parts that make it.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            merged = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
            first = merged.index(min(merged))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def tokenizer_files(tokens: Sequence[bytes], n_ctx: int) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json for transformers; the end-of-text token has the id after `tokens`.

    Nothing is put before or after a text. As everywhere in transformers, the text <|endoftext|> becomes the token,
    unless it is called with split_special_tokens=True. Prompts of unequal length are padded on the left.
    """
    left, right = (printable(parts) for parts in zip(*merges(tokens), strict=True))
    end_of_text = {
        "id": len(tokens),
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: rank for rank, token in enumerate([*printable(tokens), END_OF_TEXT])},
        "merges": [list(pair) for pair in zip(left, right, strict=True)],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds what its Llama refuses
        "model_max_length": n_ctx,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
