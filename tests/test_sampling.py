"""Sampling: functions on logits, the sampling loop against a reference without a cache, and errors."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch

from stage2_prior.generation.guidance import combine_levels
from stage2_prior.generation.sampling import (
    SamplingStopped,
    apply_temperature,
    draw_ids,
    guidance_scales,
    invert_cumulative,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from token_shards.manifest import Grid
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig
from vqmosaic.seeding import image_seeds, uniforms

INF = math.inf
NUMERIC_SETTINGS = ("temperature", "guidance_scale", "guidance_power", "top_p", "min_p")
GRIDS = [Grid(name="image", codebook_size=24, height=3, width=3)]
SHARP = {"initializer_range": 0.3}  # larger initial weights, so that logits differ clearly


def tiny_prior(architecture="llama", label_drop=0.1, class_names=("ant", "bee", "cat"), grids=GRIDS):
    names = list(class_names) if class_names else None
    vocabulary = Vocabulary(grids=grids, class_names=names, token_fingerprint="f" * 64, label_drop=label_drop)
    config = PriorConfig(architecture=architecture, width=32, layers=2, heads=2, options={} if architecture == "grid_transformer" else SHARP)
    prior = TokenPrior.from_config(config, vocabulary, seed=0).eval()
    with torch.no_grad():
        prior.model.get_output_embeddings().weight.mul_(20)  # for the same reason as SHARP
    return prior


def reference_sample(prior, classes, seeds, sampling):
    """Samples images one at a time without a cache, with guidance from two separate passes."""
    vocabulary, rows = prior.vocabulary, []
    for index, seed in zip(classes, seeds, strict=True):
        ids_1T = torch.zeros(1, vocabulary.num_tokens, dtype=torch.int64)
        uniforms_T = torch.from_numpy(uniforms([seed], vocabulary.num_tokens))[0]
        for position, (start, stop) in enumerate(vocabulary.position_ranges()):
            conditional_1K = prior(ids_1T, torch.tensor([index]))[:, position, :stop - start]
            null_1K = prior(ids_1T, torch.tensor([NO_CLASS]))[:, position, :stop - start]
            logits_1K = null_1K + guidance_scales(sampling, vocabulary.num_tokens)[position] * (conditional_1K - null_1K)
            ids_1T[:, position] = draw_ids(logits_1K, uniforms_T[position:position + 1], sampling)
        rows.append(ids_1T[0])
    return torch.stack(rows)


# --- pure functions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, [3.0, 3.0, 3.0, 3.0, 3.0]),
    ({"guidance_schedule": "linear"}, [1.0, 1.5, 2.0, 2.5, 3.0]),
    ({"guidance_schedule": "cosine"}, [1.0, 2 - math.sqrt(0.5), 2.0, 2 + math.sqrt(0.5), 3.0]),
    ({"guidance_schedule": "power-cosine", "guidance_power": 1.0}, [1.0, 2 - math.sqrt(0.5), 2.0, 2 + math.sqrt(0.5), 3.0]),
    ({"guidance_schedule": "power-cosine", "guidance_power": 2.0}, [1.0, 2 - math.cos(math.pi / 16), 2 - math.cos(math.pi / 4),
                                                                     2 - math.cos(math.pi * 9 / 16), 3.0]),
    ({"guidance_interval": [0.2, 0.6]}, [1.0, 3.0, 3.0, 1.0, 1.0]),
    ({"guidance_interval": [0.0, 0.0]}, [1.0, 1.0, 1.0, 1.0, 1.0]),
    ({"guidance_schedule": "linear", "guidance_interval": [0.3, 1.0]}, [1.0, 1.0, 2.0, 2.5, 3.0]),
    ({"guidance_schedule": "linear", "guidance_scale": 0.0}, [1.0, 0.75, 0.5, 0.25, 0.0]),
])
def test_guidance_schedules(settings, expected):
    assert guidance_scales(SamplingConfig(**{"guidance_scale": 3.0} | settings), 5) == pytest.approx(expected)


def test_guidance_of_a_single_token():
    assert guidance_scales(SamplingConfig(guidance_scale=3.0), 1) == [3.0]
    assert guidance_scales(SamplingConfig(guidance_scale=3.0, guidance_schedule="linear"), 1) == [1.0]


@pytest.mark.parametrize(("settings", "words"), [
    ({"guidance_schedule": "cosin"}, "guidance_schedule is 'cosin'; allowed: constant, linear, cosine, power-cosine. Did you mean 'cosine'"),
    ({"guidance_power": 0.0}, r"guidance_power is 0.0; it must be above 0"),
    ({"guidance_interval": [0.5, 0.2]}, r"guidance_interval is \[0.5, 0.2\]; it must be two numbers"),
    ({"guidance_interval": [0.5]}, "must be two numbers"), ({"guidance_interval": [0.0, 1.5]}, "must be two numbers"),
    ({"min_p": 1.5}, "min_p is 1.5; it must be at least 0 and at most 1"),
    *[({name: "0.9"}, rf"sampling.{name} is '0.9'; it must be a number") for name in NUMERIC_SETTINGS],
    *[({name: math.nan}, rf"{name} is nan") for name in NUMERIC_SETTINGS],
    ({"temperature": None}, "temperature is None; it must be a number"), ({"temperature": True}, "temperature is True; it must be a number"),
    ({"top_k": "5"}, "top_k is '5'; it must be an integer"), ({"top_k": 2.5}, "top_k is 2.5; it must be an integer"),
    ({"guidance_interval": "0.1"}, "guidance_interval is '0.1'; it must be a list"),
    ({"guidance_interval": ["0", "1"]}, "guidance_interval: an entry is '0'; it must be a number"),
    ({"guidance_interval": [0.0, math.nan]}, "must be two numbers"),
])
def test_invalid_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        SamplingConfig(**settings)


def test_numpy_and_torch_numbers_become_python_numbers():
    sampling = SamplingConfig(temperature=np.float32(0.5), top_k=np.int64(3), top_p=torch.tensor(0.5), guidance_interval=np.array([0.25, 0.5]))
    assert sampling == SamplingConfig(temperature=0.5, top_k=3, top_p=0.5, guidance_interval=[0.25, 0.5])
    json.dumps(dataclasses.asdict(sampling))


def test_apply_temperature():
    logits_BK = torch.tensor([[1.0, 2.0, 3.0, 0.0, -1.0]])
    assert apply_temperature(logits_BK, 0.5).tolist() == [[-4.0, -2.0, 0.0, -6.0, -8.0]]
    assert apply_temperature(logits_BK, 1e-44).softmax(-1).tolist() == [[0.0, 0.0, 1.0, 0.0, 0.0]]


def test_keep_top_k():
    logits_BK = torch.tensor([[1.0, 5.0, 3.0, 4.0, 2.0], [0.0, 0.0, 7.0, 0.0, 9.0]])
    assert keep_top_k(logits_BK, 2).tolist() == [[-INF, 5.0, -INF, 4.0, -INF], [-INF, -INF, 7.0, -INF, 9.0]]
    assert keep_top_k(logits_BK, 3)[1].tolist() == [0.0, 0.0, 7.0, 0.0, 9.0]  # three zeros tie for the third place
    for off in (0, 5, 100):
        assert torch.equal(keep_top_k(logits_BK, off), logits_BK)


@pytest.mark.parametrize(("p", "kept"), [(0.3, [1]), (0.39, [1]), (0.5, [1, 3]), (0.64, [1, 3]), (0.7, [1, 3, 4]), (0.95, [1, 3, 4, 0]),
                                         (0.999, [1, 3, 4, 0, 2]), (1e-9, [1]), (1.0, [0, 1, 2, 3, 4])])
def test_keep_top_p(p, kept):
    logits_BK = torch.tensor([[0.15, 0.40, 0.04, 0.25, 0.16]]).log()
    result_BK = keep_top_p(logits_BK, p)
    assert sorted(torch.isfinite(result_BK)[0].nonzero()[:, 0].tolist()) == sorted(kept)
    assert result_BK[0, kept].tolist() == logits_BK[0, kept].tolist()


@pytest.mark.parametrize(("p", "kept"), [(0.0, [0, 1, 2, 3, 4]), (0.05, [0, 1, 2, 3, 4]), (0.2, [0, 1, 3, 4]), (0.5, [1, 3]), (0.7, [1]), (1.0, [1])])
def test_keep_min_p(p, kept):
    logits_BK = torch.tensor([[0.15, 0.40, 0.04, 0.25, 0.16]]).log()
    result_BK = keep_min_p(logits_BK, p)
    assert torch.isfinite(result_BK)[0].nonzero()[:, 0].tolist() == kept and result_BK[0, kept].tolist() == logits_BK[0, kept].tolist()
    torch.testing.assert_close(torch.isfinite(keep_min_p(logits_BK + 100, p)), torch.isfinite(result_BK))  # logits are defined up to a constant
    ids_B = draw_ids(logits_BK.expand(500, -1), torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64), SamplingConfig(min_p=p))
    assert sorted(set(ids_B.tolist())) == kept


def test_top_p_keeps_the_lower_of_equally_likely_ids():
    assert torch.isfinite(keep_top_p(torch.zeros(1, 5), 0.5)).tolist() == [[True, True, True, False, False]]


def test_drawn_ids_follow_the_probabilities():
    probabilities_K = torch.tensor([0.1, 0.0, 0.4, 0.3, 0.2])
    uniforms_B = torch.from_numpy(uniforms([3], 50_000)[0])
    ids_B = invert_cumulative(probabilities_K.expand(50_000, -1), uniforms_B)
    shares_K = torch.bincount(ids_B, minlength=5) / 50_000
    assert ids_B.dtype == torch.int64 and shares_K.tolist() == pytest.approx(probabilities_K.tolist(), abs=0.008) and shares_K[1] == 0


@pytest.mark.parametrize("probabilities", [[0.0, 0.2, 0.0, 0.8, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4, 0.0],
                                           [1e-30, 0.0, 0.7, 0.3, 1e-30]])
def test_extreme_uniforms_never_draw_impossible_ids(probabilities):
    possible = [id for id, probability in enumerate(probabilities) if probability > 0]
    edges = torch.tensor([0.0, 5e-324, 0.5, 1 - 2**-53], dtype=torch.float64)
    ids_B = invert_cumulative(torch.tensor(probabilities).expand(4, -1), edges).tolist()
    assert ids_B[0] == possible[0] and set(ids_B) <= set(possible)


def test_rounding_never_draws_ids_beyond_the_last_possible_one():
    rng = np.random.default_rng(0)
    logits_BK = torch.from_numpy(rng.normal(size=(2000, 700)) * 3).float()
    logits_BK[:, -5:] = -INF
    ids_B = invert_cumulative(logits_BK.softmax(-1), torch.full((2000,), 1 - 2**-53, dtype=torch.float64))
    assert ids_B.max() < 695 and torch.isfinite(logits_BK.gather(1, ids_B[:, None])).all()


def test_temperature_zero_takes_the_most_likely_id():
    logits_BK = torch.tensor([[1.0, 5.0, 3.0, 4.0, 2.0], [9.0, 0.0, 7.0, 0.0, 8.0]])
    assert draw_ids(logits_BK, torch.tensor([0.99, 0.99], dtype=torch.float64), SamplingConfig(temperature=0, top_p=0.5)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0, 1e-7, 1e-20, 1e-38, 1e-45, 1e-46, 1e-300, 5e-324])
@pytest.mark.parametrize("others", [{}, {"top_k": 3}, {"top_p": 1e-300}, {"min_p": 1.0}])
def test_tiny_temperature_is_greedy(temperature, others):
    logits_BK = torch.tensor([[1.0, 5.0, 3.0, 4.0, 2.0], [9.0, 0.0, 7.0, -INF, 8.999]])
    for uniform in (0.0, 0.5, 1 - 2**-53):
        uniforms_B = torch.full((2,), uniform, dtype=torch.float64)
        assert draw_ids(logits_BK, uniforms_B, SamplingConfig(temperature=temperature, **others)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e30, 1e38, 1e39, 1e300, 1.7e308])
@pytest.mark.parametrize("others", [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 5e-324}, {"top_p": 1e-12}, {"min_p": 1.0}, {"min_p": 5e-324}])
def test_no_setting_draws_an_impossible_id(temperature, others):
    """Ids with logits of -inf are never drawn, and a very high temperature makes all others equally likely."""
    logits_BK = torch.tensor([[-INF, 3e38, -3e38, 0.0, -INF], [-INF, 1.0, 1.0, 1.0, -INF]])
    edges_B = torch.tensor([0.0, 5e-324, 0.3, 0.99, 1 - 2**-53], dtype=torch.float64)
    sampling = SamplingConfig(temperature=temperature, **others)
    drawn = [draw_ids(row_K.expand(5, -1), edges_B, sampling) for row_K in logits_BK]
    assert all(int(ids_B.min()) >= 1 and int(ids_B.max()) <= 3 for ids_B in drawn)
    if temperature >= 1e39 and not others:
        assert drawn[0].tolist() == drawn[1].tolist() == [1, 1, 1, 3, 3]


@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [math.nan] * 3, [0.0, INF, 1.0], [-INF] * 3])
@pytest.mark.parametrize("temperature", [0, 1e-300, 1.0, 1e300])
def test_invalid_logits_raise_an_error(row, temperature):
    logits_BK = torch.tensor([[0.0, 1.0, 2.0], row])
    with pytest.raises(InputError, match=r"logits have a row with NaN, with \+inf, or with -inf only"):
        draw_ids(logits_BK, torch.tensor([0.5, 0.5], dtype=torch.float64), SamplingConfig(temperature=temperature))


def test_nan_probabilities_give_valid_ids():
    """sample_tokens reads the check of the logits only at the end, so ids that are drawn before must be valid."""
    ids_B = invert_cumulative(torch.full((3, 5), math.nan), torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64))
    assert int(ids_B.min()) >= 0 and int(ids_B.max()) < 5


# --- the sampling loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_cached_logits_match_uncached_logits(architecture):
    prior = tiny_prior(architecture)
    seen = []
    hook = prior.model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits[:, -1, :24]))
    ids_BT = prior.sample([0, 2, NO_CLASS], SamplingConfig(), [1, 2, 3])
    hook.remove()
    with torch.no_grad():
        expected_BTK = prior(ids_BT, torch.tensor([0, 2, NO_CLASS]))
    assert len(seen) == 9 and expected_BTK.std() > 0.5
    torch.testing.assert_close(torch.stack(seen, dim=1), expected_BTK, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "grid_transformer"])
@pytest.mark.parametrize("sampling", [
    SamplingConfig(), SamplingConfig(guidance_scale=2.5), SamplingConfig(guidance_scale=0.0), SamplingConfig(temperature=0),
    SamplingConfig(guidance_scale=1.7, temperature=0.8, top_k=12, top_p=0.9, min_p=0.05),
    SamplingConfig(guidance_scale=4.0, guidance_schedule="power-cosine", guidance_interval=[0.2, 0.7]),
])
def test_sample_matches_a_reference_without_a_cache(architecture, sampling):
    prior, classes, seeds = tiny_prior(architecture), [0, 2, 1, NO_CLASS], image_seeds(7, 4)
    with torch.no_grad():
        assert torch.equal(prior.sample(classes, sampling, seeds), reference_sample(prior, classes, seeds, sampling))


def test_each_grid_samples_its_own_codes():
    grids = [Grid(name="coarse", codebook_size=3, height=1, width=2), Grid(name="fine", codebook_size=17, height=2, width=2)]
    prior, sampling = tiny_prior(grids=grids), SamplingConfig(guidance_scale=2.0, top_k=15)
    classes, seeds = [0, 1, 2] * 20, image_seeds(1, 60)
    ids_BT = prior.sample(classes, sampling, seeds)
    assert ids_BT.min() >= 0 and ids_BT[:, :2].max() <= 2 < ids_BT[:, 2:].max() <= 16
    with torch.no_grad():
        assert torch.equal(ids_BT[:3], reference_sample(prior, classes[:3], seeds[:3], sampling))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_samples_do_not_depend_on_the_batch(guidance_scale):
    prior, sampling = tiny_prior(), SamplingConfig(guidance_scale=guidance_scale)
    classes, seeds = [0, 1, 2, 0, 1, 2, 1], image_seeds(3, 7)
    ids_BT = prior.sample(classes, sampling, seeds)
    for row in range(7):
        assert torch.equal(prior.sample([classes[row]], sampling, [seeds[row]])[0], ids_BT[row])
    assert torch.equal(prior.sample(classes[::-1], sampling, seeds[::-1]), ids_BT.flip(0))
    assert len({tuple(row) for row in ids_BT.tolist()}) == 7


def test_guidance_adds_rows_only_while_it_is_active():
    prior, rows = tiny_prior(), []
    hook = prior.model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.logits)))
    plain = prior.sample([0, 1], SamplingConfig(), [5, 6])
    assert torch.equal(prior.sample([0, 1], SamplingConfig(guidance_scale=1.0), [5, 6]), plain) and set(rows) == {2}
    rows.clear()
    prior.sample([0, 1], SamplingConfig(guidance_scale=1.5), [5, 6])
    assert set(rows) == {4}  # with and without the class in one batch
    rows.clear()
    prior.sample([0, 1], SamplingConfig(guidance_scale=1.5, guidance_interval=[0.3, 0.6]), [5, 6])
    assert rows == [4] * 6 + [2] * 3  # rows without a class are dropped after the last guided position
    hook.remove()


@pytest.mark.parametrize("classes", [None, [NO_CLASS, NO_CLASS], torch.tensor([NO_CLASS, NO_CLASS])])
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_guidance_without_classes_is_refused(classes, scale):
    prior = tiny_prior()
    with pytest.raises(InputError, match=rf"guidance_scale is {scale:g}, but no image has a class, so guidance has no effect"):
        prior.sample(classes, SamplingConfig(guidance_scale=scale), [5, 6])
    assert prior.sample(classes, SamplingConfig(), [5, 6]).shape == (2, 9)


def test_temperature_zero_is_greedy_for_every_seed():
    prior, greedy = tiny_prior(), SamplingConfig(temperature=0)
    ids_BT = prior.sample([0, 1], greedy, [5, 6])
    assert torch.equal(prior.sample([0, 1], greedy, [7, 8]), ids_BT)
    assert torch.equal(prior(ids_BT, torch.tensor([0, 1])).argmax(-1), ids_BT)


def test_prior_without_classes():
    prior = tiny_prior(class_names=None, label_drop=0.0)
    ids_BT = prior.sample(None, SamplingConfig(), image_seeds(0, 50))
    assert ids_BT.shape == (50, 9) and ids_BT.dtype == torch.int64 and ids_BT.min() >= 0 and ids_BT.max() <= 23
    with pytest.raises(InputError, match="trained without classes"):
        prior.sample([0], SamplingConfig(), [1])
    with pytest.raises(InputError, match=r"guidance_scale is 2.* trained without classes"):
        prior.sample(None, SamplingConfig(guidance_scale=2.0), [1])


def test_sampling_disables_dropout_and_restores_training_mode():
    prior = tiny_prior()
    expected = prior.sample([0, 1], SamplingConfig(), [5, 6])
    prior.train()
    assert torch.equal(prior.sample([0, 1], SamplingConfig(), [5, 6]), expected)
    assert all(module.training for module in prior.modules())
    with pytest.raises(SamplingStopped):
        prior.sample([0, 1], SamplingConfig(), [5, 6], callback=lambda done, total: False)
    assert all(module.training for module in prior.modules())
    prior.loss(expected, torch.tensor([0, 1])).backward()  # no inference tensors are left


def test_callback_gets_progress_and_can_stop_sampling():
    prior, calls = tiny_prior(), []
    prior.sample([0], SamplingConfig(), [5], callback=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 9) for done in range(1, 10)]
    counter = itertools.count(1)
    with pytest.raises(SamplingStopped, match="after 3 of 9"):
        prior.sample([0], SamplingConfig(), [5], callback=lambda done, total: next(counter) < 3)


@pytest.mark.parametrize("architecture", ["llama", "grid_transformer"])
def test_bfloat16_samples_match_float32_up_to_rounding(architecture):
    """Given the same previous ids, float32 probabilities give most of the ids that bf16 draws, and the others are close in cumulative probability.
    For comparison, a guidance scale of 1.5 instead of 2 changes a sixth of the ids, by up to 0.4."""
    prior, classes, seeds = tiny_prior(architecture), [0, 1, 2] * 20, image_seeds(0, 60)
    ids_BT = tiny_prior(architecture).to(torch.bfloat16).sample(classes, SamplingConfig(guidance_scale=2.0), seeds)
    with torch.no_grad():
        logits_BTK = combine_levels([prior(ids_BT), prior(ids_BT, torch.tensor(classes))], [2.0])
    probabilities_BTK, uniforms_BT = logits_BTK.double().softmax(dim=-1), torch.from_numpy(uniforms(seeds, 9))
    upper_BT, width_BT = (each.gather(2, ids_BT[:, :, None])[:, :, 0] for each in (probabilities_BTK.cumsum(dim=-1), probabilities_BTK))
    distances_BT = torch.maximum(uniforms_BT - upper_BT, upper_BT - width_BT - uniforms_BT).clamp_min(0)
    assert 0 < (distances_BT > 0).double().mean() < 0.08 and distances_BT.max() < 0.2


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=0)])
def test_nan_weights_raise_an_error(sampling):
    prior = tiny_prior()
    with torch.no_grad():
        prior.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(InputError, match=r"not finite in torch\.float32"):
        prior.sample([0], sampling, [1])


def test_non_finite_logits_at_a_single_position_raise_an_error(monkeypatch):
    """An overflow of the last layer alone leaves nothing in the cache, so later positions do not show it."""
    prior = tiny_prior()
    calls = itertools.count()
    hook = prior.model.lm_head.register_forward_hook(lambda module, inputs, output: output * (math.inf if next(calls) == 4 else 1))
    with pytest.raises(InputError, match=r"not finite in torch\.float32"):
        prior.sample([0], SamplingConfig(), [1])
    hook.remove()


@pytest.mark.parametrize("scale", [1e38, 1e39, 1e300])
def test_error_for_overflowing_guidance_names_guidance_scale(scale):
    with pytest.raises(InputError, match=r"guidance_scale is 1e\+\d+, which makes logits infinite; lower it"):
        tiny_prior().sample([0], SamplingConfig(guidance_scale=scale), [1])


@pytest.mark.parametrize(("classes", "sampling", "seeds", "words"), [
    ([3], SamplingConfig(), [1], r"class index is 3; allowed: 0 \(ant\) to 2 \(cat\)"),
    ([-2], SamplingConfig(), [1], "class index is -2"),
    ([0, 1], SamplingConfig(), [1], "2 class indices and 1 seeds"),
    ([], SamplingConfig(), [], "seeds is empty"),
    ([0], SamplingConfig(), [-1], "at least 0"),
    ([0], SamplingConfig(), ["1"], r"seeds: an entry is '1'; it must be an integer"),
    ([0], SamplingConfig(), "1", r"seeds is '1'; give a list of integers"),
    ([0], SamplingConfig(), 1, r"seeds is 1; give a list of integers"),
    ([0], SamplingConfig(), [True], "seeds: an entry is True"),
    ([0], SamplingConfig(), [1.0], "seeds: an entry is 1.0"),
    (["0"], SamplingConfig(), [1], r"class_indices: an entry is '0'; it must be an integer"),
    ("0", SamplingConfig(), [1], r"class_indices is '0'; give a list of integers"),
    ([0], {"temperature": 0.9}, [1], r"sampling is \{'temperature': 0.9\}; give a SamplingConfig"),
])
def test_invalid_arguments_are_refused(classes, sampling, seeds, words):
    with pytest.raises(InputError, match=words):
        tiny_prior().sample(classes, sampling, seeds)


def test_numpy_and_torch_integers_are_accepted():
    prior = tiny_prior()
    expected = prior.sample([0, 2], SamplingConfig(), [5, 6])
    for classes, seeds in ((np.array([0, 2]), np.array([5, 6])), ((np.int64(0), np.int64(2)), (np.uint8(5), 6)), (torch.tensor([0, 2]), range(5, 7))):
        assert torch.equal(prior.sample(classes, SamplingConfig(), seeds), expected)
    with pytest.raises(InputError, match="compile is 'no'; it must be true or false"):
        prior.sample([0], SamplingConfig(), [1], compile="no")


def test_guidance_and_missing_classes_are_refused_without_label_drop():
    prior = tiny_prior(label_drop=0.0)
    prior.sample(torch.tensor([0]), SamplingConfig(), [1])
    with pytest.raises(InputError, match=r"guidance_scale is 2.* label_drop 0.* null class"):
        prior.sample([0], SamplingConfig(guidance_scale=2.0), [1])
    with pytest.raises(InputError, match=r"has no class.* label_drop 0"):
        prior.sample(None, SamplingConfig(), [1])
