"""Linear layers whose start depends on a seed alone."""

import torch
from torch import nn

from vqmosaic.seeding import derive_seed


def seeded_linear(inputs: int, outputs: int, *seed_parts: int | str) -> nn.Linear:
    """torch's linear layer with its usual start drawn from f(seed parts); the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*seed_parts))
        return nn.Linear(inputs, outputs)
