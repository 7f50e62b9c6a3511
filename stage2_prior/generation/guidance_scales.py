"""The levels and scales of classifier-free guidance for priors with one or several given segments. Does not import torch.

Level i of n learned segments, in the order of the vocabulary, has the first i segments as given and null ids in all others. Guided logits are
l_0 + sum_i s_i (l_i - l_(i-1)) with one scale s_i for each segment, as for the two conditions of InstructPix2Pix (Brooks et al. 2022). A prior with
classes only has the levels 0, the null class, and 1. Levels whose logits cancel out are not computed.
"""

from collections.abc import Mapping, Sequence

from stage2_prior.vocabulary import Vocabulary
from vqmosaic.errors import InputError, check_range


def needed_levels(scales: Sequence[float]) -> list[int]:
    """The levels, in ascending order, whose logits count with these scales of the n segments. The last one is always n.

    The logits of level i have the factor s_i - s_(i+1), where s_0 is 1 and s_(n+1) is 0. Between two needed levels, all scales are equal.
    """
    padded = [1.0, *scales]
    return [level for level in range(len(scales)) if padded[level] != padded[level + 1]] + [len(scales)]


def segment_scales(vocabulary: Vocabulary, guidance_scale: float, given_scales: Mapping[str, float] | None) -> list[float]:
    """The guidance scale of each learned segment: that in `given_scales`, or `guidance_scale`.

    Raises InputError for unknown segments, and for scales that need a level that the prior has not learned.
    """
    names, given_scales = [segment.name for segment in vocabulary.learned_segments], given_scales or {}
    for name, scale in given_scales.items():
        if name not in names:
            raise InputError(f"The guidance by segment has {name!r}; the given segments of the prior are: {', '.join(names) or 'none'}.")
        check_range(f"the guidance of segment {name!r}", scale, at_least=0)
    scales = [float(given_scales.get(name, guidance_scale)) for name in names]
    for level in needed_levels(scales)[:-1]:
        if not vocabulary.is_trained(level):
            dropped = ", ".join(names[level:])
            raise InputError(f"Guidance with the scales {', '.join(f'{name} {scale:g}' for name, scale in zip(names, scales, strict=True))} needs a "
                             f"prior that was trained without {dropped}{f' but with {names[level - 1]}' if level else ''}, and this one was not: "
                             f"their drop rates are {', '.join(f'{rate:g}' for rate in vocabulary.drop_rates[level:])}. Give all segments the same "
                             "scale, or train with drop rates above 0.")
    return scales
