"""The device that is chosen: the accelerator that is really there, else the CPU."""

import pytest
import torch

from pipelines.bundle import usable_device
from vqmosaic.devices import default_device, resolve_precision
from vqmosaic.errors import InputError


@pytest.fixture
def cuda_build_without_gpu(monkeypatch):
    """What a torch built for CUDA says on a machine without a GPU, which is what `pip install torch` gives most users of Linux."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)


def test_a_cuda_build_without_a_gpu_computes_on_the_cpu(cuda_build_without_gpu):
    assert default_device() == torch.device("cpu")
    assert usable_device(None) == torch.device("cpu")
    with pytest.raises(InputError, match="this machine has: cpu"):
        usable_device("cuda")


def test_fp16_on_a_cpu_is_refused_in_words():
    with pytest.raises(InputError, match=r"fp16.*needs a GPU"):
        resolve_precision("fp16", torch.device("cpu"))
