"""Priors whose sequence has several segments: a class, given grids and texts, and one or several drawn grids."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines import ImageGenerationPipeline
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.image_files.images import ImageTransform
from stage2_prior.generation.logit_differences import largest_logit_difference
from stage2_prior.given_ids import start_ids
from stage2_prior.model.grid_ranges import generate_arguments
from stage2_prior.model.grid_transformer_config import token_coordinates
from stage2_prior.prior import TokenPrior
from stage2_prior.segments import GivenGrid, GivenText
from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from tests.tiny_priors import TWO_GRIDS, VOCABULARY, random_batch, tiny_prior
from token_shards import Grid
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

LOW = GivenGrid(grid=Grid(name="low", codebook_size=5, height=1, width=2, token_fingerprint="a" * 64), drop_rate=0.2)
TEXT = GivenText(text_ids=7, num_tokens=3, drop_rate=0.1)
IMAGE = Grid(name="image", codebook_size=6, height=2, width=2)
FULL = Vocabulary(grids=[IMAGE], class_names=["ant", "bee"], token_fingerprint="f" * 64, label_drop=0.1, conditions=[LOW, TEXT])
SUPER_RESOLUTION = Vocabulary(grids=[IMAGE], class_names=None, token_fingerprint="f" * 64, label_drop=0.1, conditions=[LOW])
ARCHITECTURES = ["grid_transformer", "llama"]


def random_given(size: int, vocabulary: Vocabulary = FULL, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids of all conditions."""
    rng = np.random.default_rng(seed)
    return {condition.name: torch.from_numpy(rng.integers(0, condition.num_ids, (size, condition.num_tokens))) for condition in vocabulary.conditions}


def perturbed(prior: TokenPrior) -> TokenPrior:
    """The prior in evaluation mode, with random values in the weights that are zero in a new one."""
    with torch.no_grad():
        for number, parameter in enumerate(prior.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    return prior.eval()


# --- vocabulary --------------------------------------------------------------------------------------------------------------


def test_layout_of_several_given_segments():
    layout = {segment.name: (segment.kind, segment.role, segment.ids, segment.places, segment.null_id) for segment in FULL.segments}
    assert layout == {"class": ("class", "given", range(6, 8), range(1), 21), "low": ("grid", "given", range(8, 13), range(1, 3), 22),
                      "text": ("text", "given", range(13, 21), range(3, 6), 23), "image": ("grid", "drawn", range(6), range(6, 10), None)}
    assert list(layout) == ["class", "low", "text", "image"]
    assert (FULL.size, FULL.null_id, FULL.num_given_tokens, FULL.num_tokens) == (24, 21, 6, 4)
    assert FULL.suppressed_ids == list(range(6, 24)) and FULL.position_ranges() == [(0, 6)] * 4


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_conversion_of_given_ids(kind):
    assert FULL.condition_ids(kind([0, 1, NO_CLASS])).tolist() == [6, 7, 21]
    assert FULL.condition_token_ids(kind([[0, 4, 0, 6, 7], [-1, -1, 2, -1, -1]])).tolist() == [[8, 12, 13, 19, 20], [22, 22, 15, 23, 23]]


def test_fingerprints_of_several_tokenizers():
    assert FULL.token_fingerprints == {"low": "a" * 64, "image": "f" * 64}
    own = dataclasses.replace(IMAGE, token_fingerprint="f" * 64)
    assert dataclasses.replace(FULL, grids=[own]) == FULL, "naming the vocabulary's own tokenizer makes no difference"


@pytest.mark.parametrize("vocabulary", [FULL, SUPER_RESOLUTION, VOCABULARY, TWO_GRIDS, dataclasses.replace(FULL, class_drop=0.3)])
def test_saving_and_loading(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary
    content = json.loads((tmp_path / "vocabulary.json").read_text())
    assert content["schema_version"] == 2 and [segment["name"] for segment in content["segments"]] == [each.name for each in vocabulary.segments]


def test_schema_1_is_the_layout_with_one_given_segment(tmp_path):
    grid = {"name": "image", "codebook_size": 48, "height": 3, "width": 3, "depth": 1}
    content = {"grids": [grid], "class_names": ["ant", "bee", "cat"], "token_fingerprint": "f" * 64, "label_drop": 0.1, "schema_version": 1}
    (tmp_path / "vocabulary.json").write_text(json.dumps(content))
    vocabulary = Vocabulary.load(tmp_path)
    assert vocabulary == VOCABULARY
    assert [(each.name, each.ids, each.places, each.null_id) for each in vocabulary.segments] == [
        ("class", range(48, 51), range(1), 51), ("image", range(48), range(1, 10), None)]


def edit_segment(number: int, **changes):
    def edit(content: dict) -> None:
        content["segments"][number] |= changes
    return edit


@pytest.mark.parametrize(("edit", "words"), [
    (edit_segment(1, ids=[9, 14]), r"segments\[1\] has ids \[9, 14\]; with this order of the segments, it must be \[8, 13\]"),
    (edit_segment(3, places=[0, 4]), r"segments\[3\] has places"),
    (edit_segment(0, null_id=3), r"segments\[0\] has null_id 3"),
    (edit_segment(1, role="asked"), r"segments\[1\]: role is 'asked'; allowed: given, drawn"),
    (lambda content: content["segments"].insert(1, content["segments"][0]), r"segments\[1\] is a given class; allowed: the class first"),
    (edit_segment(2, role="drawn"), r"segments\[2\] is a drawn text"),
    (edit_segment(1, drop_rate=2), r"drop_rate of the segment 'low' is 2"),
    (edit_segment(2, places=5), "places is 5; it must be two integers"),
    (edit_segment(2, colour="red"), r"segments\[2\] has unknown fields: colour"),
    (lambda content: content["segments"].reverse(), r"segments\[0\] is a drawn grid"),
    (lambda content: content["segments"].pop(), "no grids that are drawn"),
    (lambda content: content.update(segments=[]), "segments is empty"),
    (lambda content: content.update(segments="none"), "must be a list of objects"),
    (lambda content: content.update(class_names=["ant"]), r"segments\[0\] has ids \[6, 8\]"),
])
def test_edited_segments_are_refused(edit, words, tmp_path):
    FULL.save(tmp_path)
    path = tmp_path / "vocabulary.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=words) as caught:
        Vocabulary.load(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("conditions", [[LOW, LOW], [GivenGrid(grid=IMAGE)], [GivenText(name="class", text_ids=1, num_tokens=1)]])
def test_names_must_be_unique(conditions):
    with pytest.raises(InputError, match="is there twice, but names must be unique"):
        dataclasses.replace(FULL, conditions=conditions)


def test_levels_that_are_trained():
    assert [FULL.is_trained(level) for level in range(4)] == [True, True, True, True]
    without_rates = dataclasses.replace(FULL, conditions=[dataclasses.replace(LOW, drop_rate=0.0), TEXT])
    assert [without_rates.is_trained(level) for level in range(4)] == [True, False, True, True], "low alone is never dropped"
    never_without_class = dataclasses.replace(FULL, label_drop=0.0)
    assert [never_without_class.is_trained(level) for level in range(4)] == [False, True, True, True]
    assert dataclasses.replace(FULL, label_drop=0.0, class_drop=0.1).is_trained(0)


# --- the model ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conditions_affect_all_logits_and_missing_ones_hold_their_null_id(architecture):
    prior, given = perturbed(tiny_prior(architecture, FULL)), random_given(3)
    ids_BT, classes_B = random_batch(FULL, 3)
    with torch.no_grad():
        logits_BTK = prior(ids_BT, classes_B, given)
        assert logits_BTK.shape == (3, 4, 6)
        for name in given:
            other = given | {name: (given[name] + 1) % 5}
            assert ((prior(ids_BT, classes_B, other) - logits_BTK).abs().amax(-1) > 1e-5).all()
            dropped = given | {name: torch.full_like(given[name], -1)}
            left_out = {key: ids for key, ids in given.items() if key != name}
            assert torch.equal(prior(ids_BT, classes_B, dropped), prior(ids_BT, classes_B, left_out))
        joined_BG = torch.cat([given["low"], given["text"]], dim=1)
        assert torch.equal(prior(ids_BT, classes_B, joined_BG), logits_BTK)
        shaped = given | {"low": given["low"].view(3, 1, 2)}
        assert torch.equal(prior(ids_BT, classes_B, shaped), logits_BTK)


@pytest.mark.parametrize(("given", "words"), [
    ({"depth": torch.zeros(2, 2)}, "given has depth; the conditions of the prior are: low, text"),
    ({"low": torch.zeros(2, 3, dtype=torch.int64)}, r"'low'\] has the shape \(2, 3\); allowed for each image: \(2,\) or \(1, 2, 1\) or \(1, 2\)"),
    (torch.zeros(2, 3, dtype=torch.int64), r"the shape \(2, 3\); the prior has conditions of 5 tokens per image"),
])
def test_conditions_of_the_wrong_shape_are_refused(given, words):
    with pytest.raises(InputError, match=words):
        tiny_prior(vocabulary=FULL)(*random_batch(FULL, 2), given)


def test_loss_covers_only_drawn_tokens():
    prior, given = perturbed(tiny_prior(vocabulary=FULL)), random_given(5)
    ids_BT, classes_B = random_batch(FULL, 5)
    with torch.no_grad():
        logits_BTK = prior(ids_BT, classes_B, given)
        expected = -logits_BTK.log_softmax(-1).gather(2, ids_BT[..., None]).mean()
        torch.testing.assert_close(prior.loss(ids_BT, classes_B, given), expected)


def test_coordinates_of_given_segments():
    model = tiny_prior("grid_transformer", FULL).model
    assert model.config.given == [[1, 2, 1], [3]] and model.config.max_position_embeddings == 10
    expected = [[0.5, 0.0], [0.5, 1.0], [-2, 0], [-2, 1], [-2, 2], [0, 0], [0, 1], [1, 0], [1, 1]]
    assert token_coordinates([*model.config.given, *model.config.grids]).tolist() == expected
    larger_is_given = token_coordinates([[4, 4, 1], [2, 2, 1]]).tolist()
    assert larger_is_given[:2] == [[0, 0], [0, 1]] and larger_is_given[16:] == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_prior_with_conditions_gives_the_same_logits(architecture, tmp_path):
    prior, given, batch = perturbed(tiny_prior(architecture, FULL)), random_given(2), random_batch(FULL, 2)
    prior.save_pretrained(tmp_path)
    loaded = TokenPrior.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(*batch, given), prior(*batch, given)) and loaded.vocabulary == FULL


def test_configuration_without_conditions_has_no_new_field(tmp_path):
    tiny_prior("grid_transformer").save_pretrained(tmp_path)
    assert "given" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prior_learns_an_image_from_its_low_resolution(architecture):
    """Each place of the image is a function of the code of the low resolution above it."""
    prior = tiny_prior(architecture, SUPER_RESOLUTION, dropout=0.0)
    low_BN = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    ids_BT = torch.stack([low_BN[:, 0], low_BN[:, 1] + 1, 5 - low_BN[:, 0], (low_BN[:, 1] + 3) % 6], dim=1)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = prior.loss(ids_BT, given={"low": low_BN})
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    drawn_BT = prior.sample(None, SamplingConfig(temperature=0), list(range(25)), given={"low": low_BN})
    assert torch.equal(drawn_BT, ids_BT)


# --- sampling ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2"])
def test_logits_of_sampling_are_those_of_a_forward_pass(architecture):
    prior, given = perturbed(tiny_prior(architecture, FULL)), random_given(3)
    ids_BT, _ = random_batch(FULL, 3)
    assert largest_logit_difference(prior, prior, ids_BT, [0, 1, NO_CLASS], given) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_does_not_depend_on_other_images(architecture):
    prior, given = perturbed(tiny_prior(architecture, FULL)), random_given(4)
    together_BT = prior.sample([0, 1, 0, 1], SamplingConfig(guidance_scale=2.0), [1, 2, 3, 4], given=given)
    alone_1T = prior.sample([0], SamplingConfig(guidance_scale=2.0), [3], given={name: ids[2:3] for name, ids in given.items()})
    assert torch.equal(together_BT[2:3], alone_1T)


@pytest.mark.parametrize(("given", "classes", "words"), [
    ({"low": torch.tensor([[0, 5]])}, [0], "ids from 0 to 5; allowed: 0 to 4, and -1"),
    ({"low": torch.tensor([[0, 4], [0, 4]])}, [0], "2 rows, but there are 1 images"),
    ({}, [0], "given has no 'low', but the prior was trained with drop_rate 0"),
])
def test_invalid_given_ids_are_refused(given, classes, words):
    vocabulary = dataclasses.replace(FULL, conditions=[dataclasses.replace(LOW, drop_rate=0.0)])
    with pytest.raises(InputError, match=words):
        tiny_prior(vocabulary=vocabulary).sample(classes, SamplingConfig(), [1], given=given)


def test_all_given_segments_can_be_left_out_together():
    vocabulary = dataclasses.replace(FULL, conditions=[dataclasses.replace(LOW, drop_rate=0.0)])
    assert tiny_prior(vocabulary=vocabulary).sample(None, SamplingConfig(), [1, 2]).shape == (2, 4)


# --- transformers' generate --------------------------------------------------------------------------------------------------

THREE_GRIDS = Vocabulary(grids=[*TWO_GRIDS.grids, IMAGE], class_names=["ant", "bee"], token_fingerprint="f" * 64, conditions=[LOW])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_draws_codes_of_each_positions_grid(architecture, tmp_path):
    perturbed(tiny_prior(architecture, THREE_GRIDS)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    start_BP = start_ids(THREE_GRIDS, torch.tensor([0, 1, -1] * 10), random_given(30, THREE_GRIDS), torch.zeros(30, 1, dtype=torch.int64))
    torch.manual_seed(0)
    for settings in ({}, {"num_beams": 2, "do_sample": False}, {"use_cache": False}):
        drawn = model.generate(start_BP, **generate_arguments(THREE_GRIDS), **settings)[:, start_BP.shape[1]:]
        assert drawn.shape == (30, THREE_GRIDS.num_tokens)
        for position, (start, stop) in enumerate(THREE_GRIDS.position_ranges()):
            assert drawn[:, position].min() >= start and drawn[:, position].max() < stop


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_without_the_processor_is_refused_for_several_grids(architecture, tmp_path):
    tiny_prior(architecture, TWO_GRIDS).save_pretrained(tmp_path)
    model, class_token = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[TWO_GRIDS.null_id]])
    with pytest.raises(ValueError, match=r"generate_arguments|`max_length` is set to 1"):
        model.generate(class_token)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_with_one_drawn_grid_and_conditions(architecture):
    prior = perturbed(tiny_prior(architecture, FULL))
    start_BP = start_ids(FULL, torch.tensor([0, 1]), random_given(2), torch.zeros(2, 1, dtype=torch.int64))
    drawn = prior.model.generate(start_BP)
    assert drawn.shape == (2, 10) and drawn[:, 6:].max() < 6


# --- pipelines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "words"), [(FULL, "besides the class, but there is no tokenizer for low, text"),
                                                   (TWO_GRIDS, "the tokenizer has the grids 2 x 2 of 6 codes, but the prior predicts coarse")])
def test_pipelines_refuse_priors_that_they_cannot_decode(vocabulary, words):
    sizes = {"codebook_size": 6, "code_dim": 4, "latent_channels": 16, "channels": 32, "channel_multipliers": [1, 1, 1, 1], "residual_blocks": 0}
    tokenizer = ImageTokenizer(TokenizerConfig(**sizes), ImageTransform(image_size=16, channels=1))
    tokenizer.token_fingerprint = vocabulary.token_fingerprint
    with pytest.raises(InputError, match=words):
        ImageGenerationPipeline(tokenizer, tiny_prior(vocabulary=vocabulary))
