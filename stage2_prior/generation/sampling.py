"""Samples tokens from a prior: pure functions on logits, and the loop over the T positions (decoding.py has the key-value cache).

Each image has its own uniform random numbers and inverts the cumulative distribution with them, so it depends on its seed and not on the other
images in the batch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from stage2_prior.generation.decoding import make_decoder
from stage2_prior.generation.drawing_order import confidence_noise, drawing_orders, tokens_per_pass
from stage2_prior.generation.guidance import check_given, combine_levels, level_start_ids
from stage2_prior.generation.guidance_scales import needed_levels, segment_scales
from stage2_prior.generation.passes import CONFIDENCE_NOISE, PADDING, UNKNOWN, OrderedPasses, RasterPasses
from stage2_prior.given_ids import start_ids
from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.exported_weights import unwrapped
from vqmosaic.recipes.field_types import as_boolean, as_integer
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import uniforms

GREEDY_BELOW = 1e-6
"""A temperature below this is greedy, like 0. Dividing float32 logits by a much smaller temperature would give NaN."""
MAX_TEMPERATURE = torch.finfo(torch.float32).max
"""A larger temperature overflows float32. At this temperature, all ids are already equally likely."""


class SamplingStopped(Exception):
    """Raised when the callback returns False. No ids are returned."""


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


def check_known(vocabulary: Vocabulary, known: Any, images: int, device: torch.device) -> torch.Tensor:
    """The known ids (B, T) on the device, all UNKNOWN if `known` is None. Raises InputError for another shape or type, and for ids out of range."""
    shape = (images, vocabulary.num_tokens)
    if known is None:
        return torch.full(shape, UNKNOWN, device=device)
    if not isinstance(known, torch.Tensor) or known.dtype != torch.int64 or known.shape != shape:
        found = f"{known.dtype} {tuple(known.shape)}" if isinstance(known, torch.Tensor) else repr(type(known).__name__)
        raise InputError(f"known is {found}; give a tensor of int64 ids of shape {shape}, with {UNKNOWN} for tokens to draw.")
    sizes_T = torch.tensor([stop - start for start, stop in vocabulary.position_ranges()], device=known.device)
    if bool(((known < UNKNOWN) | (known >= sizes_T)).any()):
        raise InputError(f"known holds ids from {int(known.min())} to {int(known.max())}; allowed: {UNKNOWN} for tokens to draw, and ids below the "
                         f"codebook size of the token's grid, at most {vocabulary.most_codes}.")
    return known.to(device)


def check_evidence(vocabulary: Vocabulary, evidence: Any, images: int, device: torch.device) -> torch.Tensor | None:
    """The evidence (B, T, K) in float32 on the device, or None. Raises InputError for another shape or type, and for values that are not finite."""
    if evidence is None:
        return None
    shape = (images, vocabulary.num_tokens, vocabulary.most_codes)
    if not isinstance(evidence, torch.Tensor) or not evidence.is_floating_point() or evidence.shape != shape:
        found = f"{evidence.dtype} {tuple(evidence.shape)}" if isinstance(evidence, torch.Tensor) else repr(type(evidence).__name__)
        raise InputError(f"evidence is {found}; give a floating-point tensor of shape {shape}: a log likelihood for each code at each token.")
    if not bool(evidence.isfinite().all()):
        raise InputError("evidence has values that are not finite. Give finite log likelihoods, such as -1e6 for codes that are impossible.")
    return evidence.to(device, torch.float32)


def check_order(model: nn.Module, vocabulary: Vocabulary, sampling: SamplingConfig, known_BT: torch.Tensor, keep_unseen: bool = False) -> bool:
    """Whether the prior predicts tokens in any order.

    Raises InputError if it does not, and the settings or, unless `keep_unseen`, the known tokens need another order than raster; and for more steps
    than tokens.
    """
    length = vocabulary.num_tokens
    if sampling.steps is not None and sampling.steps > length:
        raise InputError(f"sampling.steps is {sampling.steps}; allowed: 1 to {length}, the number of tokens of an image, or null for one token in "
                         "each pass.")
    if getattr(unwrapped(model), "predicts_in_any_order", False):
        return True
    is_known_BT = known_BT != UNKNOWN
    reason = None
    if sampling.order != "raster":
        reason = f"sampling.order is {sampling.order!r}"
    elif sampling.steps not in (None, length):
        reason = f"sampling.steps is {sampling.steps}"
    elif not keep_unseen and bool((is_known_BT[:, 1:] & ~is_known_BT[:, :-1]).any()):
        reason = "there are known tokens after unknown ones"
    if reason:
        raise InputError(f"{reason}, but the prior was trained in raster order, so it draws one token after another, row by row. Use order raster, "
                         "no steps, and known tokens only before all others; or train a grid_transformer with prior_training.order annealed.")
    return False


def sample_tokens(model: nn.Module, vocabulary: Vocabulary, class_indices: Sequence[int] | torch.Tensor | None, sampling: SamplingConfig,
                  seeds: Sequence[int], callback: Callable[[int, int], bool | None] | None = None, compile: bool = False,
                  given: Mapping[str, torch.Tensor] | None = None, segment_guidance: Mapping[str, float] | None = None,
                  known: torch.Tensor | None = None, keep_unseen: bool = False, evidence: torch.Tensor | None = None) -> torch.Tensor:
    """Sample ids (B, T) of the drawn grids, int64 on the model's device. Image b depends only on its class, given and known ids, and seed.

    `model` is a transformers causal language model over the vocabulary. `callback(done, T)` is called after each pass with the number of tokens so
    far. If it returns False, SamplingStopped is raised. `compile` is passed to decoding.make_decoder. `given` has the ids (B, n) of conditions by
    name, and `segment_guidance` guidance scales by name of the segment, in place of sampling.guidance and sampling.guidance_scale. `known` are ids
    (B, T) to keep; -1 is a token to draw. With `keep_unseen`, priors trained in raster order accept them anywhere, but draw each token without
    seeing the known ones after it. `evidence` (B, T, K) is added to the logits after guidance, before temperature: the log likelihood of what was
    observed of a token, for each code. Raises InputError for invalid arguments and for logits that are not finite.
    """
    class_indices, seeds = check_request(vocabulary, class_indices, sampling, seeds)
    check_given(vocabulary, class_indices, given)
    scales = segment_scales(vocabulary, sampling.guidance_scale, {**sampling.guidance, **(segment_guidance or {})})
    compile = as_boolean("compile", compile)
    device, length = next(model.parameters()).device, vocabulary.num_tokens
    known_BT = check_known(vocabulary, known, len(seeds), device)
    evidence_BTK = check_evidence(vocabulary, evidence, len(seeds), device)
    any_order = check_order(model, vocabulary, sampling, known_BT, keep_unseen)
    classes_B = torch.tensor(class_indices, dtype=torch.int64, device=device)
    start_BP = start_ids(vocabulary, classes_B, given, classes_B[:, None])
    ids_BT, unknown_B = known_BT.clone(), (known_BT == UNKNOWN).sum(dim=1)
    # images with as many unknown tokens share a batch; in raster order, those with unknown tokens at the same places
    groups_B = unknown_B if any_order else (known_BT == UNKNOWN).unique(dim=0, return_inverse=True)[1]
    for number in groups_B[unknown_B > 0].unique().tolist():
        images_b = (groups_B == number).nonzero()[:, 0]
        unknown = int(unknown_B[images_b[0]])
        filled_elsewhere = int((ids_BT != UNKNOWN).sum()) - len(images_b) * (length - unknown)

        def report(filled: int, others: int = filled_elsewhere, images: int = len(images_b)) -> None:
            done = (others + filled * images) // len(seeds)  # the mean over all images
            if callback is not None and callback(done, length) is False:
                raise SamplingStopped(f"Stopped by the callback after {done} of {length} tokens.")

        group = Group(start_BP[images_b], [seeds[image] for image in images_b.tolist()], known_BT[images_b], unknown,
                      None if evidence_BTK is None else evidence_BTK[images_b])
        ids_BT[images_b] = sample_group(model, vocabulary, group, sampling, scales, report, compile, any_order)
    return ids_BT


class Group(NamedTuple):
    """Images of a request that have the same number of unknown tokens, so that each pass draws as many tokens of each of them."""

    start_BP: torch.Tensor
    """The class and the ids of the conditions."""
    seeds: list[int]
    known_BT: torch.Tensor
    """The known ids; UNKNOWN is a token to draw."""
    unknown: int
    """Number of tokens to draw in each image."""
    evidence_BTK: torch.Tensor | None = None
    """What is added to the logits of each token."""


def sample_group(model: nn.Module, vocabulary: Vocabulary, group: Group, sampling: SamplingConfig, segment_scales_n: Sequence[float],
                 report: Callable[[int], None], compile: bool, any_order: bool) -> torch.Tensor:
    """The ids (B, T) of the images of a group. `report(filled)` is called after each pass. See `sample_tokens`."""
    device, (images, length) = group.known_BT.device, group.known_BT.shape
    counts = tokens_per_pass(group.unknown, sampling.steps, sampling.step_schedule)
    uniforms_BT = torch.from_numpy(uniforms(group.seeds, length)).to(device)
    scales_nT = [guidance_scales(dataclasses.replace(sampling, guidance_scale=scale), length) for scale in segment_scales_n]
    filled = length - group.unknown
    scales_of_pass = [[fmean(scales_T[start:start + count]) for scales_T in scales_nT]
                      for start, count in zip(accumulate(counts[:-1], initial=filled), counts, strict=True)]
    last_guided = max((number for number, scales in enumerate(scales_of_pass) if set(scales) - {1.0}), default=-1)
    levels = needed_levels(segment_scales_n) if last_guided >= 0 else [len(segment_scales_n)]
    start_NP = level_start_ids(vocabulary, group.start_BP, levels)  # N = B rows for each level
    is_finite, is_finite_guided = (torch.ones((), dtype=torch.bool, device=device) for _ in range(2))
    with torch.inference_mode(), evaluation_mode(model):
        passes = make_passes(model, vocabulary, group, start_NP, sampling, counts, compile, any_order)
        for number, (count, scales) in enumerate(zip(counts, scales_of_pass, strict=True)):
            logits_NmK, places_Bm = passes.predict()
            is_finite &= logits_NmK.isfinite().all()
            logits_BmK = logits_NmK[:images]
            if set(scales) - {1.0}:
                by_level = logits_NmK.chunk(len(levels))[::-1]
                logits_BmK = combine_levels(by_level, [scales[level - 1] for level in levels[1:]])
                is_finite_guided &= logits_BmK.isfinite().all()
            if group.evidence_BTK is not None:
                observed_BmK = group.evidence_BTK[torch.arange(images, device=device)[:, None], places_Bm]
                logits_BmK = logits_BmK + observed_BmK[..., :logits_BmK.shape[-1]]
            if device.type == "cpu" or number in (0, len(counts) - 1):  # reading the flags synchronizes a GPU, so only twice there
                check_finite(is_finite, is_finite_guided, model, sampling)
            possible_BmK = logits_BmK.masked_fill(logits_BmK <= PADDING / 2, -torch.inf) if len(vocabulary.grids) > 1 else logits_BmK
            ids_Bm = draw_ids(possible_BmK.flatten(0, 1), uniforms_BT.gather(1, places_Bm).flatten(), sampling).view(places_Bm.shape)
            if number == last_guided < len(counts) - 1:  # not earlier: later guided passes attend to earlier null rows
                passes.keep_first(images)
            passes.accept(ids_Bm, logits_BmK)
            filled += count
            report(filled)
    return passes.ids_BT.clone()  # outside inference mode, so that the ids can be used in training


def make_passes(model: nn.Module, vocabulary: Vocabulary, group: Group, start_NP: torch.Tensor, sampling: SamplingConfig, counts: list[int],
                compile: bool, any_order: bool) -> RasterPasses | OrderedPasses:
    """The passes of the prior for these settings."""
    seeds, known_BT = group.seeds, group.known_BT
    length, device = vocabulary.num_tokens, known_BT.device
    decoder = make_decoder(model, vocabulary.num_codes, len(start_NP), start_NP.shape[1] - 1 + length, compile)
    if not any_order:
        return RasterPasses(decoder, vocabulary, start_NP, known_BT)
    by_confidence = sampling.order == "confidence"
    orders_BT = torch.from_numpy(drawing_orders("raster" if by_confidence else sampling.order, vocabulary.grids, seeds)).to(device)
    is_drawn_BT = (known_BT == UNKNOWN).gather(1, orders_BT)
    known_first_BT = torch.where(is_drawn_BT, torch.arange(length, device=device), orders_BT - length)  # known ones in raster order
    orders_BT = orders_BT.gather(1, known_first_BT.argsort(dim=1))
    noise_BT = None
    if by_confidence:
        noise_BT = torch.from_numpy(confidence_noise(seeds, length)).to(device, torch.float32) * CONFIDENCE_NOISE
    return OrderedPasses(decoder, vocabulary, start_NP, known_BT, orders_BT, counts, noise_BT)
