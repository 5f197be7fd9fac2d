"""GPUs that one can rent or own, as their makers' data sheets have them: what the planner calculates with."""

import difflib
from dataclasses import dataclass

from src.utils.errors import UserError
from src.utils.hardware import PEAK_BF16_TFLOPS


@dataclass(frozen=True)
class GPU:
    """One GPU. GPUs without bf16 matrix units, such as the T4, are left out: nobody should train this on them."""

    memory_gb: float
    """As sold, taken as 10^9 bytes; most report some percent more."""
    tflops: float
    """Peak of dense bf16 matmuls with float32 sums, TFLOP/s; data sheets often give twice that, with sparsity."""
    watts: float
    """Board power, the most that the maker lets it draw."""
    source: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 1e9)


GPUS = {
    "a100-40g": GPU(40, PEAK_BF16_TFLOPS["A100"], 400, "NVIDIA A100 data sheet (2021), SXM"),
    "a100-80g": GPU(80, PEAK_BF16_TFLOPS["A100"], 400, "NVIDIA A100 data sheet (2021), SXM"),
    "h100-80g": GPU(80, PEAK_BF16_TFLOPS["H100"], 700, "NVIDIA H100 data sheet (2023), SXM"),
    "h200": GPU(141, PEAK_BF16_TFLOPS["H200"], 700, "NVIDIA H200 data sheet (2023), SXM"),
    "b200": GPU(
        180, PEAK_BF16_TFLOPS["B200"], 1000, "NVIDIA Blackwell architecture brief and HGX B200 data sheet (2024)"
    ),
    "l40s": GPU(48, PEAK_BF16_TFLOPS["L40S"], 350, "NVIDIA L40S data sheet (2023)"),
    "l4": GPU(24, PEAK_BF16_TFLOPS["L4"], 72, "NVIDIA L4 data sheet (2023): 242 with sparsity"),
    "rtx-4090": GPU(24, PEAK_BF16_TFLOPS["RTX 4090"], 450, "NVIDIA Ada GPU architecture paper (2022), appendix A"),
    "rtx-3090": GPU(
        24, PEAK_BF16_TFLOPS["RTX 3090"], 350, "NVIDIA Ampere GA102 GPU architecture paper (2020), appendix A"
    ),
}


def find_gpu(name: str) -> GPU:
    """The GPU of that name. Raises UserError with the nearest name and all of them."""
    if found := GPUS.get(name.lower()):
        return found
    nearest = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
    guess = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"--gpu {name} is not in the table{guess} (there are {', '.join(GPUS)})")
