"""GGUF files, read with the gguf package and, if it is installed, by llama.cpp itself."""

import functools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment.sampling import SamplingConfig, generate
from src.model_utils.gguf_export import write_gguf
from src.model_utils.hf_export import export
from src.params import ModelConfig
from src.rope import apply_rope, rope_tables
from src.utils.errors import StorageError, UserError
from src.utils.root import ROOT
from tests.model_utils.exports import HARD_TEXTS, SHAPE, make_run, small_model, trained_model

gguf = pytest.importorskip("gguf")

DTYPES = ("float32", "bf16", "q8_0")
SMALL = ModelConfig(n_vocab=97, n_ctx=32, n_embd=64, n_head=2, n_layer=2, rope_theta=5_000.0)
TEXT = " ".join((ROOT / "LICENSE.txt").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def model() -> LLM:
    return trained_model(load_tokenizer().encode(TEXT), steps=25)


@pytest.fixture(scope="module")
def run(model: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("gguf") / "tiny", model)


@pytest.fixture(scope="module", params=[SHAPE, replace(SHAPE, bias=False, qk_norm=True)], ids=["llama", "qwen3"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Path]:
    model = trained_model(load_tokenizer().encode(TEXT), steps=25, shape=request.param)
    return model, make_run(tmp_path_factory.mktemp("gguf") / "tiny", model)


@functools.cache
def exported(run: Path, dtype: str) -> Path:
    """The file of an export, which takes seconds for the tokenizer."""
    export(run, run.parent / dtype, "gguf", dtype)
    return run.parent / dtype / f"tiny-{dtype}.gguf"


def few_tokens(shape: ModelConfig, path: Path, dtype: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Weights of a small model, and the reader of its file, whose tokenizer has three tokens."""
    ours = {name: parameter.detach() for name, parameter in small_model(shape).named_parameters()}
    write_gguf(path, "few", shape, ours, ["a", "b", "<|endoftext|>"], ["a b"], dtype)
    return ours, gguf.GGUFReader(path)


@pytest.fixture(scope="module")
def llama() -> Callable[[Path], Any]:
    """Opens a file in llama.cpp. It comes first in a test: without it, no model is trained."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp: pip install -r requirements-llama-cpp.txt")
    options = {"n_ctx": SHAPE.n_ctx, "n_batch": SHAPE.n_ctx, "n_threads": 1, "logits_all": True, "verbose": False}
    return lambda path: llama_cpp.Llama(str(path), **options)


def numbers(reader: Any) -> dict[str, np.ndarray]:
    """By name, float32, in the order of dimensions that ours have."""
    return {tensor.name: np.array(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("bf16", 2**-8), ("q8_0", 0.6 / 127)])
def test_matrices_are_ours_up_to_the_types_rounding(tmp_path: Path, dtype: str, error: float):
    """bf16 has 8 significant bits; q8_0 rounds to 127ths of the largest of 32 numbers, a little more by its float16."""
    ours, reader = few_tokens(SMALL, tmp_path / "few.gguf", dtype)
    theirs = numbers(reader)
    value, gate = ours["blocks.1.ffn.in_proj.weight"].chunk(2)
    for name, expected in (
        ("token_embd", ours["embedding.weight"]),
        ("blk.1.attn_v", ours["blocks.1.attn.qkv_proj.weight"][2 * SMALL.n_embd :]),
        ("blk.1.attn_output", ours["blocks.1.attn.out_proj.weight"]),
        ("blk.1.ffn_up", value),
        ("blk.1.ffn_gate", gate),
        ("blk.1.ffn_down", ours["blocks.1.ffn.out_proj.weight"]),
    ):
        blocks = expected.reshape(-1, 32)
        stored = torch.from_numpy(theirs[f"{name}.weight"]).reshape(-1, 32)
        scale = blocks.abs().amax(dim=1, keepdim=True) if dtype == "q8_0" else blocks.abs()
        assert ((stored - blocks).abs() <= error * scale).all(), name
    assert np.array_equal(theirs["blk.0.ffn_down.bias"], ours["blocks.0.ffn.out_proj.bias"].numpy())
    assert "output.weight" not in theirs  # llama.cpp takes the embedding


def test_queries_and_keys_that_turn_as_neighbours_give_our_products(tmp_path: Path):
    """llama.cpp rotates dimension 2i with 2i + 1 by position x theta^(-2i / K), computed here with complex numbers."""
    ours, reader = few_tokens(SMALL, tmp_path / "few.gguf", "float32")
    theirs, heads, width = numbers(reader), SMALL.n_head, SMALL.head_dim
    x_TD = torch.randn(10, SMALL.n_embd)
    qkv = F.linear(x_TD, ours["blocks.0.attn.qkv_proj.weight"], ours["blocks.0.attn.qkv_proj.bias"])
    q_HTK, k_HTK, _ = (part.view(10, heads, width).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
    cos, sin = (table[:10] for table in rope_tables(SMALL.n_ctx, width, SMALL.rope_theta, torch.device("cpu")))
    expected = apply_rope(q_HTK, cos, sin) @ apply_rope(k_HTK, cos, sin).transpose(1, 2)

    turns = np.exp(1j * np.outer(np.arange(10), SMALL.rope_theta ** (-np.arange(0, width, 2) / width)))[:, None]
    projected = [x_TD.numpy() @ theirs[f"blk.0.attn_{n}.weight"].T + theirs[f"blk.0.attn_{n}.bias"] for n in "qk"]
    q, k = (
        part.reshape(10, heads, width // 2, 2).astype(np.float64).view(complex)[..., 0] * turns for part in projected
    )
    products = np.einsum("thk,shk->hts", q, k.conj()).real
    assert np.abs(products - expected.numpy()).max() < 1e-4


def test_qwen3_keeps_the_order_of_dimensions(tmp_path: Path):
    """llama.cpp rotates i with i + K/2 there, as we do."""
    shape = replace(SMALL, bias=False, qk_norm=True)
    ours, reader = few_tokens(shape, tmp_path / "few.gguf", "float32")
    theirs = numbers(reader)
    for name, expected in (
        ("blk.1.attn_q", ours["blocks.1.attn.qkv_proj.weight"][: SMALL.n_embd]),
        ("blk.1.attn_k", ours["blocks.1.attn.qkv_proj.weight"][SMALL.n_embd : 2 * SMALL.n_embd]),
        ("blk.1.attn_q_norm", ours["blocks.1.attn.q_norm.weight"]),
        ("blk.1.attn_k_norm", ours["blocks.1.attn.k_norm.weight"]),
    ):
        assert np.array_equal(theirs[f"{name}.weight"], expected.numpy()), name
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen3"
    assert fields["qwen3.attention.key_length"] == fields["qwen3.attention.value_length"] == 32
    assert not [name for name in theirs if name.endswith("bias")]


def test_wrong_numbers_in_the_file_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quantize = gguf.quantize
    monkeypatch.setattr(gguf, "quantize", lambda array, kind: quantize(array[::-1] if array.ndim == 2 else array, kind))
    with pytest.raises(StorageError, match=r"just written: token_embd\.weight differs"):
        few_tokens(SMALL, tmp_path / "few.gguf", "q8_0")


def test_metadata_and_tokenizer(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the reader that the export compares the file with: opening one takes seconds for the tokenizer."""
    readers, open_reader = list[Any](), gguf.GGUFReader

    def keep(path: Path) -> Any:
        readers.append(open_reader(path))
        return readers[-1]

    monkeypatch.setattr(gguf, "GGUFReader", keep)
    export(tiny_run, tmp_path / "out", "gguf", "q8_0")
    fields = {name: field.contents() for name, field in readers[0].fields.items()}
    tokenizer = load_tokenizer()
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "tiny"
    assert fields["llama.context_length"] == SHAPE.n_ctx
    assert fields["llama.rope.freq_base"] == SHAPE.rope_theta
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(fields["tokenizer.ggml.tokens"]) == tokenizer.n_vocab
    assert fields["tokenizer.ggml.tokens"][tokenizer.end_of_text] == "<|endoftext|>"
    assert fields["tokenizer.ggml.tokens"][tokenizer.encode(" the")[0]] == "Ġthe"
    assert fields["tokenizer.ggml.merges"][:2] == ["Ġ t", "Ġ a"]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.end_of_text
    assert fields["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("dtype", DTYPES)
def test_llama_cpp_continues_as_we_do(llama: Callable[[Path], Any], either: tuple[LLM, Path], dtype: str):
    model, run = either
    prompt = load_tokenizer().encode(TEXT)[:8]
    ours = [t[0] for t, _ in generate(model, [prompt], SamplingConfig(40, temperature=0), [0])]
    theirs = [
        token for token, _ in zip(llama(exported(run, dtype)).generate(prompt, temp=0.0), range(40), strict=False)
    ]
    assert theirs == ours
    assert len(set(ours)) > 15


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bf16", 2e-3), ("q8_0", 5e-3)])
def test_llama_cpps_perplexity(llama: Callable[[Path], Any], either: tuple[LLM, Path], dtype: str, tolerance: float):
    """On 16 windows of a text, of which the model knows four."""
    model, run = either
    windows_BT = torch.tensor(load_tokenizer().encode(TEXT)[: 16 * SHAPE.n_ctx]).view(16, -1)
    with torch.no_grad():
        ours = F.cross_entropy(model(windows_BT)[:, :-1].flatten(0, 1), windows_BT[:, 1:].flatten()).item()
    theirs, opened = [], llama(exported(run, dtype))
    for window in windows_BT:
        opened.reset()
        opened.eval(window.tolist())
        theirs.append(F.cross_entropy(torch.from_numpy(opened.scores[: SHAPE.n_ctx - 1]), window[1:]).item())
    assert abs(math.exp(np.mean(theirs) - ours) - 1) < tolerance


def test_llama_cpps_ids_are_ours(llama: Callable[[Path], Any], run: Path):
    opened, tokenizer = llama(exported(run, "q8_0")), load_tokenizer()
    for text in [*HARD_TEXTS, TEXT]:
        assert opened.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text)
    assert opened.tokenize(b"a<|endoftext|>", special=True) == [*tokenizer.encode("a"), tokenizer.end_of_text]


def test_a_vocabulary_with_unused_ids(llama: Callable[[Path], Any], tmp_path: Path):
    shape = ModelConfig(n_vocab=50_304, n_ctx=16, n_embd=32, n_head=2, n_layer=1)
    export(make_run(tmp_path / "wide", small_model(shape)), tmp_path / "out", "gguf", "float32")
    opened = llama(tmp_path / "out/wide-float32.gguf")
    assert opened.n_vocab() == 50_304
    assert opened.tokenize(b"<|unused_50300|>", special=True) == load_tokenizer().encode("<|unused_50300|>")


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        (
            ModelConfig(n_vocab=512, n_ctx=16, n_embd=32, n_head=2, n_layer=1),
            "float32",
            "model.n_vocab is 512.*format hf",
        ),
        (ModelConfig(n_ctx=16, n_embd=48, n_head=2, n_layer=1), "q8_0", "model.n_embd is 48.*--dtype bf16"),
    ],
)
def test_a_model_that_does_not_fit_the_format(tmp_path: Path, shape: ModelConfig, dtype: str, words: str):
    with pytest.raises(UserError, match=words):
        export(make_run(tmp_path / "run", small_model(shape)), tmp_path / "out", "gguf", dtype)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run", small_model())
    monkeypatch.setitem(sys.modules, "gguf", None)
    (pin,) = re.findall(r"^gguf==\S+", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    with pytest.raises(UserError, match=re.escape(f"pip install {pin}")):
        export(run, tmp_path / "out", "gguf", "float32")
