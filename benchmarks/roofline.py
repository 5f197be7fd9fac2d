"""Predict the time of a micro-batch of 16 x 2,048 tokens by kind of work. Prints one JSON object; measures nothing.

python -m benchmarks.roofline [lf_llm_269m | lf_llm_269m_fast] [--gpus N]

FLOPs come from the shapes; bytes and launches were counted on a stand-in for a GPU (tests/gpu_stand_in); rates are the
data sheets' times the shares below. docs/performance.md explains them.
"""

from dataclasses import dataclass

from benchmarks import print_figures
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.debugging import flops_per_token
from src.model_utils.memory_estimate import parameter_counts
from src.model_utils.planner import optimizer_flops
from src.utils.errors import exit_with

PADDED_VOCAB = 50_304
ADAMW_BYTES, CLIP_BYTES = 28, 12  # per parameter and step: four tensors read, three written; norm, then scaling
MUON_SHARED_BYTES = 60  # of a matrix, in one process: the update 20, casting and scaling 10, five times three products


@dataclass(frozen=True)
class GPU:
    tflops: float
    matmul_share: float
    attention_tflops: float
    """Rate of forward and backward, causal, head dimension 64."""
    gb_per_s: float
    dropout_ms: float
    """Time to draw random numbers, in kernels that otherwise wait for memory."""


BANDWIDTH_SHARE, GAP_US, LINK_GB_PER_S, EXPOSED_MS = 0.85, 1.5, 230.0, 1.7
GPUS = {
    "A100 80 GB SXM": GPU(312, 0.75, 125, 2_039, 5),
    "H100 80 GB SXM": GPU(989, 0.70, 290, 3_350, 4),
    "H200": GPU(989, 0.70, 290, 4_800, 4),
}

# GB per micro-batch moved by Triton kernels in blocks, and launches of all kinds (LOG.md). This is Inductor's count,
# minus what it counts twice in the kernel that applies rotary positions.
COUNTED = {"lf_llm_269m": (105.3, 942), "lf_llm_269m_fast": (91.5, 1_034)}
MUON_BYTES = 30  # of a matrix, in every process: momentum 12, decay and step 18


def main() -> None:
    parser = Parser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("preset", nargs="?", choices=COUNTED, default="lf_llm_269m")
    parser.add_argument("--gpus", type=int, default=8)
    args = parser.parse_args()
    result = {name: predict(args.preset, gpu, args.gpus) for name, gpu in GPUS.items()}
    print_figures({"preset": args.preset, "gpus": args.gpus, "is_prediction": True, **result})


def predict(preset: str, gpu: GPU, gpus: int) -> dict[str, float]:
    """Return milliseconds per micro-batch by kind of work, their sum, tokens per second of one GPU, and MFU."""
    config, (block_gb, launches) = PRESETS[preset](), COUNTED[preset]
    model, N = config.model, config.micro_batch_size * config.model.n_ctx
    parameters, in_blocks = parameter_counts(model)
    accumulation = config.grad_accumulation_steps(gpus)
    matmul, bandwidth = gpu.tflops * 1e9 * gpu.matmul_share, gpu.gb_per_s * 1e6 * BANDWIDTH_SHARE  # per ms
    in_adamw = parameters - in_blocks if config.optim.optimizer == "muon" else parameters
    muon_ms = 0.0
    if config.optim.optimizer == "muon":
        muon_ms = optimizer_flops(config) / gpus / matmul
        muon_ms += (MUON_BYTES + MUON_SHARED_BYTES / gpus) * in_blocks / bandwidth
        muon_ms += 2 * in_blocks / (LINK_GB_PER_S * 1e6) if gpus > 1 else 0.0
    times = {
        "matmuls of blocks": 6 * in_blocks * N / matmul,
        "matmuls of the head": 6 * model.n_embd * PADDED_VOCAB * N / matmul,
        # Two T x T products forward and five backward; causal attention needs half of each.
        "attention": 3.5 * 2 * model.n_ctx * model.n_embd * N * model.n_layer / (gpu.attention_tflops * 1e9),
        "other kernels of blocks": block_gb * 1e9 / bandwidth,
        "softmax of the head": 3 * 2 * N * PADDED_VOCAB / bandwidth,  # two reads and a write of bf16
        "rest of head, embedding, last norm": 6.3e9 / bandwidth,
        "adding up gradients": 12 * parameters / bandwidth * (accumulation - 1) / accumulation,
        "norm, clipping, AdamW": (ADAMW_BYTES * in_adamw + CLIP_BYTES * parameters) / bandwidth / accumulation,
        "Muon": muon_ms / accumulation,
        "dropout's random numbers": gpu.dropout_ms if model.ffn_dropout else 0.0,
        "gaps between kernels": launches * GAP_US / 1e3,
        "all-reduce that nothing hides": EXPOSED_MS / accumulation if gpus > 1 else 0.0,
    }
    total = sum(times.values())
    mfu = N * flops_per_token(model, parameters) / total / gpu.tflops / 1e9
    rounded = {kind: round(ms, 1) for kind, ms in times.items()}
    return {**rounded, "total_ms": round(total, 1), "tokens_per_second": round(N / total * 1e3), "mfu": round(mfu, 3)}


if __name__ == "__main__":
    exit_with(main)
