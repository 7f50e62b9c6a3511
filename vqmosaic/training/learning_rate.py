"""The learning-rate schedule."""

import math


def learning_rate_share(progress: float, warmup_fraction: float, final_share: float, schedule: str = "cosine") -> float:
    """The learning rate as a fraction of its peak: linear warmup over `warmup_fraction`, then cosine or linear decay to `final_share`.

    `progress` is the finished fraction of the training.
    """
    if progress < warmup_fraction:
        return max(progress, 1e-3 * warmup_fraction) / warmup_fraction  # above 0 at progress 0, so the first step is not lost
    decay_progress = (progress - warmup_fraction) / (1 - warmup_fraction)
    remaining = {"cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)), "linear": lambda p: 1 - p}[schedule](min(1.0, decay_progress))
    return final_share + (1 - final_share) * remaining
