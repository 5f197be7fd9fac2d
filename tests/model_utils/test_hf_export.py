"""An exported folder, opened by transformers without our code; its card, its folder, and the push to the hub."""

import errno
import gzip
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from src.data_processing.tokenizer import load_tokenizer
from src.model_assessment.sampling import SamplingConfig, generate
from src.model_utils import hf_export
from src.model_utils.hf_export import export, main
from src.model_utils.llama_format import EXPORT
from src.model_utils.load_model import load_model
from src.params import ModelConfig
from src.utils.errors import StorageError, UserError
from tests.data_processing.stand_in_hub import serving
from tests.model_utils.exports import HARD_TEXTS, SHAPE, make_run, small_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tiny_export: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_export)


@pytest.fixture(scope="module")
def llama(tiny_export: Path) -> Any:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tiny_export, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def test_logits_equal_ours(llama: Any):
    assert type(llama) is transformers.LlamaForCausalLM
    assert llama.dtype == torch.float32
    ids_BT = torch.randint(SHAPE.n_vocab, (3, SHAPE.n_ctx))
    with torch.no_grad():
        assert (llama(ids_BT).logits - small_model()(ids_BT)).abs().max() < 1e-4
    # Every embedding can be trained on: a padding token in config.json would leave out the end-of-text token's.
    assert llama.get_input_embeddings().padding_idx is None


@pytest.mark.parametrize(("ffn", "kind"), [("swiglu", "Qwen3"), ("relu2", "Apertus")])
def test_qk_norm_becomes_a_qwen3_or_with_relu2_an_apertus(tmp_path: Path, ffn: Any, kind: str):
    """Logits and greedy text are ours, and our own reader takes the folder."""
    shape = replace(SHAPE, bias=False, qk_norm=True, ffn=ffn)
    model = small_model(shape)
    export(make_run(tmp_path / "fast", model), tmp_path / "out", "hf", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    ids_BT = torch.randint(shape.n_vocab, (3, shape.n_ctx))
    with torch.no_grad():
        assert (theirs(ids_BT).logits - model(ids_BT)).abs().max() < 1e-4
        assert torch.equal(load_model(tmp_path / "out", "cpu").model(ids_BT), model(ids_BT))
    prompt = [464, 1660, 6772]
    ours = [tokens[0] for tokens, _ in generate(model, [prompt], SamplingConfig(30, temperature=0), [0])]
    text = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0].tolist()
    assert text == prompt + ours


def test_biases_with_qk_norm_are_refused(tmp_path: Path):
    run = make_run(tmp_path / "odd", small_model(replace(SHAPE, qk_norm=True)))
    with pytest.raises(UserError, match=r"no class has both model\.bias and model\.qk_norm"):
        export(run, tmp_path / "out", "hf", "float32")
    assert not (tmp_path / "out").exists()


def test_bf16_weights_are_the_rounded_ones(tiny_run: Path, tiny_export: Path, tmp_path: Path):
    export(tiny_run, tmp_path / "half", "hf", "bf16")
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert llama.dtype == torch.bfloat16
    full = load_file(tiny_export / "model.safetensors")
    for name, tensor in load_file(tmp_path / "half/model.safetensors").items():
        assert torch.equal(tensor, full[name].bfloat16()), name


def test_greedy_text_is_ours_token_for_token(llama: Any, tokenizer: Any):
    prompt = load_tokenizer().encode("The water cycle begins when")
    steps = generate(small_model(), [prompt], SamplingConfig(40, temperature=0), [0])
    ours = [tokens[0] for tokens, _ in steps]
    inputs = tokenizer("The water cycle begins when", return_tensors="pt")
    theirs = llama.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    assert theirs.tolist() == prompt + ours
    assert len(set(ours)) > 10


def test_prompts_of_unequal_length_in_one_batch(llama: Any, tokenizer: Any):
    prompts = ["One", "Two words", "It is three", "A longer prompt than the others"]
    batch = llama.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=8, do_sample=False)
    for prompt, row in zip(prompts, batch, strict=True):
        alone = llama.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert row[-8:].tolist() == alone[0, -8:].tolist()


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_ids_of_hard_texts(tokenizer: Any, text: str):
    ids = load_tokenizer().encode(text)
    assert tokenizer(text, verbose=False).input_ids == ids
    assert tokenizer.decode(ids) == text


def test_ids_at_characters_of_every_class(tokenizer: Any):
    """Next to a letter, a digit, a space and themselves: the class that a character has decides where pieces end."""
    code_points = [c for c in (*range(0x3100), *range(0x3100, 0x110000, 17)) if not 0xD800 <= c < 0xE000]
    for first in range(0, len(code_points), 10_000):
        text = "".join(f"a{chr(c)}1{chr(c)} {chr(c)}{chr(c)}" for c in code_points[first : first + 10_000])
        assert tokenizer(text, verbose=False).input_ids == load_tokenizer().encode(text)


def test_ids_of_real_text(tokenizer: Any, shared: Path):
    for path in sorted((shared / "text").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line, _ in zip(lines, range(15), strict=False)]
        for text in texts:
            assert tokenizer(text, verbose=False).input_ids == load_tokenizer().encode(text), path


def test_the_control_token_as_text(tokenizer: Any):
    """transformers makes the token of it, as of every special token; ours, and theirs when told so, keep the text."""
    ours = load_tokenizer()
    assert tokenizer("a<|endoftext|>b").input_ids == [*ours.encode("a"), ours.end_of_text, *ours.encode("b")]
    assert tokenizer("a<|endoftext|>b", split_special_tokens=True).input_ids == ours.encode("a<|endoftext|>b")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (50_256, 50_256, 64)
    assert tokenizer.decode([64, 50_256, 65], skip_special_tokens=True) == ours.decode([64, 65])


def test_a_model_of_another_vocabulary_has_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shape = ModelConfig(n_vocab=512, n_ctx=16, n_embd=32, n_head=2, n_layer=1)
    export(make_run(tmp_path / "other", small_model(shape)), tmp_path / "hf", "hf", "float32")
    assert "without a tokenizer" in capsys.readouterr().err
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids_BT = torch.arange(16)[None]
    with torch.no_grad():
        assert (llama(ids_BT).logits - small_model(shape)(ids_BT)).abs().max() < 1e-4
    assert llama.generation_config.eos_token_id is None


def test_the_card_has_the_runs_figures_up_to_the_step(tiny_export: Path):
    card = (tiny_export / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in small_model().parameters())
    for figure in (f"{parameters:,} parameters", "5.4321", "228.60", "2.4567", "by step 30: 7,680", "28.75% ± 5.00%"):
        assert figure in card, figure
    assert "A Llama with biases in all projections and a head" in card
    assert "some-protocol (x)" in card
    assert "Text: pydocs; 2,358,597 tokens" in card
    assert "4.9876" not in card  # of a later step
    assert "6.5000" not in card


def test_unknown_figures_are_left_out_of_the_card(tmp_path: Path):
    run = make_run(tmp_path / "bare", small_model(), [{"kind": "validation", "step": 40, "loss": None, "tokens": 9}])
    (run / "config.json").unlink()
    export(run, tmp_path / "hf", "hf", "float32")
    card = (tmp_path / "hf/README.md").read_text()
    for unknown in ("Validation at", "Text:", "Tokens seen", "None", "{"):
        assert unknown not in card
    shutil.copytree(run / "checkpoints/step_0000040", tmp_path / "step_0000040")  # away from its run
    export(tmp_path / "step_0000040", tmp_path / "other", "hf", "float32")
    assert "Validation at" not in (tmp_path / "other/README.md").read_text()


def test_folders_of_whoever_trained_it_stay_private(tiny_export: Path):
    for path in tiny_export.glob("*"):
        assert b"/home/somebody" not in path.read_bytes(), path.name
    assert json.loads((tiny_export / EXPORT).read_text())["config"]["data"]["dir"] == "novels"


def test_the_command_and_sampling_from_its_export(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "hf"
    assert call(monkeypatch, "--checkpoint", tiny_run, "--out", out) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["export"] == str(out)
    assert report["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    prompt, greedy = load_tokenizer().encode("It is"), SamplingConfig(12, temperature=0)
    ours, opened = (list(generate(m, [prompt], greedy, [0])) for m in (small_model(), load_model(out, "cpu").model))
    assert [tokens for tokens, _ in opened] == [tokens for tokens, _ in ours]


def test_a_full_disk_leaves_nothing(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fill(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_export, "save_file", fill)
    with pytest.raises(StorageError, match=r"No space left on device"):
        export(tiny_run, tmp_path / "out", "hf", "float32")
    assert list(tmp_path.iterdir()) == []


def test_wrong_weights_on_the_disk_are_noticed(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two matrices of one shape change places."""
    save = hf_export.save_file

    def swap(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
        save({**tensors, up: tensors[gate], gate: tensors[up]}, path, **options)

    monkeypatch.setattr(hf_export, "save_file", swap)
    with pytest.raises(StorageError, match="its logits differ"):
        export(tiny_run, tmp_path / "out", "hf", "float32")
    assert list(tmp_path.iterdir()) == []


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that an upload needs. It keeps every file of a commit, and refuses another owner."""

    requests: ClassVar[list[tuple[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in body.splitlines()]
        if self.headers.get("Authorization") != "Bearer hf_secret" or b"other" in body:
            self.answer(403, {"error": "You may not write here"})
        elif self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            self.answer(200, {"files": files})
        else:
            self.requests.append((self.path, lines))
            self.answer(200, {"url": "x/me/tiny", "id": "me/tiny", "commitUrl": "x/me/tiny/commit/f", "commitOid": "f"})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The hub's address; a token is in the environment."""
    Hub.requests = []
    monkeypatch.setattr(hf_export.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub) as address:
        monkeypatch.setattr(hf_export.constants, "ENDPOINT", address)
        yield address


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["hf_export.py", *map(str, arguments)])
    return main()


def test_a_push_is_dry_without_upload(
    tiny_export: Path, hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert call(monkeypatch, "--out", tiny_export, "--push", "me/tiny") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["push"] == {"repository": "me/tiny", "uploaded": False}
    assert result["files"] == {path.name: path.stat().st_size for path in tiny_export.iterdir()}
    assert all(name in printed.err for name in result["files"])
    assert "nothing was sent" in printed.err
    assert not Hub.requests


def test_an_upload_sends_the_exports_files(
    tiny_export: Path, tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(tiny_export, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("private")
    assert call(monkeypatch, "--out", tmp_path / "out", "--push", "me/tiny", "--upload") == 0
    sent = dict(Hub.requests)
    [repository], [header, *files] = sent["/api/repos/create"], sent["/api/models/me/tiny/commit/main"]
    assert repository["visibility"] == "private"
    assert header["value"]["summary"] == "tiny, step 40"
    assert {file["value"]["path"] for file in files} == {path.name for path in tiny_export.iterdir()}
    printed = capsys.readouterr()
    assert json.loads(printed.out)["push"] == {"repository": "me/tiny", "uploaded": True, "address": f"{hub}/me/tiny"}
    assert "hf_secret" not in printed.out + printed.err


def test_a_push_that_fails_says_why(tiny_export: Path, tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch):
    push = ("--out", tiny_export, "--upload", "--push")
    with pytest.raises(UserError, match=r"HTTP 403 Forbidden: You may not.*token in HF_TOKEN"):
        call(monkeypatch, *push, "other/tiny")
    monkeypatch.setattr(hf_export.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"upload to me/tiny at http://127.0.0.1:9: ConnectError"):
        call(monkeypatch, *push, "me/tiny")
    with pytest.raises(UserError, match="me/my model"):
        call(monkeypatch, *push, "me/my model")
    damaged = shutil.copytree(tiny_export, tmp_path / "damaged")
    with open(damaged / "model.safetensors", "r+b") as file:
        file.truncate(1_000)
    with pytest.raises(UserError, match=r"model\.safetensors: it is missing or differs from what was exported"):
        call(monkeypatch, "--out", damaged, "--push", "me/tiny")
    with pytest.raises(UserError, match=r"is not an export of ours: it has no export.json"):
        call(monkeypatch, "--out", tmp_path, "--push", "me/tiny")


def test_contradictory_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for options, message in (
        ([], "--checkpoint is missing"),
        (["--checkpoint", "x", "--upload"], "needs --push"),
        (["--checkpoint", "x", "--push", "name"], "Cannot use --push: 'name' is not OWNER/NAME"),
        (["--push", "me/tiny"], "--out is missing"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, *options)
    monkeypatch.setattr(hf_export, "TEMP_DATA", tmp_path)
    (tmp_path / "exports" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=f"Cannot write {tmp_path}/exports/x: it exists"):
        call(monkeypatch, "--checkpoint", "runs/x/")
    with pytest.raises(UserError, match="Cannot store q8_0 in a Hugging Face"):
        call(monkeypatch, "--out", tmp_path / "new", "--checkpoint", "x", "--dtype", "q8_0")
