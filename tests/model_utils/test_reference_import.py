"""The reference's checkpoint files become runs of ours: same model, same training. Other files are refused, not run."""

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
from safetensors.torch import load_file
from torch import nn

import pretrain
import src.params
from src.model_configs.my_llm_config import lf_llm_269m
from src.model_utils import reference_import
from src.model_utils.load_model import load_model
from src.model_utils.reference_import import import_reference, read_reference
from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from src.utils import root
from src.utils.errors import StorageError, UserError
from tests.conftest import Commands
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


def reference_parameters() -> dict[str, nn.Parameter]:
    """Parameters of a model of SHAPE, in the reference's order and under its names."""
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
    """AdamW with the reference's groups."""
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


def recipe(run_name: str = "imported") -> Config:
    return replace(lf_llm_269m(), run_name=run_name)


@pytest.fixture
def content() -> Content:
    """The content of a file after three steps."""
    parameters = reference_parameters()
    optimizer = adamw(parameters)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return file_content(parameters, optimizer, step=3)


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
    monkeypatch.setattr(pretrain, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def refusal(path: Path, runs: Path, config: Config | None = None, to_train: bool = False) -> str:
    """The message of an import that fails: one line, and nothing is left behind."""
    with pytest.raises(UserError) as caught:
        import_reference(path, config or recipe(), to_train)
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
    summary = import_reference(path, recipe())
    loaded = load_model(Path("imported"))
    tensors = reference_tensors(shared / "reference")
    with torch.no_grad():
        assert (loaded.model(tensors["input_ids"]) - tensors["logits"]).abs().max() < 1e-5
    assert loaded.config.model == CONFIG
    assert (summary["step"], loaded.step, loaded.dataset_sha256) == (0, 0, "")
    assert summary["parameters"] == sum(parameter.numel() for parameter in loaded.model.parameters())


def test_a_run_directory_is_made(content: Content, save: Save, runs: Path):
    path = save(content)
    summary = import_reference(path, recipe())
    assert summary["run"] == str(runs / "imported")
    assert summary["checkpoint"] == str(runs / "imported/checkpoints/step_0000003")
    assert summary["optimizer_state"]
    assert [entry.name for entry in runs.iterdir()] == ["imported"]
    settings = json.loads((runs / "imported/config.json").read_text())
    assert settings["config"]["model"] == src.params.to_dict(SHAPE)
    assert summary["parameters"] == sum(p.numel() for p in load_model(runs / "imported").model.parameters())
    assert settings["imported"]["bytes"] == path.stat().st_size
    status = json.loads((runs / "imported/status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("done", 3, "imported from model.pth")


def test_optimizer_state_is_each_parameters_own(content: Content, save: Save):
    names = [name for name in content["model_state_dict"] if name != "out_proj.weight"]
    ranks = {name: content["model_state_dict"][name].dim() for name in names}
    in_groups = [n for n in names if ranks[n] == 2] + [n for n in names if ranks[n] == 1]
    checkpoint = read_reference(save(content))
    for number, name in enumerate(in_groups):
        for kind, tensor in content["optimizer_state_dict"]["state"][number].items():
            assert torch.equal(checkpoint.optimizer[f"{kind}.{ours(name)}"], tensor), (kind, name)
    assert len(checkpoint.optimizer) == 3 * len(names)


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


def test_training_continues_to_the_bit(config: Config, save: Save, runs: Path):
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
        resumed = load_file(runs / f"imported/checkpoints/step_0000006/{name}.safetensors")
        assert expected.keys() == resumed.keys()
        for key, tensor in expected.items():
            assert torch.equal(resumed[key], tensor), key


def test_training_needs_the_dataset_and_the_files_settings(config: Config, content: Content, save: Save, runs: Path):
    path = save(content)
    other = replace(config, model=replace(SHAPE, n_layer=3, rope_theta=5e5))
    assert f"the file has {SHAPE} and 3 steps" in refusal(path, runs, other, to_train=True)
    short = replace(config, train=replace(config.train, total_steps=2), optim=replace(config.optim, warmup_steps=0))
    assert "and 3 steps" in refusal(path, runs, short, to_train=True)
    nowhere = replace(config, data=DataConfig(dir="/nowhere"))
    assert "Cannot read /nowhere/manifest.json" in refusal(path, runs, nowhere, to_train=True)
    import_reference(path, recipe("whole"))  # without a dataset
    with pytest.raises(UserError, match=r"data \(sha256 of its manifest\)"):
        pretrain.train(config)


def test_the_files_settings_replace_the_recipes(content: Content, save: Save, runs: Path):
    content["hParams"] = hparams(n_ctx=1_000, attn_res_pdrop=0.25)
    content["step"] = 30_000
    for entry in content["optimizer_state_dict"]["state"].values():
        entry["step"] = 30_001  # as torch once wrote it
    import_reference(save(content), recipe())
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
    import_reference(save(content), recipe())
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
    "hParams a dict": (lambda c: c.update(hParams=vars(hparams())), "TypeError"),
    "hParams without one": (lambda c: c["hParams"].__dict__.pop("n_ctx"), "n_ctx"),
    "hParams with more": (lambda c: c.update(hParams=hparams(theta=5.0)), "theta"),
    "hParams a text": (lambda c: c.update(hParams=hparams(n_ctx="16")), "'str'"),
    "heads": (lambda c: c.update(hParams=hparams(n_head=3)), "n_embd = 16 is not divisible by model.n_head = 3"),
    "dropout": (lambda c: c.update(hParams=hparams(ffn_act_pdrop=1.5)), "model.ffn_dropout = 1.5 must be"),
    "layers": (lambda c: c.update(hParams=hparams(n_layer=10**9)), "n_layer"),
    "fewer layers": (lambda c: c.update(hParams=hparams(n_layer=1)), "missing or unknown: blocks.1"),
    "vocabulary": (
        lambda c: c.update(hParams=hparams(n_vocab=299)),
        "embedding.weight is not a tensor of floats with the shape [299, 16]",
    ),
    "a weight missing": (lambda c: c["model_state_dict"].pop("norm.weight"), "missing or unknown: norm.weight"),
    "a weight too many": (change_weight("norm.bias", torch.zeros(16)), "missing or unknown: norm.bias"),
    "a shape": (
        change_weight("norm.weight", torch.zeros(17)),
        "norm.weight is not a tensor of floats with the shape [16]",
    ),
    "no tensor": (change_weight("norm.weight", [1.0]), "norm.weight is not a tensor"),
    "whole numbers": (
        change_weight("norm.weight", torch.ones(16, dtype=torch.int64)),
        "norm.weight is not a tensor of floats",
    ),
    "no numbers": (change_weight("norm.weight", torch.ones(16, device="meta")), "norm.weight is not a tensor"),
    "NaN": (lambda c: c["model_state_dict"]["norm.weight"].fill_(torch.nan), "norm.weight is not finite"),
    "one number for all": (change_weight("norm.weight", torch.ones(1).expand(16)), "repeats the same memory"),
    "another head": (change_weight("out_proj.weight", torch.zeros(300, 16)), "differs from the embedding"),
    "a head of another shape": (change_weight("out_proj.weight", torch.zeros(3)), "differs from the embedding"),
    "step a text": (lambda c: c.update(step="3"), "'str'"),
    "step below zero": (lambda c: c.update(step=-1, optimizer_state_dict=None), "step is -1"),
    "optimizer a text": (lambda c: c.update(optimizer_state_dict="x"), "TypeError"),
    "one group": (
        lambda c: c["optimizer_state_dict"]["param_groups"][0]["params"].pop(),
        "groups are not matrices, and vectors",
    ),
    "all decay": (
        lambda c: c["optimizer_state_dict"]["param_groups"][1].update(weight_decay=0.1),
        "groups are not matrices, and vectors",
    ),
    "half a state": (lambda c: c["optimizer_state_dict"]["state"].pop(3), "lacks parameters"),
    "a moment's NaN": (
        lambda c: c["optimizer_state_dict"]["state"][21]["exp_avg_sq"].fill_(torch.nan),
        "exp_avg_sq.norm.weight is not finite",
    ),
    "unequal steps": (lambda c: c["optimizer_state_dict"]["state"][9]["step"].fill_(2), "their steps differ"),
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
    with pytest.raises(UserError, match=r"it exists\. Choose another --run-name"):
        import_reference(path, recipe())
    assert list((runs / "imported").iterdir()) == []
    monkeypatch.setattr("src.model_utils.checkpoint_utils.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        import_reference(path, recipe("other"))
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


def test_the_command_with_a_file_from_the_hub(hub: str, commands: Commands, tmp_path: Path):
    commands.environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf")}
    command = ("src.model_utils.reference_import", "--hub", "me/small", "model.pth", "--run-name", "fetched")
    done = commands.module(*command)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["checkpoint"] == str(tmp_path / "runs/fetched/checkpoints/step_0000003")
    assert load_model(Path(summary["run"])).step == 3


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["reference_import.py", *arguments])
    return reference_import.main()


def use_hub(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets what HF_ENDPOINT sets when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_files_that_the_hub_lacks(hub: str, monkeypatch: pytest.MonkeyPatch):
    use_hub(hub, monkeypatch)
    with pytest.raises(UserError, match=r"get other.pth of me/small from http.*: HTTP 404 Not Found: Entry not found"):
        call(monkeypatch, "--hub", "me/small", "other.pth", "--run-name", "fetched")
    with pytest.raises(UserError, match=r"me/small/more from .*HFValidationError"):
        call(monkeypatch, "--hub", "me/small/more", "x", "--run-name", "fetched")
    use_hub("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(UserError, match=r"get model.pth of me/small from http://127.0.0.1:9: ConnectError: .*refused"):
        call(monkeypatch, "--hub", "me/small", "model.pth", "--run-name", "fetched")


def test_settings_on_the_command_line(
    content: Content, save: Save, monkeypatch: pytest.MonkeyPatch, dataset: Callable[..., Path]
):
    folder = dataset(train_tokens=[2_000], n_vocab=300)
    command = ["--checkpoint", str(save(content)), "--run-name", "imported"]
    sizes = {"n-vocab": 300, "n-ctx": 16, "n-embd": 16, "n-head": 2, "n-layer": 2}
    shape = [word for name, value in sizes.items() for word in (f"--model.{name}", str(value))]
    no_dropout = ["--model.residual-dropout", "0", "--model.ffn-dropout", "0"]
    assert call(monkeypatch, *command, "laptop", *shape, *no_dropout, "--data.dir", str(folder)) == 0
    loaded = load_model(Path("imported"))
    assert loaded.config.run_name == "imported"
    assert loaded.config.data.dir == str(folder)
    assert len(loaded.dataset_sha256) == 64
    with pytest.raises(UserError, match=r"--train\.total-steps is unknown"):
        call(monkeypatch, *command, "--train.total-steps", "5")
