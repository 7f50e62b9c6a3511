"""Whole runs with a prior for any order: training, metrics, commands, sweep and demo."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.command_line import dispatch
from pipelines.generate import ImageGenerationPipeline
from pipelines.stages.stage_checks import check_prior_config
from stage2_prior.prior import TokenPrior
from stage2_prior.token_batches import random_orders, validation_samples
from tests.run_files import records
from tests.test_feature_extractors import Pooled, scripted
from tests.tiny import ANY_ORDER, copy_tokens, tiny_overrides, tiny_recipe
from token_shards import TokenShardReader
from vqmosaic.errors import InputError


def test_the_chain_draws_in_the_passes_of_the_recipe(any_order_run):
    pipe = ImageGenerationPipeline.from_pretrained(any_order_run)
    assert (pipe.sampling.order, pipe.sampling.steps) == ("spread", 4)
    progress = []
    pipe(class_labels="3", seed=1, callback=lambda done, total: progress.append((done, total)))
    assert progress == [(1, 16), (5, 16), (10, 16), (16, 16)], "the cosine schedule draws few tokens at first"
    assert json.loads((any_order_run / "summary.json").read_text())


def test_validation_reports_the_nll_in_raster_and_in_random_order(any_order_run):
    record = records(any_order_run, "prior", "validation")[-1]
    prior, reader = TokenPrior.from_pretrained(any_order_run / "prior"), TokenShardReader(any_order_run / "tokens/validation")
    weights = any_order_run / "checkpoints/prior/last"
    last = TokenPrior.from_pretrained(weights) if weights.is_dir() else prior
    samples = reader.samples(validation_samples(reader, 64))
    ids_BT, classes_B = torch.from_numpy(samples.ids_BT), torch.from_numpy(samples.labels_B)
    orders_BT = torch.from_numpy(random_orders(samples.samples_B, prior.vocabulary.grids, "validation"))
    for name, orders in (("nll", None), ("nll_in_random_order", orders_BT)):
        with torch.no_grad():
            logits_BTK = last(ids_BT, classes_B, orders_BT=orders)
        expected = torch.nn.functional.cross_entropy(logits_BTK.flatten(0, 1), ids_BT.flatten()).item()
        assert record[name] == pytest.approx(expected, rel=1e-5)


def test_generate_takes_order_and_steps(any_order_run, tmp_path):
    names = []
    for number, options in enumerate(([], [], ["--steps", "16"], ["--order", "random", "--steps", "2", "--step_schedule", "linear"])):
        assert dispatch(["generate", str(any_order_run), "--classes", "3", "--num", "2", "--out", str(tmp_path / str(number)), *options]) == 0
        names.append(sorted(path for path in (tmp_path / str(number)).rglob("*.png") if path.stem != "grid"))
    first, again, slow, random = ([np.asarray(Image.open(path)) for path in paths] for paths in names)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, slow, strict=True)) and any((a != b).any() for a, b in zip(first, random, strict=True))


@pytest.mark.parametrize(("options", "words"), [
    (["--steps", "17"], "--steps is 17"), (["--steps", "0"], "--steps is 0"), (["--order", "spiral"], "--order is 'spiral'"),
    (["--step_schedule", "steep"], "--step_schedule is 'steep'"),
])
def test_generate_refuses_impossible_settings(any_order_run, options, words, tmp_path):
    with pytest.raises(InputError, match=words):
        dispatch(["generate", str(any_order_run), "--out", str(tmp_path / "out"), *options])


def test_generate_refuses_orders_that_the_prior_has_not_learned(tiny_run, tmp_path):
    for options, words in ((["--order", "random"], "--order is 'random', but the prior in"), (["--steps", "3"], "--steps is 3, but the prior in")):
        with pytest.raises(InputError, match=words):
            dispatch(["generate", str(tiny_run), "--out", str(tmp_path / "out"), *options])


@pytest.mark.parametrize(("changes", "words"), [
    ({"prior_training__order": "random"}, r"prior_training\.order is 'random', but prior\.architecture is 'llama'"),
    ({"sampling__order": "spread"}, r"sampling\.order is 'spread', but prior_training\.order is 'raster'"),
    ({"sampling__steps": 4}, r"sampling\.steps is 4, but prior_training\.order is 'raster'"),
    ({**ANY_ORDER, "sampling__steps": 17}, r"sampling\.steps is 17, but an image has 16 tokens"),
    ({"sampling__order": "spiral"}, r"sampling\.order is 'spiral'"),
])
def test_recipes_with_impossible_orders_are_refused(changes, words, tmp_path):
    with pytest.raises(InputError, match=words):
        tiny_recipe(tmp_path, prior__architecture=changes.pop("prior__architecture", "llama"), **changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"prior__options": "{query_blocks: 2}"}, "The prior has 2 layers and 2 query_blocks"),
    ({"prior__options": "{query_blocks: 0}"}, "allowed: 1 to 1, because prior_training.order is not raster"),
    ({"prior__layers": 1}, "needs at least 2"),
])
def test_an_impossible_number_of_query_blocks_is_refused(tiny_run, changes, words, tmp_path, capsys):
    run_dir = copy_tokens(tiny_run, tmp_path / "run")
    overrides = tiny_overrides(run_dir, **(ANY_ORDER | changes))
    assert dispatch(["train-prior", "digits", *overrides]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "words"), [({"prior__layers": 3, "prior__options": "{query_blocks: 1}"}, None),
                                                ({"prior__layers": 1}, "needs at least 2")])
def test_the_chain_checks_the_prior_before_it_starts(changes, words, tmp_path):
    recipe = tiny_recipe(tmp_path, **(ANY_ORDER | changes))
    if words is None:
        check_prior_config(recipe)
    else:
        with pytest.raises(InputError, match=words):
            check_prior_config(recipe)


def test_sweep_compares_orders_and_steps(any_order_run, tiny_run, tmp_path, capsys):
    """The plan alone: what a sweep measures is in test_sweep.py."""
    features = scripted(Pooled(), tmp_path / "pooled.pt")
    common = ["--features", str(features), "--images", "8", "--dry_run", "--out", str(tmp_path / "sweep.json")]
    assert dispatch(["sweep", str(any_order_run), "--order", "random, spread", "--steps", "4,16", *common]) == 0
    assert "4 combinations" in capsys.readouterr().out
    with pytest.raises(InputError, match="--order is 'random', but the prior in"):
        dispatch(["sweep", str(tiny_run), "--order", "raster,random", *common])
    with pytest.raises(InputError, match="--step_schedule has no effect"):
        dispatch(["sweep", str(tiny_run), "--step_schedule", "cosine,linear", *common])


def test_demo_has_a_slider_for_the_passes(any_order_run, tiny_run):
    pytest.importorskip("gradio")
    from pipelines.demo.request_checks import checked_request, sampling_controls

    pipe, raster = (ImageGenerationPipeline.from_pretrained(run) for run in (any_order_run, tiny_run))
    assert "steps" not in [control.name for control in sampling_controls(raster)]
    control = sampling_controls(pipe)[-1]
    assert (control.name, control.minimum, control.maximum) == ("steps", 1, 16)
    values = [getattr(pipe.sampling, control.name) for control in sampling_controls(pipe)]
    _, _, _, settings = checked_request(pipe, ["3"], 1, 7, *values[:-1], 2)
    assert settings["steps"] == 2 and len(pipe(class_labels="3", seed=7, **settings).images) == 1
    with pytest.raises(InputError, match="Steps is 17"):
        checked_request(pipe, ["3"], 1, 7, *values[:-1], 17)


def test_known_tokens_stay_in_images_of_a_trained_prior(any_order_run):
    pipe = ImageGenerationPipeline.from_pretrained(any_order_run)
    known_BT = torch.full((4, 16), -1)
    known_BT[:, 5:9] = torch.arange(16).view(4, 4)
    request = pipe._check_request(["1", "2", "3", "4"], 1, 7, {})._replace(known_BT=known_BT)
    outputs = list(pipe._sample_batches(request, "pil", None, 3, False))  # two batches
    ids_BT = torch.cat([output.token_ids for output in outputs]).flatten(1)
    assert torch.equal(ids_BT[:, 5:9], known_BT[:, 5:9]) and ids_BT.min() >= 0
