"""The reference's checkpoint files become runs of ours: the same model. Other files are refused, not run."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn

import src.params
from src.model_utils import reference_import
from src.model_utils.checkpoint_utils import open_checkpoint
from src.model_utils.load_model import load_model
from src.model_utils.reference_import import import_reference
from src.model_utils.training_state import check_settings
from src.params import ModelConfig
from src.utils import root
from src.utils.errors import StorageError, UserError
from tests.data_processing.stand_in_hub import serving
from tests.reference import CONFIG, ours, reference_tensors

Content = dict[str, Any]
Save = Callable[[Any], Path]
SHAPE = ModelConfig(n_vocab=300, n_ctx=16, n_embd=16, n_head=2, n_layer=2, residual_dropout=0.0, ffn_dropout=0.0)


class HParams:
    """As the reference's class is pickled: a class of this name and module, with attributes."""

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


HParams.__module__, HParams.__qualname__ = "src.params", "HParams"


def hparams(**changes: object) -> HParams:
    values = {"n_vocab": 300, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
    return HParams(**{**values, "ffn_act_pdrop": 0.0, "attn_res_pdrop": 0.0, **changes})


def reference_weights() -> dict[str, torch.Tensor]:
    """Weights of a model of SHAPE, in the reference's order and under its names."""
    shapes: dict[str, tuple[int, ...]] = {"embd.weight": (300, 16)}
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        for name, out, into in (("attn.qkv_proj", 48, 16), ("attn.out_proj", 16, 16)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        for name, out, into in (("ffn.net.0", 128, 16), ("ffn.net.3", 16, 64)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        shapes |= {f"{block}.norm1.weight": (16,), f"{block}.norm2.weight": (16,)}
    shapes["norm.weight"] = (16,)
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def content() -> Content:
    """The content of a file after three steps."""
    state = reference_weights()
    return {
        "model_state_dict": {**state, "out_proj.weight": state["embd.weight"]},
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "scheduler_state_dict": None,
        "step": 3,
        "hParams": hparams(),
        "random_state": torch.get_rng_state(),
    }


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Writes a file as the reference does, whose class has this name in its module."""

    def write(content: Any) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(src.params, "HParams", HParams, raising=False)
            torch.save(content, tmp_path / "model.pth")
        return tmp_path / "model.pth"

    return write


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(root, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def refusal(path: Path, runs: Path) -> str:
    """The message of an import that fails: one line, and nothing is left behind."""
    with pytest.raises(UserError) as caught:
        import_reference(path, "imported")
    assert not runs.exists() or not list(runs.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["whole", "compiled", "weights alone"])
def test_logits_are_the_references(shared: Path, save: Save, kind: str):
    path = shared / "reference" / "reference_checkpoint.pth"
    if kind != "whole":
        with torch.serialization.safe_globals([(HParams, "src.params.HParams")]):
            content = torch.load(path, weights_only=True)
        if kind == "compiled":
            state = content["model_state_dict"]
            content["model_state_dict"] = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
        else:
            content = {key: content[key] for key in ("model_state_dict", "hParams", "step")}
        path = save(content)
    summary = import_reference(path, "imported")
    loaded = load_model(Path("imported"))
    tensors = reference_tensors(shared / "reference")
    with torch.no_grad():
        assert (loaded.model(tensors["input_ids"]) - tensors["logits"]).abs().max() < 1e-5
    assert loaded.config.model == CONFIG
    assert (summary["step"], loaded.step, loaded.dataset_sha256) == (0, 0, "")
    assert summary["parameters"] == sum(parameter.numel() for parameter in loaded.model.parameters())


def test_a_run_directory_is_made(content: Content, save: Save, runs: Path):
    path = save(content)
    summary = import_reference(path, "imported")
    assert summary["run"] == str(runs / "imported")
    assert summary["checkpoint"] == str(runs / "imported/checkpoints/step_0000003")
    assert [entry.name for entry in runs.iterdir()] == ["imported"]
    settings = json.loads((runs / "imported/config.json").read_text())
    assert settings["config"]["model"] == src.params.to_dict(SHAPE)
    assert summary["parameters"] == sum(p.numel() for p in load_model(runs / "imported").model.parameters())
    assert settings["imported"]["bytes"] == path.stat().st_size
    status = json.loads((runs / "imported/status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("done", 3, "imported from model.pth")
    with pytest.raises(UserError, match=r"data \(sha256 of its manifest\)"):  # training cannot resume from it
        check_settings(open_checkpoint(Path(summary["checkpoint"])), load_model(runs / "imported").config, "ab" * 32)


def test_the_files_settings_replace_the_recipes(content: Content, save: Save, runs: Path):
    content["hParams"] = hparams(n_ctx=1_000, attn_res_pdrop=0.25)
    content["step"] = 30_001
    import_reference(save(content), "imported")
    loaded = load_model(runs / "imported")
    assert loaded.step == loaded.config.total_steps == 30_001
    assert loaded.config.model == replace(SHAPE, n_ctx=1_000, residual_dropout=0.25)


def test_tensors_of_other_kinds_become_ours(content: Content, save: Save, runs: Path):
    """Half precision, nn.Parameter, transposed, and two in the same memory."""
    state = content["model_state_dict"]
    state["embd.weight"] = state["out_proj.weight"] = state["embd.weight"].bfloat16()
    state["norm.weight"] = nn.Parameter(state["norm.weight"])
    state["transformer_blocks.0.attn.out_proj.weight"] = state["transformer_blocks.0.attn.out_proj.weight"].T
    state["transformer_blocks.1.norm1.weight"] = state["transformer_blocks.0.norm1.weight"]
    import_reference(save(content), "imported")
    weights = dict(load_model(runs / "imported").model.named_parameters())
    for name, tensor in state.items():
        if name != "out_proj.weight":
            assert torch.equal(weights[ours(name)], tensor.float()), name


class Runs:
    """Runs a program when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("where", ["content", "hParams", "model_state_dict", "step", "unknown"])
@pytest.mark.parametrize("how", [os.mkdir, eval, __import__, getattr])
def test_nothing_in_a_file_is_run(
    content: Content, save: Save, runs: Path, tmp_path: Path, where: str, how: Callable[..., Any]
):
    mark = tmp_path / "was_run"
    arguments = {
        os.mkdir: (str(mark),),
        eval: (f"__import__('os').mkdir({str(mark)!r})",),
        __import__: ("antigravity",),
        getattr: (Runs(__import__, "os"), "mkdir"),
    }
    hostile = Runs(how, *arguments[how])
    path = save(hostile if where == "content" else {**content, where: hostile})
    assert "nothing of it was run" in refusal(path, runs)
    path = path.rename(tmp_path / "model.safetensors")
    assert "nothing of it was run" in refusal(path, runs)
    assert not mark.exists()


def test_the_class_of_settings_runs_nothing(content: Content, save: Save, runs: Path):
    """The stand-in may be called with anything and get any attribute: it has no code to abuse."""
    content["hParams"] = hparams(__class__="x", __setstate__="y")
    assert "__class__" in refusal(save(content), runs)
    content["hParams"] = Runs(HParams, "x")
    assert "TypeError" in refusal(save(content), runs)


def change_weight(name: str, tensor: Any) -> Callable[[Content], None]:
    return lambda content: content["model_state_dict"].update({name: tensor})


CHANGES: dict[str, tuple[Callable[[Content], Any], str]] = {
    "no weights": (lambda c: c.pop("model_state_dict"), "model_state_dict"),
    "no hParams": (lambda c: c.pop("hParams"), "hParams"),
    "hParams with more": (lambda c: c.update(hParams=hparams(theta=5.0)), "theta"),
    "hParams a text": (lambda c: c.update(hParams=hparams(n_ctx="16")), "'str'"),
    "heads": (lambda c: c.update(hParams=hparams(n_head=3)), "n_embd = 16 is not divisible by 2 x model.n_head = 6"),
    "layers": (lambda c: c.update(hParams=hparams(n_layer=10**9)), "n_layer"),
    "fewer layers": (lambda c: c.update(hParams=hparams(n_layer=1)), "missing or unknown: blocks.1"),
    "a weight too many": (change_weight("norm.bias", torch.zeros(16)), "missing or unknown: norm.bias"),
    "a shape": (
        change_weight("norm.weight", torch.zeros(17)),
        "norm.weight is not a tensor of floats with the shape [16]",
    ),
    "no tensor": (change_weight("norm.weight", [1.0]), "norm.weight is not a tensor"),
    "NaN": (lambda c: c["model_state_dict"]["norm.weight"].fill_(torch.nan), "norm.weight is not finite"),
    "one number for all": (change_weight("norm.weight", torch.ones(1).expand(16)), "repeats the same memory"),
    "another head": (change_weight("out_proj.weight", torch.zeros(300, 16)), "differs from the embedding"),
    "step a text": (lambda c: c.update(step="3"), "'str'"),
    "step below zero": (lambda c: c.update(step=-1), "step is -1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_contents_are_refused(content: Content, save: Save, runs: Path, change: str):
    spoil, expected = CHANGES[change]
    spoil(content)
    message = refusal(save(content), runs)
    assert message.startswith("Cannot import")
    assert expected in message


def test_damaged_files_are_refused(content: Content, save: Save, runs: Path, tmp_path: Path):
    path = save(content)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", whole[:100], whole[:middle], whole[:-1], b"# a page\n"):
        path.write_bytes(damaged)
        assert "not a zip file" in refusal(path, runs)
    path.write_bytes(flipped)
    assert "the checksum of" in refusal(path, runs)
    torch.save(content["model_state_dict"], path, _use_new_zipfile_serialization=False)
    assert "not a zip file" in refusal(path, runs)
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.pth", ".", "pipe"):
        assert "it is not a file" in refusal(tmp_path / name, runs)
    assert "list" in refusal(save([1, 2]), runs)


def test_nothing_is_overwritten_or_left_by_a_full_disk(
    content: Content, save: Save, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = save(content)
    (runs / "imported").mkdir(parents=True)
    with pytest.raises(UserError, match=r"it exists\. Choose another name"):
        import_reference(path, "imported")
    assert list((runs / "imported").iterdir()) == []
    monkeypatch.setattr("src.model_utils.checkpoint_utils.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        import_reference(path, "other")
    assert [entry.name for entry in runs.iterdir()] == ["imported"]


@pytest.fixture
def hub(content: Content, save: Save) -> Iterator[str]:
    """Serves the file as me/small's model.pth, and no other."""
    body = save(content).read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/me/small/resolve/main/model.pth"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body) if found else 0))
            self.send_header("X-Repo-Commit", "f" * 40)
            self.send_header("ETag", '"a"')
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Error-Message", "Entry not found")
            self.end_headers()
            if found and self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Handler) as address:
        yield address


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["reference_import.py", *arguments, "--run-name", "fetched"])
    return reference_import.main()


def test_the_command_with_a_file_from_the_hub(
    hub: str, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "ENDPOINT", hub)  # as HF_ENDPOINT sets them when the client is imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}")
    assert call(monkeypatch, "--hub", "me/small", "model.pth") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["checkpoint"] == str(runs / "fetched/checkpoints/step_0000003")
    assert load_model(Path(summary["run"])).step == 3
    with pytest.raises(UserError, match=r"get other.pth of me/small from http.*: HTTP 404 Not Found: Entry not found"):
        call(monkeypatch, "--hub", "me/small", "other.pth")
    with pytest.raises(UserError, match=r"me/small/more from .*HFValidationError"):
        call(monkeypatch, "--hub", "me/small/more", "x")
