"""Linear layers whose initialization depends only on a seed."""

import torch
from torch import nn

from vqmosaic.seeding import derive_seed


def seeded_linear(inputs: int, outputs: int, *seed_parts: int | str) -> nn.Linear:
    """A torch.nn.Linear initialized from a seed derived from seed_parts. Does not change the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*seed_parts))
        return nn.Linear(inputs, outputs)
