"""The planner's estimates, compared with what a real step does and with the facts of the published run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from src.model import LLM
from src.model_configs.my_llm_config import debug, laptop, lf_llm_269m
from src.model_utils import planner
from src.model_utils.adamw_opt import build_adamw
from src.model_utils.gpus import GPUS
from src.model_utils.memory_estimate import Step, activation_bytes, estimate_memory
from src.model_utils.run_plan import Assumptions, cost, largest_fit, plan_gpus, step_of, sweep, usable_bytes
from src.model_utils.weight_init import init_weights
from src.params import ConfigError, ModelConfig, OptimConfig
from src.utils.errors import UserError
from src.utils.hardware import autocast

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def small(dropout: float = 0.1, n_vocab: int = 2003) -> ModelConfig:
    return ModelConfig(n_vocab, 64, 128, 4, 2, residual_dropout=dropout, ffn_dropout=dropout)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_autograd_keeps(precision: str, dropout: float):
    config, dtype, kept = small(dropout), DTYPES[precision], {}
    model = LLM(config).train()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(CPU, dtype):
        x_BTD = model.embedding(torch.zeros(5, 64, dtype=torch.int64))
        for block in model.blocks:
            x_BTD = block(x_BTD)
        model.norm(x_BTD)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    copies = 2 * matrices if precision == "bf16" else 0
    estimate = activation_bytes(Step(config, 5, dtype.itemsize, "cpu"))
    assert estimate == pytest.approx(sum(kept.values()) - copies, rel=0.01)


def allocated_at_most(config: ModelConfig, size: int, dtype: torch.dtype, accumulation: int, logits: str) -> int:
    """The most bytes of tensors that a step holds, as the allocator counts them, AdamW's moments being there."""
    model = LLM(config).train()
    init_weights(model, config, seed=0)  # with softmaxes that are not all but 0, for which a CPU takes long
    optimizer = build_adamw(model, OptimConfig())
    inputs_BT = torch.zeros(size, config.n_ctx, dtype=torch.int64)

    def step() -> None:
        for _ in range(accumulation):
            with autocast(CPU, dtype):
                if logits == "full":
                    loss = F.cross_entropy(model(inputs_BT).flatten(0, 1).float(), inputs_BT.flatten())
                else:
                    loss = model(inputs_BT, inputs_BT)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    held, most = 0, 0
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return 3 * sum(parameter.nbytes for parameter in model.parameters()) + most


@pytest.mark.parametrize(
    ("size", "precision", "accumulation", "logits"),
    [
        (1, "bf16", 2, "chunked"),  # most memory as the backward pass begins
        (8, "bf16", 1, "chunked"),  # in the loss
        (8, "float32", 2, "chunked"),
        (8, "bf16", 1, "full"),
    ],
)
def test_a_step_takes_the_memory_that_was_estimated(size: int, precision: str, accumulation: int, logits: str):
    config, dtype = small(), DTYPES[precision]
    step = Step(config, size, dtype.itemsize, "cpu", accumulation > 1, logits=logits)  # type: ignore[arg-type]
    most = allocated_at_most(config, size, dtype, accumulation, logits)
    assert estimate_memory(step).total == pytest.approx(most, rel=0.02)


def test_so_does_a_step_of_several_pieces_of_logits():
    config = ModelConfig(n_vocab=301, n_ctx=64, n_embd=32, n_head=2, n_layer=1)
    most = allocated_at_most(config, 160, torch.bfloat16, 1, "chunked")
    assert estimate_memory(Step(config, 160, 2, "cpu", False)).total == pytest.approx(most, rel=0.02)


def test_the_published_run_took_what_the_planner_says():
    """8.0 h of training at 346k tokens/s, by its own log, and 72 GB a GPU at micro-batch 16 with full logits."""
    plan = plan_gpus(lf_llm_269m(), "a100-80g", 8, Assumptions(price=1.8))
    assert plan["hours"] == pytest.approx(8.0, rel=0.02)
    assert plan["tokens_per_second"] == pytest.approx(346e3, rel=0.01)
    assert plan["dollars"] == pytest.approx(8 * 8.0 * 1.8, rel=0.02)
    full = estimate_memory(replace(step_of(lf_llm_269m(), 16, 8), logits="full")).total
    # It includes what is not estimated: the CUDA context, NCCL, and what the allocator wastes.
    assert 0.8 * 72e9 < full < 72e9


def test_parts_of_the_full_size():
    """Weights 4 bytes a parameter, moments 8, bf16 copies 2 for all but the embedding and the norms' gains.

    Gradients 4, and with DDP and accumulation as much for its buckets.
    """
    memory = estimate_memory(step_of(lf_llm_269m(), 16, 8))
    assert (memory.weights, memory.gradients, memory.optimizer) == (1_280_581_632, 2_561_163_264, 2_561_163_264)
    assert estimate_memory(step_of(lf_llm_269m(), 16, 1)).gradients == 1_280_581_632
    assert estimate_memory(step_of(lf_llm_269m(), 32, 8)).gradients == 1_280_581_632  # one pass a step
    assert memory.weight_copies == 2 * (268_682_240 - 33 * 1024)
    assert memory.total == sum(memory.__dict__.values())


def test_float32_takes_twice_the_time():
    config, gpu = lf_llm_269m(), GPUS["h100-80g"]
    exact = replace(config, train=replace(config.train, precision="float32"))
    assert cost(exact, gpu, 8, Assumptions()).hours == pytest.approx(2 * cost(config, gpu, 8, Assumptions()).hours)


def test_the_references_step_would_not_have_fitted_twice():
    """It took 72 of 80 GB; what is planned leaves room for what its memory was above the estimate."""
    step = replace(step_of(lf_llm_269m(), 16, 8), logits="full")
    assert estimate_memory(step).total < usable_bytes(GPUS["a100-80g"])
    assert estimate_memory(replace(step, micro_batch_size=32)).total > usable_bytes(GPUS["a100-80g"])
    assert largest_fit(lf_llm_269m(), GPUS["a100-80g"], 8).micro_batch_size == 16


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config, gpu = lf_llm_269m(), GPUS["a100-80g"]
    for count in (1, 2, 8):
        fit = largest_fit(config, gpu, count)
        assert fit.micro_batch_size * fit.accumulation_steps * count == 256
        assert fit.memory.total <= usable_bytes(gpu)
        if fit.accumulation_steps > 1:
            larger = estimate_memory(step_of(config, 2 * fit.micro_batch_size, count))
            assert larger.total > usable_bytes(gpu)


def test_cost_by_hand():
    """6 N + 12 L D T operations a token; 16 L4s of 121 TFLOP/s at a quarter of the peak, at $0.50 and 72 W each."""
    config = laptop()
    tokens_per_second = 16 * 121e12 / 4 / (6 * 33_489_408 + 12 * 6 * 384 * 256)
    hours = 2441 * 8192 / tokens_per_second / 3600
    found = cost(config, GPUS["l4"], 16, Assumptions(mfu=0.25, price=0.5, watts=0.0))
    assert found.tokens_per_second == pytest.approx(tokens_per_second)
    assert (found.hours, found.dollars, found.kwh) == pytest.approx((hours, 8 * hours, 16 * 0.072 * hours))


def test_sweep_leaves_out_counts_that_cannot_share_and_says_what_does_not_fit():
    config = debug()
    config = replace(config, train=replace(config.train, batch_tokens=6 * 128))
    assert [row["gpus"] for row in sweep(config, ["l4"], Assumptions())] == [1, 2]
    large = replace(lf_llm_269m(), model=ModelConfig(n_embd=4096, n_head=32, n_layer=20))
    rows = {row["gpu"]: row for row in sweep(large, ["rtx-3090", "b200"], Assumptions(price=2.0))}
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
    assert (plan["fits"], plan["kwh"], plan["mfu_source"]) == (False, None, "as given")
    assert 0 < plan["largest_micro_batch_size"] < 16
    assert "does NOT fit" in printed.err
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_is_about_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run(monkeypatch, "debug", "--train.device", "cpu", "--train.precision", "float32")
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (plan["device"], plan["matmuls_in"]) == ("cpu", "float32")
    assert plan["memory_bytes"]["total"] == estimate_memory(Step(debug().model, 16, 4, "cpu", False)).total
    assert "hours" not in plan


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--gpu", "a100-80"], UserError, "did you mean a100-80g"),
        (["--gpu", "t4"], UserError, "rtx-3090"),
        (["--gpu", "l4", "--gpus", "0"], UserError, "--gpus 0"),
        (["--gpu", "l4", "--price-per-gpu-hour", "-1"], UserError, "--price-per-gpu-hour -1"),
        (["--gpu", "l4", "--price-per-gpu-hour", "nan"], UserError, "--price-per-gpu-hour nan"),
        (["--gpu", "l4", "--mfu", "32"], UserError, "above 0 and at most 1"),
        (["--gpu", "l4", "--watts", "-5"], UserError, "--watts -5"),
        (["--gpus", "8"], UserError, "name one with --gpu"),
        (["--sweep", "--gpus", "4"], UserError, "is for one --gpu"),
        (["--gpu", "a100-80g", "--gpus", "3"], ConfigError, "1, 2 or 4 process"),
        (["--gpu", "l4", "--model.n-layer", "80"], UserError, "not even one sequence of 2048 tokens fits"),
    ],
)
def test_what_cannot_work_is_said(
    arguments: list[str], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(error, match=words):
        run(monkeypatch, "lf_llm_269m", *arguments)
