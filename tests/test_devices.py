"""The default device is an available accelerator or the CPU."""

import pytest
import torch

from pipelines.bundle import usable_device
from vqmosaic.errors import InputError
from vqmosaic.runs.accelerator import default_device, resolve_precision


@pytest.fixture
def cuda_build_without_gpu(monkeypatch):
    """A CUDA build of torch on a machine without a GPU, such as `pip install torch` on Linux."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)


def test_cuda_build_without_a_gpu_uses_the_cpu(cuda_build_without_gpu):
    assert default_device() == torch.device("cpu")
    assert usable_device(None) == torch.device("cpu")
    with pytest.raises(InputError, match="this machine has: cpu"):
        usable_device("cuda")


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(InputError, match=r"fp16.*needs a GPU"):
        resolve_precision("fp16", torch.device("cpu"))


@pytest.mark.parametrize(("value", "expected"), [(None, "cuda"), ("False", "cuda"), ("True", "cpu"), ("1", "cpu")])
def test_default_device_follows_accelerate_use_cpu(monkeypatch, value, expected):
    """The launcher passes use_cpu in this variable. The configuration two_cpu_processes sets use_cpu."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if value is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert default_device() == torch.device(expected)


@pytest.mark.parametrize(("in_hardware", "expected"), [(True, "bf16"), (False, "no")])
def test_automatic_precision_uses_bf16_only_with_hardware_support(monkeypatch, in_hardware, expected):
    """torch emulates bf16 on GPUs older than Ampere and reports that they support it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: in_hardware or including_emulation)
    assert resolve_precision("auto", torch.device("cuda")) == expected
