"""Guidance with several given segments, and training batches in which segments are dropped."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.generation.guidance import combine_levels
from stage2_prior.generation.guidance_scales import needed_levels, segment_scales
from stage2_prior.prior import TokenPrior
from stage2_prior.segments import GivenGrid
from stage2_prior.token_batches import TokenBatches
from stage2_prior.token_columns import TokenColumns
from stage2_prior.train import describe_metrics, train, validate
from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from tests.run_files import records
from tests.test_segments import FULL, IMAGE, LOW, TEXT, perturbed, random_given
from tests.tiny import tiny_recipe
from tests.tiny_priors import VOCABULARY, tiny_prior
from token_shards import ShardSetHeader, TokenShardManifest, TokenShardReader, TokenShardWriter, default_key
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig

CLASS_ONLY = dataclasses.replace(FULL, conditions=[])


# --- arithmetic --------------------------------------------------------------------------------------------------------------


def test_combine_levels():
    null, first, both = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0])
    assert combine_levels([null, first, both], [2.0, 3.0]).tolist() == [0 + 2 * 1 + 3 * 1, 1 + 2 * 2 + 3 * -3]
    assert combine_levels([null, first], [3.0]).tolist() == [3.0, 7.0] and combine_levels([both], []) is both
    for scale, expected in ((1.0, both), (0.0, null)):
        assert torch.equal(combine_levels([null, first, both], [scale, scale]), expected)


@pytest.mark.parametrize(("scales", "levels"), [
    ([], [0]), ([1.0], [1]), ([2.0], [0, 1]), ([1.0, 1.0], [2]), ([3.0, 3.0], [0, 2]), ([1.0, 2.0], [1, 2]), ([2.0, 1.0], [0, 1, 2]),
    ([2.0, 3.0, 3.0], [0, 1, 3]), ([0.0, 0.0], [0, 2]),
])
def test_levels_that_do_not_count_are_left_out(scales, levels):
    assert needed_levels(scales) == levels
    logits = [torch.randn(3, generator=torch.Generator().manual_seed(level)) for level in range(len(scales) + 1)]
    fewer = combine_levels([logits[level] for level in levels], [scales[level - 1] for level in levels[1:]])
    torch.testing.assert_close(fewer, combine_levels(logits, scales))


def test_scales_of_segments():
    assert segment_scales(FULL, 2.0, None) == [2.0, 2.0, 2.0]
    assert segment_scales(FULL, 2.0, {"low": 1.5}) == [2.0, 1.5, 2.0]
    assert segment_scales(dataclasses.replace(FULL, class_names=None), 1.0, {"text": 3.0}) == [1.0, 3.0], "an empty class cannot be guided"
    with pytest.raises(InputError, match="'image'; the given segments of the prior are: class, low, text"):
        segment_scales(FULL, 1.0, {"image": 2.0})
    with pytest.raises(InputError, match="at least 0"):
        segment_scales(FULL, 1.0, {"low": -1.0})
    never_dropped_alone = dataclasses.replace(FULL, conditions=[dataclasses.replace(LOW, drop_rate=0.0)])
    assert segment_scales(never_dropped_alone, 2.0, None) == [2.0, 2.0]
    with pytest.raises(InputError, match=r"scales class 3, low 1 needs a prior that was trained without low but with class.*drop rates are 0\."):
        segment_scales(never_dropped_alone, 1.0, {"class": 3.0})


def test_segments_dropped_from_all_samples_are_not_guided():
    """A prior of captions: the shards have classes, but it was trained without them."""
    captions = dataclasses.replace(FULL, class_drop=1.0, conditions=[TEXT])
    assert captions.drop_rates == [TEXT.drop_rate] and ChainVocabulary([captions]).given_names == ["text"]
    assert captions.is_trained(0) and captions.is_trained(1) and captions.why_unguided() is None
    assert segment_scales(captions, 1.5, {"text": 3.0}) == [3.0]
    with pytest.raises(InputError, match="'class'; the given segments of the prior are: text"):
        segment_scales(captions, 1.5, {"class": 3.0})
    without_text = dataclasses.replace(FULL, conditions=[LOW, dataclasses.replace(TEXT, drop_rate=1.0)])
    assert segment_scales(without_text, 1.0, {"low": 3.0}) == [1.0, 3.0]
    assert dataclasses.replace(captions, conditions=[]).why_unguided() == "was trained without classes"


# --- sampling ----------------------------------------------------------------------------------------------------------------


def greedy_reference(prior, classes_B, given, scales) -> torch.Tensor:
    """Greedy ids from full forward passes of all levels."""
    ids_BT = torch.zeros(len(classes_B), prior.vocabulary.num_tokens, dtype=torch.int64)
    names = [segment.name for segment in prior.vocabulary.given_segments]
    for position in range(prior.vocabulary.num_tokens):
        levels = []
        for level in range(len(names) + 1):
            kept = names[:level]
            with torch.no_grad():
                levels.append(prior(ids_BT, classes_B if "class" in kept else None, {name: ids for name, ids in given.items() if name in kept}))
        ids_BT[:, position] = combine_levels(levels, scales)[:, position].argmax(-1)
    return ids_BT


@pytest.mark.parametrize("architecture", ["grid_transformer", "llama"])
@pytest.mark.parametrize(("guidance", "by_name", "scales", "rows"), [
    (3.0, None, [3.0, 3.0, 3.0], 2), (1.0, {"low": 3.0}, [1.0, 3.0, 1.0], 3), (2.0, {"low": 4.0, "text": 0.5}, [2.0, 4.0, 0.5], 4),
    (1.0, {"text": 2.5}, [1.0, 1.0, 2.5], 2), (1.0, None, [1.0, 1.0, 1.0], 1),
])
def test_guided_samples_are_those_of_full_forward_passes(architecture, guidance, by_name, scales, rows):
    prior, given, classes_B = perturbed(tiny_prior(architecture, FULL)), random_given(4), torch.tensor([0, 1, 1, 0])
    config = SamplingConfig(temperature=0, guidance_scale=guidance)
    drawn_BT = prior.sample(classes_B, config, [1, 2, 3, 4], given=given, segment_guidance=by_name)
    assert torch.equal(drawn_BT, greedy_reference(prior, classes_B, given, scales))
    used_rows = set()
    prior.model.register_forward_pre_hook(lambda model, arguments, keywords: used_rows.add(len(keywords["input_ids"])), with_kwargs=True)
    assert torch.equal(prior.sample(classes_B, config, [1, 2, 3, 4], given=given, segment_guidance=by_name), drawn_BT)
    assert used_rows == {4 * rows}, "levels that do not count are not computed"


def test_guidance_interval_with_several_segments():
    prior, given = perturbed(tiny_prior(vocabulary=FULL)), random_given(2)
    config = SamplingConfig(temperature=0, guidance_scale=5.0, guidance_interval=[0.0, 0.5])
    guided = prior.sample([0, 1], config, [1, 2], given=given)
    full = prior.sample([0, 1], dataclasses.replace(config, guidance_interval=[0.0, 1.0]), [1, 2], given=given)
    assert torch.equal(guided[:, :2], full[:, :2])
    with torch.no_grad():  # tokens 2 and 3 are the most likely ones without guidance
        assert torch.equal(prior(guided, torch.tensor([0, 1]), given).argmax(dim=-1)[:, 2:], guided[:, 2:])


def test_segments_dropped_from_all_samples_have_no_effect_on_guided_samples():
    vocabulary = dataclasses.replace(FULL, class_drop=1.0, conditions=[dataclasses.replace(LOW, drop_rate=1.0), TEXT])
    prior, given = perturbed(tiny_prior(vocabulary=vocabulary)), random_given(2)
    config, by_name = SamplingConfig(temperature=0, guidance_scale=1.5), {"text": 3.0}
    drawn_BT = prior.sample([0, 1], config, [1, 2], given=given, segment_guidance=by_name)
    assert torch.equal(prior.sample(None, config, [1, 2], given={"text": given["text"]}, segment_guidance=by_name), drawn_BT)
    assert torch.equal(greedy_reference(prior, torch.tensor([0, 1]), given, [1.5, 1.5, 3.0]), drawn_BT)


def test_segment_guidance_of_a_class_is_the_guidance_scale():
    prior = perturbed(tiny_prior(vocabulary=VOCABULARY))
    by_scale = prior.sample([0, 2], SamplingConfig(guidance_scale=3.0), [1, 2])
    assert torch.equal(prior.sample([0, 2], SamplingConfig(), [1, 2], segment_guidance={"class": 3.0}), by_scale)


# --- training batches --------------------------------------------------------------------------------------------------------


def write_tokens(folder: Path, split: str = "train") -> Path:
    """Write 600 samples with grids of two tokenizers. The ids of `low` are functions of the sample, those of `image` count up from it."""
    grids = [LOW.grid, dataclasses.replace(IMAGE, name="edges"), IMAGE]
    header = ShardSetHeader(split=split, token_fingerprint="f" * 64, grids=grids, views=[{"name": "original"}], class_names=["ant", "bee"],
                            dataset={"name": "made up"}, encoding={}, images_per_shard=300, num_sources=600)
    writer = TokenShardWriter(folder, header)
    for number in range(writer.num_shards):
        with writer.shard(number) as shard:
            for index in header.source_indices(number):
                image_VT = (index + np.arange(4))[None] % 6
                shard.add(index=index, key=default_key(index), source=str(index), label=index % 2,
                          ids={"low": np.array([[index % 5, index % 3]]), "edges": image_VT[:, ::-1], "image": image_VT})
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> TokenShardReader:
    return TokenShardReader(write_tokens(tmp_path_factory.mktemp("tokens")))


GIVEN_LOW = dataclasses.replace(FULL, conditions=[LOW])


def test_batches_hold_given_and_drawn_grids(reader):
    vocabulary = dataclasses.replace(GIVEN_LOW, conditions=[dataclasses.replace(LOW, drop_rate=0.0)])
    batch = TokenBatches(reader, vocabulary, 0, 0.0).batch(0, 50)
    assert batch.ids_BT.shape == (50, 4) and batch.given_BG.shape == (50, 2)
    assert torch.equal(batch.ids_BT, (batch.ids_BT[:, :1] + torch.arange(4)) % 6), "image, not edges"
    all_ids_BN = torch.from_numpy(reader.read(range(50)).ids_BT)
    assert torch.equal(batch.given_BG, all_ids_BN[:, :2]) and torch.equal(batch.inputs_BT, all_ids_BN[:, 6:])


def test_segments_are_dropped_independently_and_together(reader):
    vocabulary = dataclasses.replace(GIVEN_LOW, class_drop=0.3)
    batch = TokenBatches(reader, vocabulary, 0, 0.25).batch(0, 6000)
    no_class_B, no_low_B = batch.classes_B == NO_CLASS, (batch.given_BG == -1).any(1)
    assert torch.equal(no_low_B, (batch.given_BG == -1).all(1)), "a dropped segment holds its null id everywhere"
    both, neither = (no_class_B & no_low_B).float().mean(), (~no_class_B & ~no_low_B).float().mean()
    assert float(neither) == pytest.approx(0.75 * 0.7 * 0.8, abs=0.02) and float(both) == pytest.approx(0.25 + 0.75 * 0.3 * 0.2, abs=0.02)
    assert float((no_class_B & ~no_low_B).float().mean()) == pytest.approx(0.75 * 0.3 * 0.8, abs=0.02)


def test_drops_do_not_depend_on_ranks_and_leave_label_drop_unchanged(reader):
    batches = TokenBatches(reader, dataclasses.replace(GIVEN_LOW, class_drop=0.3), 0, 0.25)
    whole, parts = batches.batch(3, 60), [batches.batch(3, 60, rank, 2) for rank in range(2)]
    for field in whole._fields:
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
    class_only = TokenBatches(reader, dataclasses.replace(CLASS_ONLY, class_drop=0.0), 0, 0.25).batch(3, 60)
    dropped_together = TokenBatches(reader, GIVEN_LOW, 0, 0.25).batch(3, 60)
    assert torch.equal(class_only.classes_B, dropped_together.classes_B) and class_only.given_BG.shape == (60, 0)


@pytest.mark.parametrize(("vocabulary", "words"), [
    (dataclasses.replace(GIVEN_LOW, conditions=[GivenGrid(grid=dataclasses.replace(LOW.grid, token_fingerprint="b" * 64))]),
     "token fingerprint of grid 'low' of the tokens in .* is aaa.*, but the prior's vocabulary has bbb"),
    (dataclasses.replace(GIVEN_LOW, conditions=[GivenGrid(grid=dataclasses.replace(LOW.grid, width=3))]), "grids of the tokens"),
    (dataclasses.replace(GIVEN_LOW, conditions=[GivenGrid(grid=dataclasses.replace(LOW.grid, name="depth"))]), "grids of the tokens"),
    (FULL, "grids of the tokens in .* is .*, but the prior's vocabulary has .*name='text', codebook_size=8, height=1, width=3"),
])
def test_tokens_that_do_not_match_the_segments_are_refused(vocabulary, words, reader):
    with pytest.raises(InputError, match=words):
        TokenColumns(reader, vocabulary)


# --- validation --------------------------------------------------------------------------------------------------------------


def test_validation_reports_each_drawn_grid_and_the_null_ids(reader):
    vocabulary = Vocabulary(grids=[IMAGE, dataclasses.replace(IMAGE, name="edges")], class_names=["ant", "bee"], token_fingerprint="f" * 64,
                            label_drop=0.1, conditions=[LOW])
    prior = perturbed(tiny_prior(vocabulary=vocabulary))
    metrics = validate(prior, reader, 64, 100, Accelerator(cpu=True))
    assert metrics["nll"] == pytest.approx((metrics["nll_image"] + metrics["nll_edges"]) / 2, rel=1e-5)
    assert metrics["bits_per_image"] == pytest.approx(8 * metrics["nll"] / math.log(2), rel=1e-5)
    assert metrics["nll_without_given"] != pytest.approx(metrics["nll"], rel=1e-4) and "nll_without_class" not in metrics
    text = describe_metrics(metrics)
    assert f"(image {metrics['nll_image']:.4f}, edges {metrics['nll_edges']:.4f})" in text and "(without class and conditions " in text


def test_validation_tokens_of_other_grids_are_refused_before_training(tiny_run, tmp_path):
    """The validation tokens come from a tokenizer with another number of codes, but claim the same fingerprint."""
    shutil.copytree(tiny_run / "tokens/train", tmp_path / "tokens/train")
    train_manifest = TokenShardManifest.load(tmp_path / "tokens/train")
    header = dataclasses.replace(train_manifest.header, split="validation", grids=[dataclasses.replace(train_manifest.grids[0], codebook_size=8)],
                                 num_sources=10)
    writer = TokenShardWriter(tmp_path / "tokens/validation", header)
    with writer.shard(0) as shard:
        for index in header.source_indices(0):
            shard.add(index=index, key=default_key(index), source=str(index), label=0, ids={"image": np.full((1, 16), index % 8)})
    writer.finish()
    with pytest.raises(InputError, match=r"grids of the tokens in .*validation is .*codebook_size=8"):
        train(tiny_recipe(tmp_path / "run", prior_training__tokens=tmp_path / "tokens"))
    assert not (tmp_path / "run/prior").exists()


def test_prior_trains_on_grids_of_several_tokenizers(tmp_path):
    for split in ("train", "validation"):
        write_tokens(tmp_path / "tokens" / split, split)
    train(tiny_recipe(tmp_path / "run", prior_training__tokens=tmp_path / "tokens"))
    prior = TokenPrior.from_pretrained(tmp_path / "run/prior")
    assert prior.vocabulary.token_fingerprints == {"low": "a" * 64, "edges": "f" * 64, "image": "f" * 64} and not prior.vocabulary.conditions
    metrics = records(tmp_path / "run", "prior", "validation")[-1]
    assert metrics["nll"] == pytest.approx((2 * metrics["nll_low"] + 4 * metrics["nll_edges"] + 4 * metrics["nll_image"]) / 10, rel=1e-5)
    drawn_BT = prior.sample([0, 1], SamplingConfig(guidance_scale=1.5), [1, 2])
    assert drawn_BT.shape == (2, 10) and drawn_BT[:, :2].max() < 5 and drawn_BT[:, 2:].max() < 6
