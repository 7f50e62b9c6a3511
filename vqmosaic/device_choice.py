"""Which device a machine offers, and how many cores; apart from devices.py so that generating loads nothing that only training needs."""

import os

import torch


def available_cores() -> int:
    """Processor cores that this process may use: an equal share where torchrun started several on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_device() -> torch.device:
    """The accelerator this machine has, else the CPU; a torch built for CUDA names cuda even where there is none.

    The CPU also under accelerate's launcher if its configuration sets `use_cpu`: accelerate then trains there, and everything else has to follow.
    Apple's mps is left aside: it has no float64, in which probabilities are summed up.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device if device is not None and device.type != "mps" else torch.device("cpu")
