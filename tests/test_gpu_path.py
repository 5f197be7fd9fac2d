"""Properties that decide the speed on a GPU and can be seen on any machine."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain
from src.data_processing.shards import read_manifest
from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment import hellaswag, sampling
from src.model_configs.my_llm_config import FAST_OPTIM, fast_model
from src.model_utils import autotune
from src.model_utils.autotune import CompiledForward, settle
from src.params import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from src.utils.handle_ddp import ALONE, Processes
from src.utils.logger import RunLogger
from tests.test_compiling import CountingBackend

# Methods that read a tensor's numbers, and operators that do or whose result has as many numbers as the data says.
READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}


class Reads(TorchFunctionMode):
    """Counts calls of READS."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts operators of WAITS, also those that PyTorch calls by itself."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in WAITS or by_mask:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_fast", [False, True], ids=["faithful", "fast"])
def test_a_step_waits_for_the_device_once(
    tiny_config: ModelConfig, dataset: Callable[..., Path], tmp_path: Path, is_fast: bool
):
    """It reads loss and norm together at its end, with dropout, accumulation and the spike guard."""
    folder = dataset(train_tokens=[900], n_vocab=97)
    model = fast_model(tiny_config) if is_fast else replace(tiny_config, residual_dropout=0.1, ffn_dropout=0.1)
    config = Config(
        model=model,
        data=DataConfig(dir=str(folder)),
        optim=replace(FAST_OPTIM if is_fast else OptimConfig(), spike_z=5.0),
        train=TrainConfig(batch_tokens=8 * 16, micro_batch_size=4, total_steps=10, compile="off"),
    )
    log, manifest = RunLogger(tmp_path, is_main=False), read_manifest(folder)
    run = pretrain.prepare(config, ALONE, manifest, None, torch.bfloat16, log, lambda: False)
    tokens = torch.randint(97, (4, 17))
    counts: Counter[str] = Counter()
    for _ in range(2):  # the first makes the optimizer's state
        counts.clear()
        with Reads(counts), Waits(counts):
            result = pretrain.train_step(run, iter([(tokens[:, :-1], tokens[:, 1:])] * 2))
    assert not result.skipped
    assert counts == {"tolist": 1}


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of attention got."""
    calls: list[dict[str, Any]] = []
    original = F.scaled_dot_product_attention

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append({"qkv": (q, k, v), "may_use_cudnn": torch.backends.cuda.cudnn_sdp_enabled()})
        return original(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    return calls


@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_and_keys_lie_in_memory_as_the_projection_wrote_them(
    tiny_config: ModelConfig, attention: list[dict[str, Any]], qk_norm: bool
):
    """By position, then by head: attention's kernels then give results and gradients that need no copy."""
    config = replace(tiny_config, qk_norm=qk_norm)
    LLM(config)(torch.zeros(2, 16, dtype=torch.int64))
    q_BTHK, k_BTHK, v_BTHK = (each.transpose(1, 2) for each in attention[0]["qkv"])
    assert q_BTHK.is_contiguous()
    assert k_BTHK.is_contiguous()
    D = config.n_embd
    assert v_BTHK.stride() == (16 * 3 * D, 3 * D, config.head_dim, 1)  # a part of the projection's result


def test_only_training_may_use_cudnns_attention(tiny_config: ModelConfig, attention: list[dict[str, Any]]):
    """It makes a plan for each shape, which texts of changing lengths would not repay."""
    tokenizer = load_tokenizer()
    model = LLM(replace(tiny_config, n_vocab=tokenizer.n_vocab))
    model(torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64))
    assert {call["may_use_cudnn"] for call in attention} == {True}
    model.eval()
    for evaluate in (
        lambda: sampling.sample(model, tokenizer, ("One",), sampling.SamplingConfig(max_new_tokens=3)),
        lambda: hellaswag.score_endings(model, [([1, 2], [[3], [4, 5]])]),
    ):
        attention.clear()
        evaluate()
        assert {call["may_use_cudnn"] for call in attention} == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("is_first", [False, True], ids=["compiled before", "compiled inside"])
def test_ddp_adds_no_graphs(tiny_config: ModelConfig, group_of_one: None, is_first: bool):
    """One for the blocks, one for the softmax. A block is larger than DDP's first bucket, which would cut its graph."""
    torch._dynamo.reset()
    backend = CountingBackend()
    forward: torch.nn.Module = CompiledForward(LLM(replace(tiny_config, n_embd=384)), backend=backend)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    if not is_first:
        forward(ids, ids).backward()
    wrapped = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    for _ in range(2):
        with wrapped.no_sync():
            wrapped(ids, ids).backward()
        wrapped(ids, ids).backward()
    assert backend.graphs == 2


def test_processes_share_the_cores_for_compiling(tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    """And each of them compiles, a machine's first one before the others."""
    order = []
    together = Processes.together

    def recording(self: Processes, action: Callable[[], Any]) -> Any:
        order.append("turn")
        return together(self, action)

    monkeypatch.setattr(Processes, "together", recording)
    monkeypatch.setattr(autotune, "_compile_now", lambda *_: order.append("compile"))
    monkeypatch.setattr(autotune, "compile_problem", lambda kind: "")
    monkeypatch.setattr(autotune, "available_cores", lambda: 9)
    monkeypatch.setattr(autotune, "processes_here", lambda: 4)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    train = TrainConfig(batch_tokens=4 * 16, micro_batch_size=4, total_steps=10, compile="on")
    for local_rank, expected in ((0, ["turn", "compile", "turn"]), (1, ["turn", "turn", "compile"])):
        order.clear()
        procs = replace(ALONE, local_rank=local_rank)
        with torch._inductor.config.patch(compile_threads=32):
            settle(Config(model=tiny_config, train=train), None, LLM(tiny_config), torch.float32, procs, print)
            assert torch._inductor.config.compile_threads == 2
        assert order == expected
