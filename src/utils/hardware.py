"""What the machine is and what it is good at: device, precision, peak rate, memory."""

import ctypes
import os
import platform
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from src import available_cores
from src.utils.errors import UserError

# Dense bf16 TFLOP/s from the makers' data sheets, by a part of the name that the driver reports.
PEAK_BF16_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}

CGROUP = Path("/sys/fs/cgroup")  # what limits a container, as it is seen inside


def choose_device(asked: str, local_rank: int = 0) -> torch.device:
    """The device for this process: `asked`, or with "auto" the best there is. Raises UserError if it isn't there."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if asked == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= found:
            remedy = f"start at most {found} processes" if found else "choose the device cpu, or install its CUDA build"
            raise UserError(
                f"process {local_rank} of this machine needs CUDA device {local_rank}, but PyTorch {torch.__version__} "
                f"sees {found} of them; {remedy}"
            )
        return torch.device("cuda", local_rank)
    if asked == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps was asked for, but this PyTorch has no MPS; use the device auto or cpu")
    return torch.device(asked)


def choose_precision(asked: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32 for matmuls; "auto" takes bfloat16 where this device multiplies it faster."""
    if asked != "auto":
        return torch.bfloat16 if asked == "bf16" else torch.float32
    if device.type == "cuda":
        # is_bf16_supported() counts emulation; Ampere (8.0) is the first with bf16 tensor cores
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bf16_faster() else torch.float32
    return torch.float32


def precision_in_words(dtype: torch.dtype, device: torch.device) -> str:
    """What is computed in what."""
    if dtype == torch.float32:
        matmuls = " (matmuls in TF32)" if device.type == "cuda" else ""
        return f"all in float32{matmuls}"
    name = str(dtype).removeprefix("torch.")
    return (
        f"matmuls and attention in {name}; weights, norms, residual stream, softmax, loss, gradients, AdamW in float32"
    )


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, and reuse it, instead of giving it back to the system each time.

    glibc gives large blocks back at once. The next step then asks for them again, and the system clears every page:
    2.0 million page faults in nine steps of the laptop preset, 0.5 million so, and 9% less time a step. With saves the
    peak of memory is up to a fifth higher (LOG.md). Elsewhere than with glibc nothing happens.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Matmuls in `dtype`, the rest as PyTorch's autocast decides; nothing at all for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def peak_tflops(device: torch.device, precision: torch.dtype) -> float | None:
    """The device's dense peak for matmuls where it is known, else None.

    Those of float32 run in TF32 there, whose peak is half of bf16's on all of these GPUs.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK_BF16_TFLOPS.items() if part in name), None)
    return peak / 2 if peak and precision == torch.float32 else peak


def memory_gb(device: torch.device) -> float:
    """Most memory used so far, in 10^9 bytes: allocated on a CUDA device, resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def available_memory_bytes() -> int:
    """Memory that this machine, or the container this is, has left for programs; all of it where that is not said."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, StopIteration), open("/proc/meminfo") as lines:
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError, StopIteration):  # "max" where there is no limit
        limit = int((CGROUP / "memory.max").read_text())
        statistics = (CGROUP / "memory.stat").read_text().splitlines()
        given_back_first = next(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        found.append(max(0, limit - int((CGROUP / "memory.current").read_text()) + given_back_first))
    return min(found)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine as plain data, for a report."""
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        machine["cuda"] = torch.version.cuda
    return machine


@lru_cache(maxsize=1)
def _cpu_multiplies_bf16_faster() -> bool:
    """Measured, in some tenths of a second: what instructions a CPU has does not tell how fast they are.

    Of two Xeons of one model, one took a quarter of float32's time for bf16, and one, whose AMX was hidden from the
    virtual machine, twice that time (LOG.md).
    """
    has = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if not any(supported and supported() for supported in has):
        return False  # emulated

    matrices = [torch.linspace(-1, 1, 1024 * 1024).view(1024, 1024).to(t) for t in (torch.bfloat16, torch.float32)]
    times: list[list[float]] = [[], []]
    for _ in range(10):  # in turns, and the fastest counts: another program is busy now and then
        for matrix, seconds in zip(matrices, times, strict=True):
            started = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - started)
    return min(times[0]) < min(times[1])


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
