"""Samples tokens from a prior: pure functions on logits, and the loop over the T positions (decoding.py has the key-value cache).

Each image has its own uniform random numbers and inverts the cumulative distribution with them, so it depends on its seed and not on the other
images in the batch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from stage2_prior.generation.decoding import make_decoder
from stage2_prior.generation.guidance import check_given, combine_levels, level_start_ids, needed_levels, segment_scales
from stage2_prior.given_ids import start_ids
from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from vqmosaic.errors import InputError, check_range
from vqmosaic.recipes.field_types import as_boolean, as_integer
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import uniforms

GREEDY_BELOW = 1e-6
"""A temperature below this is greedy, like 0. Dividing float32 logits by a much smaller temperature would give NaN."""
MAX_TEMPERATURE = torch.finfo(torch.float32).max
"""A larger temperature overflows float32. At this temperature, all ids are already equally likely."""


class SamplingStopped(Exception):
    """Raised when the callback returns False. No ids are returned."""


def apply_guidance(conditional_BK: torch.Tensor, null_BK: torch.Tensor, scale: float) -> torch.Tensor:
    """Guided logits (B, K): null + scale * (conditional - null), after Ho and Salimans (2022). Scale 1 gives `conditional`, 0 gives `null`."""
    return combine_levels([null_BK, conditional_BK], [scale])


def guidance_scales(sampling: SamplingConfig, length: int) -> list[float]:
    """The guidance scale at each of T positions; 1 is off. SamplingConfig has formulas and sources."""
    schedules = {"constant": lambda p: 1.0, "linear": lambda p: p, "cosine": lambda p: (1 - math.cos(math.pi * p)) / 2,
                 "power-cosine": lambda p: (1 - math.cos(math.pi * p**sampling.guidance_power)) / 2}
    schedule, (start, stop) = schedules[sampling.guidance_schedule], sampling.guidance_interval
    return [1 + (sampling.guidance_scale - 1) * schedule(position / max(1, length - 1)) if start * length <= position < stop * length else 1.0
            for position in range(length)]


def apply_temperature(logits_BK: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits (B, K) divided by a temperature > 0, after a shift that makes the largest one 0, so that a tiny temperature cannot overflow."""
    return (logits_BK - logits_BK.amax(dim=-1, keepdim=True)) / min(temperature, MAX_TEMPERATURE)


def keep_top_k(logits_BK: torch.Tensor, k: int) -> torch.Tensor:
    """Logits (B, K) with all but the k largest set to -inf; 0 is off. All logits equal to the k-th largest are kept."""
    if k == 0 or k >= logits_BK.shape[-1]:
        return logits_BK
    smallest_kept_B1 = logits_BK.topk(k, dim=-1).values[:, -1:]
    return logits_BK.masked_fill(logits_BK < smallest_kept_B1, -torch.inf)


def keep_top_p(logits_BK: torch.Tensor, p: float) -> torch.Tensor:
    """Logits (B, K) with -inf outside the smallest set of most likely ids whose total probability reaches p; 1 is off.

    At least one id is kept. Among equal logits, lower ids come first. Nucleus sampling: Holtzman et al. (2020).
    """
    if p >= 1:
        return logits_BK
    sorted_BK = sort_descending(logits_BK)
    probabilities_BK = sorted_BK.softmax(dim=-1, dtype=torch.float64)
    kept_B1 = (probabilities_BK.cumsum(dim=-1) - probabilities_BK < p).sum(dim=-1, keepdim=True)
    smallest_kept_B1 = sorted_BK.gather(-1, kept_B1.clamp_min(1) - 1)  # `kept` is 0 only for NaN logits, which raise an error elsewhere
    is_tied_BK = logits_BK == smallest_kept_B1
    tied_kept_B1 = kept_B1 - (logits_BK > smallest_kept_B1).sum(dim=-1, keepdim=True)
    dropped_BK = (logits_BK < smallest_kept_B1) | (is_tied_BK & (is_tied_BK.cumsum(dim=-1) > tied_kept_B1))
    return logits_BK.masked_fill(dropped_BK, -torch.inf)


def sort_descending(values_BK: torch.Tensor) -> torch.Tensor:
    """Each row sorted in descending order. On a CPU with numpy, whose sort is several times faster than torch's, which also returns indices."""
    if values_BK.device.type == "cpu" and values_BK.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.sort(values_BK.detach().numpy(), axis=-1)).flip(-1)
    return values_BK.sort(dim=-1, descending=True).values


def keep_min_p(logits_BK: torch.Tensor, p: float) -> torch.Tensor:
    """Logits (B, K) with -inf for ids less likely than p times the most likely id; 0 is off. Nguyen et al. (2024)."""
    if p == 0:
        return logits_BK
    return logits_BK.masked_fill(logits_BK < logits_BK.amax(dim=-1, keepdim=True) + math.log(p), -torch.inf)


def invert_cumulative(probabilities_BK: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The ids (B,) where the cumulative distribution exceeds uniforms in [0, 1). Never an id of probability 0 or outside [0, K).

    The probabilities need not sum to 1. Sums are float64: in float32, the error of a sum over thousands of codes exceeds the probability of rare
    codes.
    """
    cumulative_BK = probabilities_BK.cumsum(dim=-1, dtype=torch.float64)
    total_B = cumulative_BK[:, -1]
    # u * total can round up to total, which is past the last id; the next smaller number selects the last id with a probability above 0
    target_B = torch.minimum(uniforms_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))
    ids_B = torch.searchsorted(cumulative_BK, target_B[:, None], right=True)[:, 0]
    return ids_B.clamp_max(probabilities_BK.shape[-1] - 1)  # searchsorted returns K only if probabilities are NaN


def draw_ids(logits_BK: torch.Tensor, uniforms_B: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """Sample one id (B,) in [0, K) from each row of float32 logits, after temperature, top-k, top-p and min-p, in this order.

    Ids with a logit of -inf are never sampled. On a CPU, raises InputError for a row whose largest logit is not finite. On other devices, this
    check would synchronize at every token, so sample_tokens checks only after the first and the last token.
    """
    if logits_BK.device.type == "cpu" and not logits_BK.amax(dim=-1).isfinite().all():
        raise InputError("The logits have a row with NaN, with +inf, or with -inf only; no id can be sampled from it.")
    if sampling.temperature < GREEDY_BELOW:
        return logits_BK.argmax(dim=-1)
    logits_BK = apply_temperature(logits_BK, sampling.temperature)
    logits_BK = keep_min_p(keep_top_p(keep_top_k(logits_BK, sampling.top_k), sampling.top_p), sampling.min_p)
    return invert_cumulative(logits_BK.softmax(dim=-1), uniforms_B)


def check_request(vocabulary: Vocabulary, class_indices: Any, sampling: SamplingConfig, seeds: Any) -> tuple[list[int], list[int]]:
    """The class index (NO_CLASS if it has none) and the seed of each image. Raises InputError for invalid arguments."""
    if not isinstance(sampling, SamplingConfig):
        raise InputError(f"sampling is {sampling!r}; give a SamplingConfig, such as SamplingConfig(temperature=0.9).")
    seeds = as_integer_list("seeds", seeds)
    if not seeds:
        raise InputError("seeds is empty; give one seed for each image.")
    check_range("The smallest of the seeds", min(seeds), at_least=0)
    class_indices = [NO_CLASS] * len(seeds) if class_indices is None else as_integer_list("class_indices", class_indices)
    if len(class_indices) != len(seeds):
        raise InputError(f"There are {len(class_indices)} class indices and {len(seeds)} seeds; give one of each for every image.")
    for index in set(class_indices) - {NO_CLASS}:
        vocabulary.class_id(index)
    if sampling.guidance_scale != 1 and (why := vocabulary.why_unguided()):
        raise InputError(f"sampling.guidance_scale is {sampling.guidance_scale:g}, but the prior {why}; allowed: 1.")
    if NO_CLASS in class_indices and vocabulary.num_classes and vocabulary.label_drop == vocabulary.class_drop == 0:
        raise InputError("An image has no class, but the prior was trained with label_drop 0, so its null class is untrained. Give every image a "
                         "class, or train with prior_training.label_drop 0.1.")
    if sampling.guidance_scale != 1 and set(class_indices) == {NO_CLASS} and not vocabulary.conditions:
        raise InputError(f"sampling.guidance_scale is {sampling.guidance_scale:g}, but no image has a class, so guidance has no effect; "
                         "give class indices, or set guidance_scale to 1.")
    return class_indices, seeds


def as_integer_list(name: str, given: Any) -> list[int]:
    """Convert a sequence, array or tensor of integers to a list of int. Raises InputError, which names the argument, for anything else."""
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise InputError(f"{name} is {given!r}; give a list of integers, one for each image.")
    return [as_integer(f"{name}: an entry", entry) for entry in given]


@contextmanager
def evaluation_mode(model: nn.Module):
    """Put the model in evaluation mode inside the block, and restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_finite(is_finite: torch.Tensor, is_finite_guided: torch.Tensor, model: nn.Module, sampling: SamplingConfig) -> None:
    """Raise InputError unless all logits so far were finite, both before and after guidance."""
    if not is_finite:
        raise InputError(f"The prior's logits are not finite in {model.dtype}: its weights are damaged, or the range of this dtype is too small.")
    if not is_finite_guided:
        raise InputError(f"sampling.guidance_scale is {sampling.guidance_scale:g}, which makes logits infinite; lower it.")


def sample_tokens(model: nn.Module, vocabulary: Vocabulary, class_indices: Sequence[int] | torch.Tensor | None, sampling: SamplingConfig,
                  seeds: Sequence[int], callback: Callable[[int, int], bool | None] | None = None, compile: bool = False,
                  given: Mapping[str, torch.Tensor] | None = None, segment_guidance: Mapping[str, float] | None = None) -> torch.Tensor:
    """Sample ids (B, T) of the drawn grids, int64 on the model's device. Image b depends only on class_indices[b], its given ids and seeds[b].

    `model` is a transformers causal language model over the vocabulary. `callback(done, T)` is called after each position. If it returns
    False, SamplingStopped is raised. `compile` is passed to decoding.make_decoder. `given` has the ids (B, n) of conditions by name, and
    `segment_guidance` guidance scales by name of the segment, in place of sampling.guidance_scale. Raises InputError for invalid arguments and for
    logits that are not finite.
    """
    class_indices, seeds = check_request(vocabulary, class_indices, sampling, seeds)
    check_given(vocabulary, class_indices, given)
    segment_scales_n = segment_scales(vocabulary, sampling.guidance_scale, segment_guidance)
    compile = as_boolean("compile", compile)
    device, ranges, images = next(model.parameters()).device, vocabulary.position_ranges(), len(seeds)
    uniforms_BT = torch.from_numpy(uniforms(seeds, len(ranges))).to(device)
    classes_B = torch.tensor(class_indices, dtype=torch.int64, device=device)
    scales_Tn = list(zip(*(guidance_scales(dataclasses.replace(sampling, guidance_scale=scale), len(ranges)) for scale in segment_scales_n),
                         strict=True)) or [()] * len(ranges)
    last_guided = max((position for position, scales in enumerate(scales_Tn) if set(scales) - {1.0}), default=-1)
    levels = needed_levels(segment_scales_n) if last_guided >= 0 else [len(segment_scales_n)]
    start_NP = level_start_ids(vocabulary, start_ids(vocabulary, classes_B, given, classes_B[:, None]), levels)  # N = B rows for each level
    ids_N, columns, first = start_NP[:, -1], [], start_NP.shape[1] - 1
    is_finite, is_finite_guided = (torch.ones((), dtype=torch.bool, device=device) for _ in range(2))
    with torch.inference_mode(), evaluation_mode(model):
        decoder = make_decoder(model, vocabulary.num_codes, len(ids_N), first + len(ranges), compile)
        for place in range(first):  # the class and the conditions
            decoder.step(start_NP[:, place], place)
        for position, ((start, stop), scales) in enumerate(zip(ranges, scales_Tn, strict=True)):
            logits_NK = decoder.step(ids_N, first + position)[:, start:stop].float()
            is_finite &= logits_NK.isfinite().all()
            logits_BK = logits_NK[:images]
            if set(scales) - {1.0}:
                by_level = logits_NK.chunk(len(levels))[::-1]
                logits_BK = combine_levels(by_level, [scales[level - 1] for level in levels[1:]])
                is_finite_guided &= logits_BK.isfinite().all()
            if device.type == "cpu" or position in (0, len(ranges) - 1):  # reading the flags synchronizes a GPU, so only twice there
                check_finite(is_finite, is_finite_guided, model, sampling)
            ids_B = draw_ids(logits_BK, uniforms_BT[:, position], sampling)
            columns.append(ids_B)
            if position == last_guided < len(ranges) - 1:  # not earlier: later guided positions attend to earlier null rows
                decoder.keep_first(images)
            ids_N = vocabulary.to_vocabulary_at(position, ids_B.repeat(decoder.rows // images))
            if callback is not None and callback(position + 1, len(ranges)) is False:
                raise SamplingStopped(f"Stopped by the callback after {position + 1} of {len(ranges)} tokens.")
    return torch.stack(columns, dim=1)  # outside inference mode, so that the ids can be used in training
