"""Finds the default device and the number of CPU cores, and converts names to devices and dtypes.

Separate from accelerator.py, so that generation loads no training code.
"""

import os

import torch

from vqmosaic.errors import InputError, did_you_mean

NUMBER_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The torch.dtype for a dtype or its name, such as "bfloat16" or "torch.bfloat16"; None gives float32. Raises InputError for other values."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if isinstance(dtype, (torch.dtype, str, type(None))) and name in NUMBER_FORMATS:
        return NUMBER_FORMATS[name]
    raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(NUMBER_FORMATS)}, as a string or a torch.dtype."
                     f"{did_you_mean(name, NUMBER_FORMATS)}")


def as_device(device: torch.device | str) -> torch.device:
    """The torch.device for a device or its name, even if this machine does not have it. Raises InputError for a name that torch does not know."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device is {device!r}; allowed: cpu, cuda, cuda:1 and so on, as a string or a torch.device.") from None


def available_cores() -> int:
    """The number of CPU cores that this process may use: an equal share of all cores if torchrun started several processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_device() -> torch.device:
    """The accelerator of this machine if it has one, otherwise the CPU.

    The CPU is also used if accelerate's launcher was configured with `use_cpu`, because accelerate then trains on the CPU. Apple's mps is not used,
    because it lacks float64, which sampling uses to sum probabilities.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        return torch.device("cpu")
    # without is_available, torch with CUDA would report cuda even on a machine without a GPU
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device if device is not None and device.type != "mps" else torch.device("cpu")
