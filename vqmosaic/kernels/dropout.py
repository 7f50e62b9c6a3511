"""Dropout with 16 random bits an element, for training on a CPU.

There, torch draws a number for each element in one thread, which took a third of a training step of the prior. One draw has 64 bits: enough for
four elements.
"""

import torch
import torch.nn.functional as F

BITS = 16
HALF = 2 ** (BITS - 1)


def reference(x: torch.Tensor, probability: float) -> torch.Tensor:
    """What dropout computes in training: each element is zero with this probability, and the others grow, so that the mean stays the same."""
    return F.dropout(x, probability)


def can_share_draws(x: torch.Tensor) -> bool:
    """Whether drop_by_bits is faster."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def dropout(x: torch.Tensor, probability: float, training: bool = True) -> torch.Tensor:
    """`x` in evaluation mode. In training, x with some elements set to zero, as by torch's dropout."""
    if not training or probability == 0:
        return x
    return drop_by_bits(x, probability) if can_share_draws(x) else reference(x, probability)


def drop_by_bits(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Dropout on a CPU. The probability is rounded to a multiple of 1 / 65,536."""
    dropped = round(probability * 2 * HALF)
    draws = torch.randint(-2**63, 2**63 - 1, ((x.numel() * BITS + 63) // 64,))
    bits = draws.view(torch.int16)[:x.numel()].view(x.shape)                  # uniform in -HALF ... HALF - 1
    keep = bits >= dropped - HALF
    return x * (keep.to(x.dtype) / (1 - dropped / (2 * HALF)))
