"""What is no checkpoint of the reference, or is damaged or hostile: refused in a line, nothing run, nothing kept."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.model_utils.reference_import import import_reference
from src.utils import root
from src.utils.errors import BusyError, StorageError, UserError
from src.utils.files import claimed
from tests.model_utils.reference_files.files import Content, HParams, hparams, recipe, refusal


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
