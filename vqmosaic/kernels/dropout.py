"""Dropout with 16 random bits per element, for training on a CPU.

On CPUs, torch draws one number of 64 bits per element, in a single thread. Here, four elements share such a number.
"""

import torch
import torch.nn.functional as F

LEVELS = 2**16
"""Each element gets a random integer with this many values."""


def reference(x: torch.Tensor, probability: float) -> torch.Tensor:
    """What dropout computes in training: each element is zero with this probability, and the others are scaled by 1 / (1 - probability)."""
    return F.dropout(x, probability)


def can_share_draws(x: torch.Tensor) -> bool:
    """Whether drop_by_bits is faster."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def dropout(x: torch.Tensor, probability: float, training: bool = True) -> torch.Tensor:
    """Return `x` unchanged in evaluation mode. In training, set random elements to zero, like torch's dropout."""
    if not training or probability == 0:
        return x
    return drop_by_bits(x, probability) if can_share_draws(x) else reference(x, probability)


def drop_by_bits(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Dropout on a CPU. The probability is rounded to a multiple of 1 / LEVELS below 1."""
    draws = torch.randint(-2**63, 2**63 - 1, ((x.numel() + 3) // 4,))
    levels = draws.view(torch.int16)[:x.numel()].view(x.shape)                # uniform in -LEVELS / 2 ... LEVELS / 2 - 1
    dropped = min(round(probability * LEVELS), LEVELS - 1)
    keep = levels >= dropped - LEVELS // 2
    return x * (keep.to(x.dtype) / (1 - dropped / LEVELS))
