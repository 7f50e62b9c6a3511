"""Classifier-free guidance for priors with one or several given segments: the ids of each level, and their logits combined.

guidance_scales.py describes the levels.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from vqmosaic.errors import InputError


def combine_levels(level_logits: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor:
    """Guided logits: l_0 + sum_i s_i (l_i - l_(i-1)), for the logits of the levels and one scale for each step between two levels.

    Scales of 1 give the logits of the last level, scales of 0 those of the first.
    """
    guided = level_logits[0]
    for (before, after), scale in zip(pairwise(level_logits), scales, strict=True):
        guided = guided + scale * (after - before)
    return guided


def level_start_ids(vocabulary: Vocabulary, start_BP: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """The start of the sequence (N, P) for all levels, from the last to the first: N is B times the number of levels."""
    segments, rows = vocabulary.learned_segments, []
    for level in reversed(levels):
        level_BP = start_BP.clone()
        for segment in segments[level:]:
            assert segment.null_id is not None  # given segments have one
            level_BP[:, segment.places.start:segment.places.stop] = segment.null_id
        rows.append(level_BP)
    return torch.cat(rows)


def check_given(vocabulary: Vocabulary, class_indices: Sequence[int], given: Mapping[str, torch.Tensor] | None) -> None:
    """Raise InputError unless the given ids are valid for as many images, and the prior was trained without the conditions that are not given."""
    given = given or {}
    vocabulary.check_conditions(given, check_ids=True)
    for name, ids in given.items():
        if len(ids) != len(class_indices):
            raise InputError(f"given[{name!r}] has {len(ids)} rows, but there are {len(class_indices)} images; give one row for each.")
    if given and NO_CLASS in class_indices and vocabulary.num_classes and vocabulary.class_drop == 0:
        raise InputError("An image has conditions but no class, and the prior was trained with class_drop 0, so it has seen this only with a class. "
                         "Give every image a class.")
    is_unconditional = not given and set(class_indices) == {NO_CLASS}
    for condition in vocabulary.conditions:
        if condition.name not in given and condition.drop_rate == 0 and not (is_unconditional and vocabulary.is_trained(0)):
            raise InputError(f"given has no {condition.name!r}, but the prior was trained with drop_rate 0 of this segment, so it cannot sample "
                             f"without it. Give its ids, with the shape ({len(class_indices)}, {condition.num_tokens}).")
