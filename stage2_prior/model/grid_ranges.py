"""Restricts transformers' `generate` to the codes of each position's grid, for priors with several drawn grids::

    prior = TokenPrior.from_pretrained(folder)
    drawn = prior.model.generate(class_token_B1, **generate_arguments(prior.vocabulary))

Priors with one drawn grid need only `generate(class_token_B1)`.
"""

from typing import Any

import torch
from transformers import LogitsProcessor

from stage2_prior.vocabulary import Vocabulary


class GridRanges(LogitsProcessor):
    """Sets the scores of all ids to -inf that are not codes of the grid at the next position."""

    def __init__(self, vocabulary: Vocabulary):
        self.first, self.ranges = vocabulary.num_given_tokens, vocabulary.position_ranges()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (N, V), or (N, K), after the ids (N, S), which start with the given tokens."""
        start, stop = self.ranges[input_ids.shape[1] - self.first]
        allowed_NK = torch.full_like(scores, -torch.inf)
        allowed_NK[:, start:stop] = scores[:, start:stop]
        return allowed_NK


def generate_arguments(vocabulary: Vocabulary) -> dict[str, Any]:
    """Arguments for transformers' `generate` to sample exactly T codes, each of the grid of its position."""
    return {"logits_processor": [GridRanges(vocabulary)], "max_new_tokens": vocabulary.num_tokens, "min_new_tokens": vocabulary.num_tokens}
