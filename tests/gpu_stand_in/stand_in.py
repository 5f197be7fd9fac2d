"""Builds the stand-in for a GPU, and runs programs on it.

PyTorch's real CUDA build then runs on a machine without a GPU: dispatch, attention's choice, allocator, DDP, Inductor,
Triton and ptxas. It shows whether the path runs, where it waits, what it allocates and launches. It says nothing of
numbers, times, cuDNN's plans or NCCL.
"""

import os
import re
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("stand_in.cpp")
PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
LIBRARIES = {  # what is compiled: the library whose functions it has
    "RUNTIME": "cu13/lib/libcudart.so.13",
    "BLAS": "cu13/lib/libcublas.so.13",
    "BLASLT": "cu13/lib/libcublasLt.so.13",
    "NCCL": "nccl/lib/libnccl.so.2",
}


def build(python: str, folder: Path) -> None:
    """Compile the libraries for the PyTorch of `python` into `folder`. Raises CalledProcessError."""
    packages = Path(_output(python, "-c", PACKAGES).strip())
    for part, library in LIBRARIES.items():
        exported = _output("nm", "-D", "--defined-only", str(packages / "nvidia" / library)).splitlines()
        names = {line.split()[-1].partition("@")[0] for line in exported}
        versions = re.findall("@@(.*)", "\n".join(exported))
        _link(part, packages, folder, names, Path(library).name, max(versions, key=versions.count, default=""))
    declared = set(re.findall(r"\bcu[A-Z]\w*", (packages / "nvidia/cu13/include/cuda.h").read_text()))
    _link("DRIVER", packages, folder, declared, "libcuda.so.1", "")
    (folder / "libcuda.so").symlink_to("libcuda.so.1")


def environment(folder: Path, sm: int = 80, memory_gb: float = 85.1, devices: int = 1) -> dict[str, str]:
    """The variables under which a program sees `devices` GPUs: A100s, or H100s for `sm` 90."""
    libraries = [folder / Path(library).name for library in LIBRARIES.values()] + [folder / "libcuda.so.1"]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(map(str, libraries)),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / f"triton_{sm}"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor_{sm}"),
        "TORCHINDUCTOR_BENCHMARK_KERNEL": "1",  # writes the bytes of each kernel into its code
        "STAND_IN_SM": str(sm),
        "STAND_IN_GB": str(memory_gb),
        "STAND_IN_DEVICES": str(devices),
    }


def _link(part: str, packages: Path, folder: Path, names: set[str], library: str, version: str) -> None:
    """Link our functions, and one that returns 0 for each other name, under the symbol version of the real library."""
    own, rest = folder / f"{part}.o", folder / f"{part}.c"
    # The last has a header that the first one lacks.
    headers = [f"-I{packages / name / 'include'}" for name in ("nvidia/cu13", "triton/backends/nvidia")]
    _output("g++", "-O1", "-fPIC", "-w", "-std=c++17", "-fvisibility=hidden", f"-D{part}", *headers, "-c", str(SOURCE),
            "-o", str(own))  # fmt: skip
    defined = {line.split()[-1] for line in _output("nm", "--defined-only", str(own)).splitlines()}
    missing = sorted(name for name in names - defined if re.match("(__)?(cu|p?nccl)", name))
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    script = folder / f"{part}.map"
    script.write_text(f"{version} {{ global: *; }};\n")
    stubs = rest.with_suffix(".rest.o")
    _output("gcc", "-O1", "-fPIC", "-w", "-fno-builtin", "-c", str(rest), "-o", str(stubs))
    _output("g++", "-shared", "-o", str(folder / library), f"-Wl,-soname,{library}", f"-Wl,--version-script={script}",
            str(own), str(stubs), "-ldl", "-lpthread")  # fmt: skip


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
