"""Sampling in passes of several tokens compared with fresh forward passes: guidance of a pass, dropped null rows, and order confidence."""

import dataclasses

import pytest
import torch

from stage2_prior.generation.drawing_order import confidence_noise, drawing_orders, tokens_per_pass
from stage2_prior.generation.passes import CONFIDENCE_NOISE
from stage2_prior.generation.sampling import draw_ids, guidance_scales
from stage2_prior.prior import TokenPrior
from tests.test_orders import any_order_prior
from tests.tiny_priors import TWO_GRIDS, VOCABULARY
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import uniforms

VOCABULARIES = {"one grid": VOCABULARY, "two grids": dataclasses.replace(TWO_GRIDS, class_names=["ant", "bee", "cat"], label_drop=0.1)}
CLASSES, SEEDS = [0, 1, 2, 0], [5, 6, 7, 8]


def some_known_tokens(length: int) -> torch.Tensor:
    """Known ids (4, T) of two images; the others have none."""
    known_BT = torch.full((len(SEEDS), length), -1)
    known_BT[1, [0, length - 1]], known_BT[3, 2] = torch.tensor([3, 1]), 2
    return known_BT


@torch.no_grad()
def sample_by_fresh_passes(prior: TokenPrior, class_index: int, settings: SamplingConfig, seed: int, known_T: torch.Tensor) -> torch.Tensor:
    """The ids (T,) of one image. Each token of a pass is predicted by two forward passes on the tokens so far, with the class and without it."""
    vocabulary, length, by_confidence = prior.vocabulary, len(known_T), settings.order == "confidence"
    order = drawing_orders("raster" if by_confidence else settings.order, vocabulary.grids, [seed])[0].tolist()
    drawn, unknown = [place for place in range(length) if known_T[place] >= 0], [place for place in order if known_T[place] < 0]
    is_second_grid = [place >= vocabulary.grids[0].num_tokens for place in range(length)]
    uniforms_T, noise_T = torch.from_numpy(uniforms([seed], length))[0], confidence_noise([seed], length)[0] * CONFIDENCE_NOISE
    scales_T, ids_T = guidance_scales(settings, length), known_T.clamp_min(0)
    for count in tokens_per_pass(len(unknown), settings.steps, settings.step_schedule):
        scale = sum(scales_T[len(drawn):len(drawn) + count]) / count
        ids, confidence = dict[int, int](), dict[int, float]()
        for place in unknown if by_confidence else unknown[:count]:
            start, stop = vocabulary.position_ranges()[place]
            order_1T = torch.tensor([[*drawn, place, *(other for other in unknown if other != place)]])
            conditional_1K, null_1K = (prior(ids_T[None], classes_1, orders_BT=order_1T)[:, place, :stop - start]
                                       for classes_1 in (torch.tensor([class_index]), None))
            logits_1K = null_1K + scale * (conditional_1K - null_1K)
            ids[place] = int(draw_ids(logits_1K, uniforms_T[place:place + 1], settings))
            confidence[place] = float(logits_1K.log_softmax(-1)[0, ids[place]]) + noise_T[place]
        if by_confidence:
            unknown.sort(key=lambda place: (is_second_grid[place], -confidence[place]))
        for place in unknown[:count]:
            ids_T[place] = ids[place]
        drawn, unknown = drawn + unknown[:count], unknown[count:]
    return ids_T


@pytest.mark.parametrize("settings", [
    {"order": "random", "steps": 1, "guidance_schedule": "linear"},
    {"order": "spread", "steps": 3, "guidance_schedule": "linear", "step_schedule": "linear"},
    {"order": "random", "steps": 3, "guidance_interval": [0.0, 0.5]},
    {"order": "confidence", "steps": 3, "guidance_schedule": "linear"},
    {"order": "confidence", "steps": 3, "guidance_interval": [0.0, 0.5]},
], ids=["one pass", "linear schedule", "interval", "confidence, linear schedule", "confidence, interval"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("has_known", [False, True], ids=["none known", "some known"])
def test_guided_passes_of_several_tokens_are_those_of_fresh_forward_passes(settings, vocabulary, has_known):
    prior, config = any_order_prior(vocabulary), SamplingConfig(guidance_scale=4.0, **settings)
    known_BT = some_known_tokens(vocabulary.num_tokens) if has_known else torch.full((len(SEEDS), vocabulary.num_tokens), -1)
    expected_BT = torch.stack([sample_by_fresh_passes(prior, *image) for image in
                               zip(CLASSES, [config] * len(SEEDS), SEEDS, known_BT, strict=True)])
    assert torch.equal(prior.sample(CLASSES, config, SEEDS, known_BT=known_BT), expected_BT)
    assert not torch.equal(prior.sample(CLASSES, config.unguided(), SEEDS, known_BT=known_BT), expected_BT), "guidance has an effect"


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_null_rows_are_dropped_after_the_guidance_interval(order):
    prior, config = any_order_prior(), SamplingConfig(guidance_scale=4.0, order=order, steps=4, guidance_interval=[0.0, 0.5])
    expected_BT, rows = prior.sample(CLASSES, config, SEEDS), []
    prior.model.register_forward_pre_hook(lambda model, arguments, named: rows.append(len(named["input_ids"])), with_kwargs=True)
    assert torch.equal(prior.sample(CLASSES, config, SEEDS), expected_BT), "a hook selects the reference decoder"
    assert rows == [8, 8, 8, 4], "passes of 1, 2, 3 and 3 tokens; the first 5 of 9 tokens are guided"
