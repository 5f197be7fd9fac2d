from pathlib import Path

import pytest
import torch

from src.utils import hardware
from src.utils.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_precision_follows_a_rule(monkeypatch: pytest.MonkeyPatch):
    """bf16 from Ampere on and on CPUs with AMX; a setting overrides it."""
    for has_amx, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx, raising=False)
        assert hardware.choose_precision("auto", CPU) == expected
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # private, so it may go in another version
    assert hardware.choose_precision("auto", CPU) == torch.float32
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert hardware.choose_precision("auto", CUDA) == expected
    assert hardware.choose_precision("auto", torch.device("mps")) == torch.float32
    assert hardware.choose_precision("bf16", CPU) == torch.bfloat16
    assert hardware.choose_precision("float32", CUDA) == torch.float32


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_rate_by_the_drivers_name(name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert hardware.peak_tflops(CUDA, torch.bfloat16) == tflops
    assert hardware.peak_tflops(CUDA, torch.float32) == (tflops and tflops / 2)
    assert hardware.peak_tflops(CPU, torch.bfloat16) is None


def test_a_missing_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"Cannot use CUDA device 2 .* PyTorch .* sees 2 devices\. Start at most 2"):
        hardware.choose_device("cuda", 2)
    with pytest.raises(UserError, match=r"Cannot use the device 'tpu': .* Use auto, cpu, cuda or mps"):
        hardware.choose_device("tpu")


def test_the_machine_is_described_in_plain_data():
    machine = hardware.describe_machine(CPU)
    assert machine["cores"] >= 1
    assert machine["memory_gb"] > 0.5
    assert all(isinstance(value, (str, int, float)) for value in machine.values())
    assert hardware.memory_gb(CPU) > 0.05


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Cached files count as available."""
    real = hardware.available_memory_bytes()
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    assert hardware.available_memory_bytes() == pytest.approx(real, rel=0.2)
    (tmp_path / "memory.current").write_text("70000000\n")
    (tmp_path / "memory.stat").write_text("anon 50000000\ninactive_file 20000000\nactive_file 0\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.available_memory_bytes() == pytest.approx(real, rel=0.2)
    (tmp_path / "memory.max").write_text("100000000\n")
    assert hardware.available_memory_bytes() == 50_000_000
