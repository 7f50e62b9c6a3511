"""Tiny priors, their vocabularies and random inputs for tests."""

import numpy as np
import torch

from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from token_shards import Grid
from vqmosaic.recipes.recipe_sections import PriorConfig

VOCABULARY = Vocabulary(grids=[Grid(name="image", codebook_size=48, height=3, width=3)], class_names=["ant", "bee", "cat"],
                        token_fingerprint="f" * 64, label_drop=0.1)
TWO_GRIDS = Vocabulary(grids=[Grid(name="coarse", codebook_size=8, height=1, width=2), Grid(name="fine", codebook_size=32, height=2, width=2)],
                       class_names=None, token_fingerprint="f" * 64)


def tiny_prior(architecture: str = "llama", vocabulary: Vocabulary = VOCABULARY, seed: int = 0, **changes) -> TokenPrior:
    """A new prior of two layers. `changes` are fields of PriorConfig."""
    fields = {"architecture": architecture, "width": 32, "layers": 2, "heads": 2} | changes
    return TokenPrior.from_config(PriorConfig(**fields), vocabulary, seed)


def random_batch(vocabulary: Vocabulary = VOCABULARY, size: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids (B, T) of the grids and class indices (B,), some of them the null class."""
    rng = np.random.default_rng(seed)
    ids_BT = np.stack([rng.integers(0, stop - start, size) for start, stop in vocabulary.position_ranges()], axis=1)
    return torch.from_numpy(ids_BT), torch.from_numpy(rng.integers(-1, vocabulary.num_classes, size))
