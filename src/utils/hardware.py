"""This machine: device, precision, peak rate, memory."""

import ctypes
import os
import platform
import resource
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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

CGROUP = Path("/sys/fs/cgroup")  # the limits of a container, seen from inside


def choose_device(requested: str, local_rank: int = 0) -> torch.device:
    """The device of this process; "auto" takes CUDA, else MPS, else the CPU. Raises UserError for a missing device."""
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if requested == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= count:
            remedy = f"Start at most {count} processes" if count else "Use the device cpu, or install the CUDA build"
            raise UserError(
                f"Cannot use CUDA device {local_rank} for process {local_rank} of this machine: PyTorch "
                f"{torch.__version__} sees {count} devices. {remedy}."
            )
        return torch.device("cuda", local_rank)
    if requested == "mps" and not torch.backends.mps.is_available():
        raise UserError("Cannot use the device mps: this PyTorch has no MPS. Use the device auto or cpu.")
    try:
        torch.empty(0, device=requested)
    except (RuntimeError, AssertionError) as error:  # a name from a notebook, such as cuda:1
        cause = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"Cannot use the device {requested!r}: {cause}. Use auto, cpu, cuda or mps.") from None
    return torch.device(requested)


def choose_precision(requested: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32 for matmuls. "auto": bfloat16 on GPUs of compute capability 8.0 or above and CPUs with AMX.

    A fixed rule, not a measurement, so that two starts on one machine never choose differently.
    """
    if requested != "auto":
        return torch.bfloat16 if requested == "bf16" else torch.float32
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() also counts emulation; Ampere (8.0) is the first with bf16 tensor cores.
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # Other CPUs with bf16 instructions were measured at half of float32's rate (LOG.md).
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        has_bf16 = device.type == "cpu" and has_amx()
    return torch.bfloat16 if has_bf16 else torch.float32


def keep_freed_memory() -> None:
    """Makes this process reuse the memory it frees instead of returning it to the system. No effect without glibc.

    glibc returns large blocks at once, and the next step asks for them again, with every page cleared. Keeping them
    takes 9% less time per step of the laptop preset, and up to a fifth more memory during saves (LOG.md).
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """PyTorch's autocast to `dtype`; a context that does nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def attention_for_any_shape() -> AbstractContextManager[None]:
    """Keeps attention off cuDNN, which PyTorch prefers on Hopper and which builds a plan for each new length.

    Training has one shape, so it keeps PyTorch's choice. No effect on CPUs.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def peak_tflops(device: torch.device, precision: torch.dtype) -> float | None:
    """Dense peak rate of the device's matmuls, or None if unknown. float32 runs in TF32, at half of bf16's rate."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK_BF16_TFLOPS.items() if part in name), None)
    return peak / 2 if peak and precision == torch.float32 else peak


def memory_gb(device: torch.device) -> float:
    """Peak memory so far in 10^9 bytes: allocated on a CUDA device, resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def available_memory_bytes() -> int:
    """Memory still available in this machine or container; all of it if the system does not say."""
    limits = [_memory_bytes()]
    with suppress(OSError, StopIteration), open("/proc/meminfo") as lines:
        limits.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError, StopIteration):  # memory.max is "max" if there is no limit
        limit = int((CGROUP / "memory.max").read_text())
        statistics = (CGROUP / "memory.stat").read_text().splitlines()
        reclaimable = next(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        limits.append(max(0, limit - int((CGROUP / "memory.current").read_text()) + reclaimable))
    return min(limits)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine as plain data, for config.json and benchmarks."""
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": platform.processor() or platform.machine(),
        "cores": available_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        machine["cpu"] = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine |= {"gpu": gpu.name, "gpu_memory_gb": round(gpu.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return machine


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
