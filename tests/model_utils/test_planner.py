"""The planner: cost by hand, what fits a GPU, the published run, and the command."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from src.model_configs.my_llm_config import debug, lf_llm_269m, lf_llm_269m_fast
from src.model_utils import planner
from src.model_utils.memory_estimate import Step, estimate_memory
from src.model_utils.planner import (
    GPUS,
    REFERENCE_MFU,
    cost,
    describe,
    largest_fit,
    plan_gpus,
    step_of,
    sweep,
    usable_bytes,
)
from src.params import Config, ConfigError, ModelConfig, OptimConfig, TrainConfig
from src.utils.errors import UserError


def test_the_published_run_took_what_the_planner_says():
    """8.0 h of training at 346k tokens/s, by its own log."""
    plan = plan_gpus(lf_llm_269m(), "a100-80g", 8, REFERENCE_MFU, 1.8)
    assert plan["hours"] == pytest.approx(8.0, rel=0.02)
    assert plan["tokens_per_second"] == pytest.approx(346e3, rel=0.01)
    assert plan["dollars"] == pytest.approx(8 * 8.0 * 1.8, rel=0.02)


def test_the_step_follows_from_settings_and_processes():
    """16 x 8 of 256 sequences: two passes per step. So gradients and DDP's buckets both exist. CUDA compiles."""
    config = lf_llm_269m()
    assert step_of(config, 16, 8) == Step(config.model, 16, 2, "cuda", 2, True)
    assert step_of(config, 32, 8) == Step(config.model, 32, 2, "cuda", 1, True)
    alone = replace(config, train=replace(config.train, batch_tokens=16 * 2048, precision="float32"))
    assert step_of(alone, 16, 1, "cpu") == Step(config.model, 16, 4, "cpu", 0, False)
    for train in (replace(config.train, compile="off"), replace(config.train, micro_batch_size="auto")):
        assert not step_of(replace(config, train=train), 16, 8).is_compiled  # auto is tried uncompiled


def test_the_references_step_would_not_have_fitted_twice():
    """It took 72 of 80 GB. The share that is usable leaves room for what the estimate leaves out."""
    step = replace(step_of(lf_llm_269m(), 16, 8), logits="full")
    assert estimate_memory(step).total < usable_bytes(GPUS["a100-80g"])
    assert estimate_memory(replace(step, micro_batch_size=32)).total > usable_bytes(GPUS["a100-80g"])
    assert largest_fit(lf_llm_269m(), GPUS["a100-80g"], 8) == 32  # compiled, with fused logits


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config, gpu = lf_llm_269m(), GPUS["a100-80g"]
    for count in (1, 2, 8):
        size = largest_fit(config, gpu, count)
        assert 256 // count % size == 0
        assert estimate_memory(step_of(config, size, count)).total <= usable_bytes(gpu)
        if size * count < 256:
            assert estimate_memory(step_of(config, 2 * size, count)).total > usable_bytes(gpu)


def test_cost_by_hand():
    """6 N + 12 L D T operations a token; 16 L4s of 121 TFLOP/s at a quarter of the peak, at $0.50 each."""
    config = replace(
        debug(),
        model=ModelConfig(n_ctx=256, n_embd=384, n_head=6, n_layer=6),
        optim=OptimConfig(),
        train=TrainConfig(total_tokens=20_000_000, batch_tokens=8_192, micro_batch_size=8),
    )
    tokens_per_second = 16 * 121e12 / 4 / (6 * 33_489_408 + 12 * 6 * 384 * 256)
    hours = 2441 * 8192 / tokens_per_second / 3600
    found = cost(config, GPUS["l4"], 16, 0.25, 0.5)
    assert found.tokens_per_second == pytest.approx(tokens_per_second)
    assert (found.hours, found.dollars) == pytest.approx((hours, 8 * hours))
    exact = replace(config, train=replace(config.train, precision="float32"))  # at half the rate
    assert cost(exact, GPUS["l4"], 16, 0.25).hours == pytest.approx(2 * hours)


def test_the_fast_recipe_is_shown_next_to_the_published_one():
    """Muon's work by hand: five polynomials, each three products, of four square and three wide matrices a block."""
    config, D = lf_llm_269m_fast(), 1024
    square, wide = 3 * 2 * D**3, 2 * (D * D * 4 * D) * 2 + 2 * D**3
    muon = 16 * 5 * (4 * square + 3 * wide)
    assert describe(config)["optimizer_flops_per_step"] == muon
    plan = plan_gpus(config, "a100-80g", 8, 0.5, 1.0)
    per_token = 6 * plan_parameters(config) + 12 * 16 * D * 2048 + muon / 524_288
    assert plan["tokens_per_second"] == pytest.approx(8 * 312e12 * 0.5 / per_token)
    assert plan["memory_bytes"]["optimizer"] == 4 * (2 * plan_parameters(config) - 16 * 16 * D * D)
    published = plan_gpus(lf_llm_269m(), "a100-80g", 8, 0.5, 1.0)
    assert plan["published_recipe"]["hours"] == published["hours"]
    assert "published_recipe" not in published


def plan_parameters(config: Config) -> int:
    """The table, and in each of 16 blocks sixteen square matrices and gains; the final norm's gain."""
    D = config.model.n_embd
    return 50_257 * D + 16 * (16 * D * D + 2 * D + 2 * 64) + D


def test_sweep_leaves_out_counts_that_cannot_share_and_says_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run(monkeypatch, "debug", "--sweep", "--gpu", "l4", "--train.batch-tokens", str(6 * 128), "--train.total-steps=9")
    assert [row["gpus"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["sweep"]] == [1, 2]
    large = replace(lf_llm_269m(), model=ModelConfig(n_embd=4096, n_head=32, n_layer=20))
    rows = {row["gpu"]: row for row in sweep(large, {"rtx-3090": 2.0, "b200": 2.0}, [16], 0.32)}
    assert not rows["rtx-3090"]["fits"]
    assert rows["rtx-3090"]["dollars"] is None
    assert rows["b200"]["fits"]
    assert rows["b200"]["dollars"] == pytest.approx(2.0 * 16 * rows["b200"]["hours"])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["planner.py", *arguments])
    planner.main()


def test_the_command_prints_tables_and_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "lf_llm_269m", "--gpu", "l4", "--gpus", "2", "--model.n-layer", "8", "--mfu", "0.5")
    printed = capsys.readouterr()
    plan = json.loads(printed.out.splitlines()[-1])
    block = 3 * 1024 * 1025 + 1024 * 1025 + 8192 * 1025 + 4097 * 1024 + 2 * 1024
    assert plan["parameters"] == 50_257 * 1024 + 8 * block + 1024
    assert plan["disk_bytes"]["data"] == 2 * (plan["tokens"] + 2_097_152)
    # four that stay for good, the two last, and the one that is being written
    assert plan["disk_bytes"]["checkpoints"] == 7 * plan["disk_bytes"]["one_checkpoint"]
    assert (plan["fits"], plan["mfu_source"]) == (False, "as given")
    assert 0 < plan["largest_micro_batch_size"] < 16
    assert re.search(r"fits +NO", printed.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("price", ["2,9", "l4=1,8", "t4=1", "h200=3", "nan", "0"])
def test_a_price_that_is_no_number_or_of_an_unknown_kind_is_refused(monkeypatch: pytest.MonkeyPatch, price: str):
    with pytest.raises(UserError, match="--price-per-gpu-hour" if "=" in price else "GPU=DOLLARS"):
        run(monkeypatch, "debug", "--gpu", "l4", f"--price-per-gpu-hour={price}")


def test_a_sweep_has_a_line_a_kind_with_its_price(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run(monkeypatch, "lf_llm_269m", "--sweep", "--price-per-gpu-hour", "a100-80g=2,h200=3.5")
    rows = {row["gpu"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["sweep"]}
    assert set(rows) == set(GPUS)
    assert {row["gpus"] for row in rows.values()} == {8}
    for kind, price in (("a100-80g", 2), ("h200", 3.5)):
        assert rows[kind]["dollars"] == pytest.approx(price * 8 * rows[kind]["hours"])
    run(monkeypatch, "lf_llm_269m", "--sweep", "--gpu", "l4")
    assert [row["gpus"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["sweep"]] == [1, 2, 4, 8, 16]


def test_without_a_gpu_it_is_about_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run(monkeypatch, "debug", "--train.device", "cpu", "--train.precision", "float32")
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (plan["device"], plan["matmuls_in"]) == ("cpu", "float32")
    assert plan["memory_bytes"]["total"] == estimate_memory(Step(debug().model, 4, 4, "cpu", 0, has_muon=True)).total
    assert "hours" not in plan


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--gpu", "a100-80g", "--gpus", "3"], ConfigError, "1, 2 or 4 process"),
        (["--gpu", "l4", "--model.n-layer", "80"], UserError, "not even one sequence of 2048 tokens fits"),
    ],
)
def test_what_cannot_work_is_said(
    arguments: list[str], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(error, match=words):
        run(monkeypatch, "lf_llm_269m", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu=t4"], "rtx-3090"),
        (["--gpus=8"], "name one with --gpu"),
        *(
            (["--gpu=l4", f"{option}={value}"], f"Cannot use {option}: {value!r} is not a ")
            for option, value in (("--gpus", "0"), ("--gpus", "9007199254740992"), ("--mfu", "32"))
        ),
    ],
)
def test_impossible_options_are_refused(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "lf_llm_269m", *arguments)
