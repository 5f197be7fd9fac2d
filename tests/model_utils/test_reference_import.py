"""The reference's checkpoint files as runs of ours: the same model, the same training, and nothing from a bad file."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pretrain
import src.params
from src.model_configs.my_llm_config import lf_llm_269m
from src.model_utils import reference_import
from src.model_utils.load_model import load_model
from src.model_utils.reference_format import read_reference, their_name
from src.model_utils.reference_import import import_reference
from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from src.utils import root
from src.utils.errors import BusyError, StorageError, UserError
from src.utils.run_directory import claimed
from tests.conftest import Commands
from tests.reference import CONFIG, ours, reference_tensors

Content = dict[str, Any]


class HParams:
    """As the reference's class is pickled: a class of this name and module, with attributes."""

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


HParams.__module__, HParams.__qualname__ = "src.params", "HParams"
SHAPE = ModelConfig(n_vocab=300, n_ctx=16, n_embd=16, n_head=2, n_layer=2, residual_dropout=0.0, ffn_dropout=0.0)


def hparams(**changes: object) -> HParams:
    values = {"n_vocab": 300, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
    return HParams(**{**values, "ffn_act_pdrop": 0.0, "attn_res_pdrop": 0.0, **changes})


def reference_parameters() -> dict[str, nn.Parameter]:
    """Of a model of SHAPE, in the reference's order and under its names."""
    shapes: dict[str, tuple[int, ...]] = {"embd.weight": (300, 16)}
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        for name, out, into in (("attn.qkv_proj", 48, 16), ("attn.out_proj", 16, 16)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        for name, out, into in (("ffn.net.0", 128, 16), ("ffn.net.3", 16, 64)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        shapes |= {f"{block}.norm1.weight": (16,), f"{block}.norm2.weight": (16,)}
    shapes["norm.weight"] = (16,)
    return {name: nn.Parameter(0.1 * torch.randn(shape)) for name, shape in shapes.items()}


def adamw(parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """As the reference makes it."""
    decayed = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    others = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


def file_content(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> Content:
    state = {name: parameter.detach() for name, parameter in parameters.items()}
    return {
        "model_state_dict": {**state, "out_proj.weight": state["embd.weight"]},
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": None,
        "step": step,
        "hParams": hparams(),
        "random_state": torch.get_rng_state(),
    }


@pytest.fixture
def content() -> Content:
    """Of a file after three steps."""
    parameters = reference_parameters()
    optimizer = adamw(parameters)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return file_content(parameters, optimizer, step=3)


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Writes a file as the reference does, where its class has the name that it has there."""

    def write(content: Any) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(src.params, "HParams", HParams, raising=False)
            torch.save(content, tmp_path / "model.pth")
        return tmp_path / "model.pth"

    return write


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(root, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(pretrain, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def recipe(run_name: str = "imported") -> Config:
    return replace(lf_llm_269m(), run_name=run_name)


def refusal(path: Path, runs: Path, config: Config | None = None, to_train: bool = False) -> str:
    """What an import that must fail says, in one line, leaving nothing behind."""
    with pytest.raises(UserError) as caught:
        import_reference(path, config or recipe(), to_train)
    assert not runs.exists() or not list(runs.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["as it is", "compiled", "weights alone"])
def test_logits_are_the_references(shared: Path, save: Callable[[Any], Path], kind: str):
    path = shared / "reference" / "reference_checkpoint.pth"
    if kind != "as it is":
        with torch.serialization.safe_globals([(HParams, "src.params.HParams")]):
            content = torch.load(path, weights_only=True)
        if kind == "compiled":
            state = content["model_state_dict"]
            content["model_state_dict"] = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
        else:
            content = {key: content[key] for key in ("model_state_dict", "hParams", "step")}
        path = save(content)
    made = import_reference(path, recipe())
    loaded = load_model(Path("imported"))
    tensors = reference_tensors(shared / "reference")
    with torch.no_grad():
        assert (loaded.model(tensors["input_ids"]) - tensors["logits"]).abs().max() < 1e-5
    assert loaded.config.model == CONFIG
    assert (made["step"], loaded.step, loaded.dataset_sha256) == (0, 0, "")
    assert made["parameters"] == sum(parameter.numel() for parameter in loaded.model.parameters())


def test_a_run_directory_is_made(content: Content, save: Callable[[Any], Path], runs: Path):
    path = save(content)
    made = import_reference(path, recipe())
    assert made["run"] == str(runs / "imported")
    assert made["checkpoint"] == str(runs / "imported/checkpoints/step_0000003")
    assert made["optimizer_state"]
    assert sorted(entry.name for entry in runs.iterdir()) == ["imported"]
    settings = json.loads((runs / "imported/config.json").read_text())
    assert settings["config"]["model"] == src.params.to_dict(SHAPE)
    assert settings["derived"]["parameters"] == made["parameters"]
    assert settings["imported"]["bytes"] == path.stat().st_size
    assert "machine" not in settings
    status = json.loads((runs / "imported/status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("stopped", 3, "imported from model.pth")
    lines = (runs / "imported/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["event", "checkpoint"]


def test_optimizer_state_is_each_parameters_own(content: Content, save: Callable[[Any], Path]):
    names = [name for name in content["model_state_dict"] if name != "out_proj.weight"]
    ranks = {name: content["model_state_dict"][name].dim() for name in names}
    in_groups = [n for n in names if ranks[n] == 2] + [n for n in names if ranks[n] == 1]
    found = read_reference(save(content))
    for number, name in enumerate(in_groups):
        for kind, tensor in content["optimizer_state_dict"]["state"][number].items():
            assert torch.equal(found.optimizer[f"{kind}.{ours(name)}"], tensor), (kind, name)
    assert len(found.optimizer) == 3 * len(names)
    assert {their_name(name) for name in found.weights} == set(names)
    assert found.optim == {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def config(dataset: Callable[..., Path], one_thread: None) -> Config:
    """Six steps of a model of SHAPE, with checkpoints at 3 and 6."""
    return Config(
        run_name="whole",
        model=SHAPE,
        data=DataConfig(dir=str(dataset(train_tokens=[2_000], n_vocab=300))),
        optim=OptimConfig(max_lr=5e-3, warmup_steps=2),
        train=TrainConfig(total_steps=6, batch_tokens=64, micro_batch_size=4, precision="float32", device="cpu"),
        eval=EvalConfig(val_tokens=160, hellaswag_items=0),
        checkpoint=CheckpointConfig(every_steps=3),
    )


def test_training_goes_on_as_if_it_had_been_ours(config: Config, save: Callable[[Any], Path], runs: Path):
    pretrain.train(config)
    whole = runs / "whole/checkpoints"
    weights, moments = (load_file(whole / f"step_0000003/{name}.safetensors") for name in ("model", "optimizer"))
    parameters = reference_parameters()
    optimizer = adamw(parameters)
    for name, parameter in parameters.items():
        parameter.data = weights[ours(name)]
        optimizer.state[parameter] = {k: moments[f"{k}.{ours(name)}"] for k in ("step", "exp_avg", "exp_avg_sq")}
    path = save(file_content(parameters, optimizer, step=3))

    again = replace(config, run_name="imported")
    import_reference(path, again, to_train=True)
    assert pretrain.train(again).step == 6
    for name in ("model", "optimizer"):
        expected = load_file(whole / f"step_0000006/{name}.safetensors")
        found = load_file(runs / f"imported/checkpoints/step_0000006/{name}.safetensors")
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key


def test_training_starts_from_a_file_of_before_the_first_step(config: Config, save: Callable[[Any], Path], runs: Path):
    parameters = reference_parameters()
    path = save(file_content(parameters, adamw(parameters), step=0))
    hardly = replace(config, optim=replace(config.optim, max_lr=1e-12))
    import_reference(path, hardly, to_train=True)
    assert pretrain.train(hardly).step == 6
    weights = load_model(runs / "whole").model.state_dict()
    for name, parameter in parameters.items():
        assert torch.allclose(weights[ours(name)], parameter, atol=1e-8), name


def test_training_does_not_go_on_with_unknown_data(config: Config, content: Content, save: Callable[[Any], Path]):
    import_reference(save(content), recipe("whole"))
    with pytest.raises(UserError, match=r"another configuration:\n(.*\n)*  - data \(sha256 of its manifest\)"):
        pretrain.train(config)


def test_settings_to_go_on_with_have_to_be_the_files(
    config: Config, content: Content, save: Callable[[Any], Path], runs: Path
):
    path = save(content)
    other = replace(config, model=replace(SHAPE, n_layer=3), optim=replace(config.optim, beta2=0.99))
    said = refusal(path, runs, other, to_train=True)
    assert "model.n_layer = 3, in the file 2; optim.beta2 = 0.99, in the file 0.95" in said
    short = replace(config, train=replace(config.train, total_steps=2), optim=replace(config.optim, warmup_steps=0))
    assert "train.total_steps = 2, of which the file has taken 3" in refusal(path, runs, short, to_train=True)
    nowhere = replace(config, data=DataConfig(dir="/nowhere"))
    assert "cannot read /nowhere/manifest.json" in refusal(path, runs, nowhere, to_train=True)


def test_what_the_file_says_replaces_the_recipe(content: Content, save: Callable[[Any], Path], runs: Path):
    content["hParams"] = hparams(n_ctx=1_000, attn_res_pdrop=0.25)
    content["optimizer_state_dict"]["param_groups"][0]["betas"] = (0.8, 0.9)
    content["step"] = 30_000
    for entry in content["optimizer_state_dict"]["state"].values():
        entry["step"] = 30_001  # as torch wrote it once
    import_reference(save(content), recipe())
    found = load_model(runs / "imported")
    assert found.step == found.config.total_steps == 30_001
    assert found.config.model == replace(SHAPE, n_ctx=1_000, residual_dropout=0.25)
    assert (found.config.optim.beta1, found.config.optim.beta2) == (0.8, 0.9)
    assert found.config.train.batch_tokens == 512_000
    assert json.loads((runs / "imported/status.json").read_text())["state"] == "done"
    event = json.loads((runs / "imported/metrics.jsonl").read_text().splitlines()[0])
    assert "its step says 30000, but its optimizer has taken 30001" in event["detail"]


def test_what_is_worth_a_note(content: Content, save: Callable[[Any], Path]):
    content |= {"val_loss": 2.8}
    del content["optimizer_state_dict"]
    notes = read_reference(save(content)).notes
    assert len(notes) == 2
    assert "'val_loss'" in notes[0]
    assert "start from zero" in notes[1]


def test_tensors_of_another_kind_become_ours(content: Content, save: Callable[[Any], Path], runs: Path):
    """Half precision, nn.Parameter and transposed."""
    state = content["model_state_dict"]
    state["embd.weight"] = state["out_proj.weight"] = state["embd.weight"].bfloat16()
    state["norm.weight"] = nn.Parameter(state["norm.weight"])
    name = "transformer_blocks.0.attn.out_proj.weight"
    state[name] = state[name].T
    import_reference(save(content), recipe())
    weights = load_model(runs / "imported").model.state_dict()
    for name, tensor in state.items():
        if name != "out_proj.weight":
            assert torch.equal(weights[ours(name)], tensor.float()), name


class Runs:
    """Runs a program where it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("where", ["content", "hParams", "model_state_dict", "step", "unknown"])
@pytest.mark.parametrize("how", [os.mkdir, eval, __import__, getattr])
def test_nothing_in_a_file_is_run(
    content: Content, save: Callable[[Any], Path], runs: Path, tmp_path: Path, where: str, how: Callable[..., Any]
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
    said = refusal(path, runs)
    assert "nothing of it was run" in said
    assert not mark.exists()


def test_code_that_hides_behind_the_class_is_not_run(content: Content, save: Callable[[Any], Path], runs: Path):
    """The class itself may be called with anything, or get any attribute: it has no code to abuse."""
    content["hParams"] = hparams(__class__="x", __setstate__="y")
    assert "hParams has '__class__' = 'x'" in refusal(save(content), runs)
    content["hParams"] = Runs(HParams, "x")
    assert "cannot be read as data (TypeError" in refusal(save(content), runs)


CHANGES: dict[str, tuple[Callable[[Content], Any], str]] = {
    "no weights": (lambda c: c.pop("model_state_dict"), "the key model_state_dict is missing; its keys are 'optim"),
    "no hParams": (lambda c: c.pop("hParams"), "the key hParams is missing"),
    "no step": (lambda c: c.pop("step"), "the key step is missing"),
    "weights a list": (lambda c: c.update(model_state_dict=[1]), "model_state_dict = [1] is not a dict of tensors"),
    "hParams a dict": (lambda c: c.update(hParams=vars(hparams())), "is not an instance of src.params.HParams"),
    "hParams without one": (lambda c: c["hParams"].__dict__.pop("n_ctx"), "hParams.n_ctx is missing"),
    "hParams with more": (lambda c: c.update(hParams=hparams(theta=5.0)), "hParams has 'theta' = 5.0, a setting"),
    "hParams a text": (lambda c: c.update(hParams=hparams(n_ctx="16")), "hParams.n_ctx = '16' is not of the type int"),
    "hParams a bool": (lambda c: c.update(hParams=hparams(n_layer=True)), "hParams.n_layer = True is not of the type"),
    "heads": (lambda c: c.update(hParams=hparams(n_head=3)), "n_embd = 16 is not divisible by model.n_head = 3"),
    "dropout": (lambda c: c.update(hParams=hparams(ffn_act_pdrop=1.5)), "model.ffn_dropout = 1.5 must be"),
    "layers": (lambda c: c.update(hParams=hparams(n_layer=10**9)), "n_layer = 1000000000, but model_state_dict has 2"),
    "vocabulary": (
        lambda c: c.update(hParams=hparams(n_vocab=299)),
        "hParams.n_vocab, n_embd = [299, 16], but embd.weight has the shape [300, 16]",
    ),
    "a weight missing": (
        lambda c: c["model_state_dict"].pop("norm.weight"),
        "has no norm.weight (1 of 22 are missing)",
    ),
    "a weight too many": (
        lambda c: c["model_state_dict"].update({"norm.bias": torch.zeros(16)}),
        "'norm.bias' = a tensor [16] in model_state_dict has no place",
    ),
    "a shape": (
        lambda c: c["model_state_dict"].update({"norm.weight": torch.zeros(17)}),
        "norm.weight has the shape [17], expected [16]",
    ),
    "no tensor": (
        lambda c: c["model_state_dict"].update({"norm.weight": [1.0]}),
        "norm.weight = [1.0] is not a tensor",
    ),
    "whole numbers": (
        lambda c: c["model_state_dict"].update({"norm.weight": torch.ones(16, dtype=torch.int64)}),
        "norm.weight = a tensor [16] is not a tensor of real numbers",
    ),
    "no numbers": (
        lambda c: c["model_state_dict"].update({"norm.weight": torch.ones(16, device="meta")}),
        "norm.weight is a tensor without numbers of its own",
    ),
    "NaN": (lambda c: c["model_state_dict"]["norm.weight"].fill_(torch.nan), "norm.weight[0] = nan is not finite"),
    "infinity": (
        lambda c: c["model_state_dict"]["transformer_blocks.1.ffn.net.3.weight"][5].fill_(torch.inf),
        "transformer_blocks.1.ffn.net.3.weight[5, 0] = inf is not finite",
    ),
    "one number for all": (
        lambda c: c["model_state_dict"].update({"norm.weight": torch.ones(1).expand(16)}),
        "norm.weight has the shape [16], but fewer numbers than that",
    ),
    "one memory for two": (
        lambda c: c["model_state_dict"].update(
            {"norm.weight": c["model_state_dict"]["transformer_blocks.0.norm1.weight"]}
        ),
        "norm.weight has the same memory as transformer_blocks.0.norm1.weight",
    ),
    "another head": (
        lambda c: c["model_state_dict"].update({"out_proj.weight": torch.zeros(300, 16)}),
        "out_proj.weight is not embd.weight",
    ),
    "step below zero": (lambda c: c.update(step=-1), "step = -1 is not a number of steps"),
    "step a text": (lambda c: c.update(step="3"), "step = '3' is not a number of steps"),
    "optimizer a text": (lambda c: c.update(optimizer_state_dict="x"), "optimizer_state_dict = 'x' is not"),
    "another optimizer": (
        lambda c: c["optimizer_state_dict"].update(param_groups=[{"params": [0], "lr": 0.1}]),
        "param_groups in optimizer_state_dict is not AdamW's (KeyError: 'weight_decay')",
    ),
    "one group": (
        lambda c: c["optimizer_state_dict"]["param_groups"][0]["params"].pop(),
        "have [8, 13] parameters, expected 9 matrices and 13 others",
    ),
    "all decay": (
        lambda c: c["optimizer_state_dict"]["param_groups"][1].update(weight_decay=0.1),
        "is [0.1, 0.1], expected 0 in the second group",
    ),
    "beta": (
        lambda c: c["optimizer_state_dict"]["param_groups"][0].update(betas=(0.9, 1.5)),
        "optim.beta2 = 1.5 must be",
    ),
    "half a state": (lambda c: c["optimizer_state_dict"]["state"].pop(3), "the state of 21 parameters, not of 22"),
    "another state": (
        lambda c: c["optimizer_state_dict"]["state"][3].pop("exp_avg"),
        "state[3] (transformer_blocks.0.ffn.net.0.weight) = {",
    ),
    "a moment's shape": (
        lambda c: c["optimizer_state_dict"]["state"][0].update(exp_avg=torch.zeros(16)),
        "state[0] (embd.weight).exp_avg has the shape [16], expected [300, 16]",
    ),
    "a moment's NaN": (
        lambda c: c["optimizer_state_dict"]["state"][21]["exp_avg_sq"].fill_(torch.nan),
        "state[21] (norm.weight).exp_avg_sq[0] = nan",
    ),
    "unequal steps": (
        lambda c: c["optimizer_state_dict"]["state"][9]["step"].fill_(2),
        "step = 2.0, in state[0] 3.0",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_references(content: Content, save: Callable[[Any], Path], runs: Path, change: str):
    spoil, expected = CHANGES[change]
    spoil(content)
    assert expected in refusal(save(content), runs)


def test_another_content(save: Callable[[Any], Path], runs: Path):
    assert "it holds [1, 2], not a dict" in refusal(save([1, 2]), runs)


def test_files_that_are_damaged_or_of_another_kind(
    content: Content, save: Callable[[Any], Path], runs: Path, tmp_path: Path
):
    path = save(content)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "not a whole file of torch.save" in refusal(path, runs)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "does not agree with its checksum" in refusal(path, runs)
    path.write_text("# a page\n")
    assert "not a whole file of torch.save" in refusal(path, runs)
    torch.save(content["model_state_dict"], path, _use_new_zipfile_serialization=False)
    assert "not a whole file of torch.save" in refusal(path, runs)
    assert "No such file" in refusal(tmp_path / "missing.pth", runs)
    assert "Is a directory" in refusal(tmp_path, runs)


def test_nothing_is_overwritten(content: Content, save: Callable[[Any], Path], runs: Path):
    path = save(content)
    (runs / "imported").mkdir(parents=True)
    with pytest.raises(UserError, match="is there already; choose another --run-name"):
        import_reference(path, recipe())
    with claimed(runs / "other"), pytest.raises(BusyError):
        import_reference(path, recipe("other"))
    assert list((runs / "imported").iterdir()) == []


def test_a_disk_that_cannot_be_written_keeps_nothing(
    content: Content, save: Callable[[Any], Path], runs: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = save(content)
    monkeypatch.setattr("src.model_utils.checkpoint_utils.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        import_reference(path, recipe())
    assert list(runs.iterdir()) == []
    monkeypatch.setattr(root, "RUNS", path)
    with pytest.raises(StorageError, match="Not a directory"):
        import_reference(path, recipe())


@pytest.fixture
def hub(content: Content, save: Callable[[Any], Path]) -> Iterator[str]:
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

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets what HF_ENDPOINT sets when the client is imported."""
    monkeypatch.setattr(reference_import.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(reference_import.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_the_command_with_a_file_from_the_hub(hub: str, commands: Commands, tmp_path: Path):
    commands.environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf")}
    command = ("src.model_utils.reference_import", "--hub", "me/small", "model.pth", "--run-name", "fetched")
    done = commands.module(*command)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["checkpoint"] == str(tmp_path / "runs/fetched/checkpoints/step_0000003")
    assert load_model(Path(made["run"])).step == 3
    again = commands.module(*command)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("reference_import.py: error: ")
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("repository", "file", "words"),
    [
        (
            "me/small",
            "other.pth",
            r"cannot get other.pth of me/small from http.*\(HTTP 404: Entry not found.*\); check",
        ),
        ("me/small/more", "x", "--hub 'me/small/more' cannot be a repository"),
    ],
)
def test_what_the_hub_does_not_have(hub: str, monkeypatch: pytest.MonkeyPatch, repository: str, file: str, words: str):
    ask(hub, monkeypatch)
    monkeypatch.setattr("sys.argv", ["x", "--hub", repository, file, "--run-name", "fetched"])
    with pytest.raises(UserError, match=words):
        reference_import.main()


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    ask("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr("sys.argv", ["x", "--hub", "me/small", "model.pth", "--run-name", "fetched"])
    with pytest.raises(
        UserError, match=r"cannot get model.pth of me/small from http://127.0.0.1:9 \(ConnectError: .*refused"
    ):
        reference_import.main()
    assert capsys.readouterr() == ("", "")  # it is not tried again and again


def test_settings_on_the_command_line(
    content: Content, save: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch, dataset: Callable[..., Path]
):
    folder = dataset(train_tokens=[2_000], n_vocab=300)
    command = ["x", "--checkpoint", str(save(content)), "--run-name", "imported"]
    sizes = {"n-vocab": 300, "n-ctx": 16, "n-embd": 16, "n-head": 2, "n-layer": 2}
    shape = [word for name, value in sizes.items() for word in (f"--model.{name}", str(value))]
    monkeypatch.setattr("sys.argv", [*command, "laptop", *shape, "--data.dir", str(folder)])
    with pytest.raises(UserError, match=r"the settings .*: model.residual_dropout = 0.1, in the file 0.0; model.ffn_"):
        reference_import.main()
    no_dropout = ["--model.residual-dropout", "0", "--model.ffn-dropout", "0"]
    monkeypatch.setattr("sys.argv", [*command, "laptop", *shape, *no_dropout, "--data.dir", str(folder)])
    assert reference_import.main() == 0
    loaded = load_model(Path("imported"))
    assert loaded.config.run_name == "imported"
    assert loaded.config.data.dir == str(folder)
    assert len(loaded.dataset_sha256) == 64
    monkeypatch.setattr("sys.argv", [*command, "--train.total-steps", "5"])
    with pytest.raises(UserError, match=r"--train\.total-steps is unknown here"):
        reference_import.main()
