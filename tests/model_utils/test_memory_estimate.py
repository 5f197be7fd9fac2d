"""Estimated memory, compared with what autograd keeps and with PyTorch's allocator."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from src.model import LLM
from src.model_configs.my_llm_config import FAST_OPTIM, fast_model, lf_llm_269m, lf_llm_269m_fast
from src.model_utils.adamw_opt import build_optimizers
from src.model_utils.memory_estimate import Step, activation_bytes, estimate_memory, parameter_counts
from src.model_utils.weight_init import init_weights
from src.params import Config, ModelConfig, OptimConfig
from src.utils.hardware import autocast

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def small(dropout: float = 0.1, n_vocab: int = 2003) -> ModelConfig:
    return ModelConfig(n_vocab, 64, 128, 4, 2, residual_dropout=dropout, ffn_dropout=dropout)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("config", [small(0.0), small(0.1), fast_model(small()), replace(small(), ffn="relu2")])
def test_activations_are_what_autograd_keeps(precision: str, config: ModelConfig):
    dtype, kept = DTYPES[precision], {}
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


def allocated_at_most(
    config: ModelConfig,
    size: int,
    dtype: torch.dtype,
    accumulation: int,
    logits: str,
    optim: OptimConfig | None = None,
) -> int:
    """The most bytes of tensors that a step holds, as the allocator counts them, AdamW's moments being there."""
    model = LLM(config).train()
    init_weights(model, config, seed=0)  # with softmaxes that are not all but 0, for which a CPU takes long
    optimizers = build_optimizers(model, optim or OptimConfig())
    inputs_BT = torch.zeros(size, config.n_ctx, dtype=torch.int64)

    def step() -> None:
        for _ in range(accumulation):
            with autocast(CPU, dtype):
                if logits == "full":
                    loss = F.cross_entropy(model(inputs_BT).flatten(0, 1).float(), inputs_BT.flatten())
                else:
                    loss = model(inputs_BT, inputs_BT)
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    held, most = 0, 0
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    moments = sum(t.nbytes for optimizer in optimizers for state in optimizer.state.values() for t in state.values())
    return sum(parameter.nbytes for parameter in model.parameters()) + moments + most


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
    step = Step(config, size, dtype.itemsize, "cpu", int(accumulation > 1), logits=logits)  # type: ignore[arg-type]
    most = allocated_at_most(config, size, dtype, accumulation, logits)
    assert estimate_memory(step).total == pytest.approx(most, rel=0.02)


def test_so_does_a_step_of_the_fast_recipe():
    config = fast_model(small())
    most = allocated_at_most(config, 8, torch.bfloat16, 1, "chunked", FAST_OPTIM)
    step = Step(config, 8, 2, "cpu", kept_gradients=0, has_muon=True)
    assert estimate_memory(step).total == pytest.approx(most, rel=0.02)


def test_so_does_a_step_of_several_pieces_of_logits():
    config = ModelConfig(n_vocab=301, n_ctx=64, n_embd=32, n_head=2, n_layer=1)
    most = allocated_at_most(config, 160, torch.bfloat16, 1, "chunked")
    assert estimate_memory(Step(config, 160, 2, "cpu", 0)).total == pytest.approx(most, rel=0.02)


def test_parts_of_the_full_size():
    """Weights 4 bytes per parameter, moments 8, bf16 copies 2 for all but the embedding and the norms' gains.

    Gradients 4, and with DDP and accumulation as much again for its buckets.
    """
    step = Step(lf_llm_269m().model, 16, kept_gradients=2)
    memory = estimate_memory(step)
    assert (memory.weights, memory.gradients, memory.optimizer) == (1_280_581_632, 2_561_163_264, 2_561_163_264)
    assert estimate_memory(replace(step, kept_gradients=1)).gradients == 1_280_581_632
    assert memory.weight_copies == 2 * (268_682_240 - 33 * 1024)
    assert memory.total == sum(memory.__dict__.values())


def test_any_depth_is_counted_at_once():
    """The model itself with so many blocks would not fit into memory."""
    block = 3 * 1024 * 1025 + 1024 * 1025 + 8192 * 1025 + 4097 * 1024 + 2 * 1024
    config = replace(lf_llm_269m().model, n_layer=1_000_000_000)
    assert parameter_counts(config)[0] == 50_257 * 1024 + 1_000_000_000 * block + 1024


# Peaks in GB of torch.cuda.max_memory_allocated in bf16: PyTorch 2.13's CUDA build with its real allocator and
# compilers for an A100, whose kernels did nothing (tests/gpu_stand_in, LOG.md).
@pytest.mark.parametrize(
    ("recipe", "size", "is_compiled", "peak"),
    [
        (lf_llm_269m, 16, True, 34.838),
        (lf_llm_269m, 1, True, 7.926),
        (lf_llm_269m, 32, True, 62.659),
        (lf_llm_269m, 16, False, 41.735),
        (lf_llm_269m, 1, False, 8.880),
        (lf_llm_269m_fast, 16, True, 31.143),
        (lf_llm_269m_fast, 4, True, 11.931),
        (lf_llm_269m_fast, 16, False, 42.335),
    ],
)
def test_the_allocator_of_cuda_agrees(recipe: Callable[[], Config], size: int, is_compiled: bool, peak: float):
    config = recipe()
    step = Step(config.model, size, is_compiled=is_compiled, has_muon=config.optim.optimizer == "muon")
    assert estimate_memory(step).total / 1e9 == pytest.approx(peak, rel=0.01)


def test_the_references_step_took_more_than_it_allocated():
    """72 GB per GPU at micro-batch 16 with full logits, CUDA context, NCCL and fragmentation included."""
    step = Step(lf_llm_269m().model, 16, kept_gradients=2, logits="full")
    assert 0.8 * 72e9 < estimate_memory(step).total < 72e9
