"""Training of priors with conditions from token shards: the vocabulary of a recipe, drop rates, texts, given and drawn grids, any order."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.command_line import dispatch
from pipelines.stages.stage_checks import check_before_start
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.overfit import overfit
from stage2_prior.prior import TokenPrior
from stage2_prior.recipe_vocabulary import describe_given, vocabulary_of_recipe
from stage2_prior.segments import GivenGrid, GivenText
from stage2_prior.token_batches import TokenBatches
from stage2_prior.token_columns import TokenColumns
from stage2_prior.train import train
from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from tests.conditioned import TEXT_LENGTH, write_shards
from tests.run_files import records
from tests.tiny import tiny_recipe
from tests.tiny_priors import tiny_prior
from token_shards import Grid, TokenShardManifest, TokenShardReader
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig
from vqmosaic.training.training_run import TrainingRun

IMAGE = Grid("image", 6, 2, 2)
LOW = Grid("low", 5, 1, 2, token_fingerprint="a" * 64)
TEXT = Grid("text", 257, 1, TEXT_LENGTH, token_fingerprint="text:bytes")
RECORDS = [{"name": "low", "kind": "low_resolution", "factor": 2}, {"name": "text", "kind": "caption", "length": TEXT_LENGTH}]
IMAGES = 200


def made_up_ids(images: int = IMAGES) -> dict[str, np.ndarray]:
    """Each image is a function of its low resolution. The text has one byte and padding."""
    rng = np.random.default_rng(0)
    low_N2 = rng.integers(0, 5, (images, 2))
    image_N4 = np.stack([low_N2[:, 0], low_N2[:, 1] + 1, 5 - low_N2[:, 0], (low_N2[:, 1] + 3) % 6], axis=1)
    text_NT = np.full((images, TEXT_LENGTH), 256)
    text_NT[:, 0] = 65 + low_N2[:, 0]
    return {"image": image_N4, "low": low_N2, "text": text_NT}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    labels = np.arange(IMAGES) % 2
    return write_shards(tmp_path_factory.mktemp("tokens"), [IMAGE, LOW, TEXT], made_up_ids(), RECORDS, labels)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("unlabelled"), [IMAGE, LOW], {name: ids for name, ids in made_up_ids().items() if name != "text"},
                        RECORDS[:1])


def recipe_for(tokens: Path, run: Path, **changes: object):
    return tiny_recipe(run, **{"prior_training__tokens": tokens, "prior__architecture": "grid_transformer", "prior__layers": 2,
                               "sampling__guidance_scale": 1.0, **changes})


def vocabulary_for(tokens: Path, run: Path, **changes: object) -> Vocabulary:
    return vocabulary_of_recipe(recipe_for(tokens, run, **changes), TokenShardManifest.load(tokens / "train"))


# --- the vocabulary of a recipe ------------------------------------------------------------------------------------------------


def test_conditions_of_the_shards_are_given_by_default(tokens, tmp_path):
    vocabulary = vocabulary_for(tokens, tmp_path, prior_training__drop_rates="{low: 0.25, class: 0.125}")
    assert vocabulary.grids == [IMAGE] and vocabulary.label_drop == 0.1 and vocabulary.class_drop == 0.125
    assert vocabulary.conditions == (GivenGrid(grid=LOW, drop_rate=0.25),
                                     GivenText(name="text", text_ids=256, num_tokens=TEXT_LENGTH, token_fingerprint="text:bytes"))
    assert vocabulary.token_fingerprints == {"low": "a" * 64, "text": "text:bytes", "image": "f" * 64}
    assert describe_given(vocabulary) == f"low (1 x 2 of 5 codes, dropped in 25%), text ({TEXT_LENGTH} places of 257 ids)"


def test_given_and_drawn_select_segments(tokens, tmp_path):
    chosen = vocabulary_for(tokens, tmp_path, prior_training__given="[low]")
    assert [condition.name for condition in chosen.conditions] == ["low"] and chosen.grids == [IMAGE]
    swapped = vocabulary_for(tokens, tmp_path, prior_training__given="[image]", prior_training__drawn="[low]")
    assert [condition.name for condition in swapped.conditions] == ["image"] and [grid.name for grid in swapped.grids] == ["low"]
    drawn = vocabulary_for(tokens, tmp_path, prior_training__drawn="[low]")
    assert [condition.name for condition in drawn.conditions] == ["text"], "a condition that is drawn is not given"


def test_drop_rates_of_data_conditions_and_label_drop_of_unlabelled_data(unlabelled, tmp_path):
    low = "[{name: low, kind: low_resolution, factor: 2, drop_rate: 0.5}]"
    vocabulary = vocabulary_for(unlabelled, tmp_path, data__conditions=low)
    assert vocabulary.conditions[0].drop_rate == 0.5 and vocabulary.label_drop == 0.1 and vocabulary.class_names is None
    assert vocabulary.why_unguided() is None
    overridden = vocabulary_for(unlabelled, tmp_path, data__conditions=low, prior_training__drop_rates="{low: 0.25}")
    assert overridden.conditions[0].drop_rate == 0.25


def test_with_label_drop_1_no_segment_is_learned(tokens, tmp_path):
    vocabulary = vocabulary_for(tokens, tmp_path, prior_training__label_drop=1, prior_training__drop_rates="{low: 0.25}")
    assert [segment.drop_rate for segment in vocabulary.given_segments] == [1, 1, 1] and not vocabulary.learned_segments
    chain = ChainVocabulary([vocabulary])
    assert chain.learned_class_names is None and not chain.learned_conditions and chain.why_not_sampled(False, []) is None


@pytest.mark.parametrize(("changes", "words"), [
    ({"prior_training__given": "[depth]"}, "prior_training.given has depth; allowed for these tokens: image, low, text"),
    ({"prior_training__drawn": "[text]"}, "prior_training.drawn has text; allowed for these tokens: image, low"),
    ({"prior_training__given": "[image]"}, "has nothing to draw|prior_training.drawn"),
    ({"prior_training__drop_rates": "{edges: 0.1}"}, "prior_training.drop_rates has edges; allowed for these tokens: class, low, text"),
])
def test_names_that_the_tokens_do_not_have_are_refused(changes, words, tokens, tmp_path):
    with pytest.raises(InputError, match=words):
        vocabulary_for(tokens, tmp_path, **changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"prior_training__given": "[low]", "prior_training__drawn": "[low]"}, "both have low; a grid is either given or drawn"),
    ({"prior_training__drawn": "[]"}, "prior_training.drawn is empty"),
    ({"prior_training__given": "[low, low]"}, "each name may be there only once"),
    ({"prior_training__drop_rates": "{low: 1.5}"}, "prior_training.drop_rates.low is 1.5; it must be at least 0 and at most 1"),
    ({"prior_training__drop_rates": "{low: much}"}, "must be a number|number"),
    ({"sampling__guidance": "{low: -1}"}, "sampling.guidance.low is -1.0; it must be at least 0"),
])
def test_fields_of_recipes_are_checked(changes, words, tokens, tmp_path):
    with pytest.raises(InputError, match=words):
        recipe_for(tokens, tmp_path, **changes)


def test_guidance_of_unknown_segments_is_refused_by_the_recipe(tmp_path):
    with pytest.raises(InputError, match=r"sampling\.guidance has depth; the given segments of this recipe are: class"):
        tiny_recipe(tmp_path, sampling__guidance="{depth: 2}")
    assert "guidance" not in tiny_recipe(tmp_path).sampling.to_dict()
    assert tiny_recipe(tmp_path, sampling__guidance="{class: 2}").sampling.to_dict()["guidance"] == {"class": 2.0}


def test_guidance_that_is_not_learned_is_refused_before_training(tokens, tmp_path):
    with pytest.raises(InputError, match=r"needs a prior that was trained without text but with low.*prior_training\.drop_rates"):
        check_before_start(recipe_for(tokens, tmp_path / "run", sampling__guidance="{low: 2, class: 2}"), "prior")
    learns_it = {"sampling__guidance": "{low: 2, class: 2}", "prior_training__drop_rates": "{text: 0.1}"}
    check_before_start(recipe_for(tokens, tmp_path / "run", **learns_it), "prior")
    with pytest.raises(InputError, match=r"sampling\.steps is 5, but an image in .* has 4 tokens"):
        check_before_start(recipe_for(tokens, tmp_path / "run", sampling__steps=5, prior_training__order="annealed"), "prior")


# --- batches and training --------------------------------------------------------------------------------------------------------


def test_batches_have_texts_and_drop_them(tokens, tmp_path):
    vocabulary = vocabulary_for(tokens, tmp_path, prior_training__drop_rates="{text: 0.5}")
    batch = TokenBatches(TokenShardReader(tokens / "train"), vocabulary, 0, 0.0).batch(0, 400)
    text_BT = batch.given_BG[:, 2:]
    dropped_B = (text_BT == -1).any(1)
    assert torch.equal(dropped_B, (text_BT == -1).all(1)) and 0.4 < dropped_B.float().mean() < 0.6
    assert torch.equal(text_BT[~dropped_B, 0], 65 + batch.given_BG[~dropped_B, 0]) and (text_BT[~dropped_B, 1:] == 256).all()
    assert (batch.given_BG[:, :2] >= 0).all() and (batch.classes_B >= 0).all()


def test_shards_with_another_text_tokenizer_are_refused(tokens, tmp_path):
    vocabulary = vocabulary_for(tokens, tmp_path)
    other = dataclasses.replace(vocabulary, conditions=[vocabulary.conditions[0],
                                                        dataclasses.replace(vocabulary.conditions[1], token_fingerprint="text:" + "b" * 64)])
    with pytest.raises(InputError, match=r"token fingerprint of grid 'text' of the tokens in .* is text:bytes"):
        TokenColumns(TokenShardReader(tokens / "train"), other)
    other.save(tmp_path)
    assert Vocabulary.load(tmp_path) == other


def learned(vocabulary: Vocabulary, tokens: Path, steps: int = 150, **fields: object) -> TokenPrior:
    """A prior that is trained on the batches of token shards."""
    order = fields.pop("any_order", False)
    prior = TokenPrior.from_config(PriorConfig(**{"architecture": "grid_transformer", "width": 32, "layers": 2, "heads": 2, "dropout": 0.0} | fields),
                                   vocabulary, 0, order)
    batches = TokenBatches(TokenShardReader(tokens / "train"), vocabulary, 0, vocabulary.label_drop)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    for step in range(steps):
        ids_BT, classes_B, _, given_BG, orders_BT = batches.batch(step, 64, random_share=1.0 if order else 0.0)
        optimizer.zero_grad()
        prior.loss(ids_BT, classes_B, given_BG, orders_BT if order else None).backward()
        optimizer.step()
    return prior.eval()


def test_a_prior_learns_to_copy_a_given_grid(tmp_path):
    rng = np.random.default_rng(0)
    copied = rng.integers(0, 6, (IMAGES, 4))
    own = Grid("source", 6, 2, 2, token_fingerprint="a" * 64)
    tokens = write_shards(tmp_path / "tokens", [IMAGE, own], {"image": copied, "source": copied}, [{"name": "source", "kind": "paired_folder"}])
    prior = learned(vocabulary_for(tokens, tmp_path), tokens, 250)
    new_Bn = torch.from_numpy(rng.integers(0, 6, (20, 4)))
    drawn_BT = prior.sample(None, SamplingConfig(temperature=0), list(range(20)), given={"source": new_Bn})
    assert (drawn_BT == new_Bn).float().mean() > 0.95, "ids that were not in the training data are copied too"


def test_null_ids_give_unconditional_samples_and_guidance_favours_the_condition(unlabelled, tmp_path):
    prior = learned(vocabulary_for(unlabelled, tmp_path, prior_training__label_drop=0.3), unlabelled)
    low = torch.tensor([[0, 0]]).repeat(40, 1)
    given = prior.sample(None, SamplingConfig(), list(range(40)), given={"low": low})
    nothing = prior.sample(None, SamplingConfig(), list(range(40)))
    expected = torch.tensor([0, 1, 5, 3])
    assert (given == expected).float().mean() > 0.9 and (nothing == expected).float().mean() < 0.5
    guided = prior.sample(None, SamplingConfig(guidance={"low": 3.0}), list(range(40)), given={"low": low})
    assert torch.equal(guided, prior.sample(None, SamplingConfig(guidance_scale=3.0), list(range(40)), given={"low": low}))
    assert (guided == expected).float().mean() >= (given == expected).float().mean()


def test_masked_super_resolution_in_any_order(tmp_path):
    """The images depend on their low resolution and on one more bit, which a token outside of the mask shows."""
    low_N2 = torch.cartesian_prod(torch.arange(5), torch.arange(5)).repeat(2, 1)
    bit_N = torch.arange(50) // 25
    image_N4 = torch.stack([low_N2[:, 0] + bit_N, torch.where(bit_N == 1, 5 - low_N2[:, 1], low_N2[:, 1]), 5 * bit_N, low_N2[:, 1] + bit_N], dim=1)
    tokens = write_shards(tmp_path / "tokens", [IMAGE, LOW], {"image": image_N4.numpy(), "low": low_N2.numpy()}, RECORDS[:1])
    prior = learned(vocabulary_for(tokens, tmp_path), tokens, 300, any_order=True, layers=3)
    settings, seeds = SamplingConfig(temperature=0, order="random", steps=2), list(range(50))
    known_BT = torch.full((50, 4), -1)
    known_BT[:, 2] = image_N4[:, 2]
    drawn_BT = prior.sample(None, settings, seeds, given={"low": low_N2}, known_BT=known_BT)
    assert torch.equal(drawn_BT[:, 2], image_N4[:, 2]) and (drawn_BT == image_N4).float().mean() > 0.95
    for given, known in (({"low": low_N2}, known_BT.roll(25, dims=0)), ({"low": low_N2.roll(1, dims=0)}, known_BT)):
        other_BT = prior.sample(None, settings, seeds, given=given, known_BT=known)
        assert (other_BT == image_N4)[:, [0, 1, 3]].float().mean() < 0.7, "both the low resolution and the known token count"


@pytest.mark.parametrize("architecture", ["grid_transformer", "llama"])
def test_training_with_conditions_reports_both_losses_and_resumes_exactly(architecture, tokens, tmp_path, capsys, monkeypatch):
    optimizer_step = TrainingRun.optimizer_step

    def fails_in_step_4(run, *arguments):
        if run.state.step == 4:
            raise ConnectionError
        return optimizer_step(run, *arguments)

    changes = {"prior__architecture": architecture, "prior_training__drop_rates": "{low: 0.1, text: 0.1}"}
    whole = recipe_for(tokens, tmp_path / "whole", **changes)
    train(whole)
    plan = capsys.readouterr().out
    assert "given" in plan and "low (1 x 2 of 5 codes, dropped in 10%), text (6 places of 257 ids, dropped in 10%)" in plan
    metrics = records(tmp_path / "whole", "prior", "validation")[-1]
    assert {"nll", "nll_without_given", "accuracy_without_given"} <= metrics.keys()
    prior = TokenPrior.from_pretrained(tmp_path / "whole/prior")
    assert [segment.name for segment in prior.vocabulary.segments] == ["class", "low", "text", "image"]
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(TrainingRun, "optimizer_step", fails_in_step_4)
        train(recipe_for(tokens, tmp_path / "parts", **changes))
    train(recipe_for(tokens, tmp_path / "parts", **changes))
    assert "resumed at step 4" in capsys.readouterr().out
    for name in ("prior/model.safetensors", "checkpoints/prior/step-00000006/model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for kind in ("train", "validation"):
        whole_records, parts_records = ([{**record, "seconds": 0} for record in records(tmp_path / run, "prior", kind)] for run in ("whole", "parts"))
        assert parts_records == whole_records
    with pytest.raises(InputError, match=r"prior_training\.drop_rates"):
        train(recipe_for(tokens, tmp_path / "whole", **changes | {"prior_training__drop_rates": "{low: 0.2}"}))


def test_overfit_test_memorizes_images_and_their_conditions(tokens, tmp_path, capsys):
    recipe = recipe_for(tokens, tmp_path, prior_training__drop_rates="{low: 0.5}", prior_training__learning_rate=1e-2)
    assert overfit(recipe, 4) == 0
    assert "0.000 are irreducible: the choice among the images of equal conditions" in capsys.readouterr().out


def test_training_needs_the_same_conditions_in_both_splits(tokens, unlabelled, tmp_path):
    mixed = tmp_path / "tokens"
    shutil.copytree(tokens / "train", mixed / "train")
    shutil.copytree(unlabelled / "validation", mixed / "validation")
    with pytest.raises(InputError, match=r"class_names of the tokens|grids of the tokens"):
        train(recipe_for(mixed, tmp_path / "run"))


def test_command_line_options_for_segments(tokens, tmp_path):
    run = tmp_path / "run"
    recipe = recipe_for(tokens, run)
    from vqmosaic.recipes.recipe_files import load_recipe, save_recipe

    run.mkdir()
    save_recipe(recipe, run / "recipe.yaml")
    assert not re.search(r"drop_rates|given|drawn|^  guidance:", (run / "recipe.yaml").read_text(), re.M), "files omit empty fields"
    changed = load_recipe(str(run), ["--prior_training.drop_rates.low=0.2", "--prior_training.given=[low]", "--sampling.guidance.low=2"])
    assert changed.prior_training.drop_rates == {"low": 0.2} and changed.prior_training.given == ["low"] and changed.sampling.guidance == {"low": 2.0}
    save_recipe(changed, run / "recipe.yaml")
    assert load_recipe(str(run)) == changed
    assert dispatch(["train-prior", str(run), "--overfit", "2", "--prior_training.learning_rate", "0.01"]) == 0


def test_class_is_dropped_alone(tokens, tmp_path):
    vocabulary = vocabulary_for(tokens, tmp_path, prior_training__drop_rates="{class: 0.5}")
    batch = TokenBatches(TokenShardReader(tokens / "train"), vocabulary, 0, 0.0).batch(0, 200)
    assert 0.35 < float((batch.classes_B == NO_CLASS).float().mean()) < 0.65 and (batch.given_BG >= 0).all()
    assert tiny_prior("grid_transformer", vocabulary).sample(None, SamplingConfig(), [1], given={
        "low": torch.tensor([[1, 2]]), "text": torch.full((1, TEXT_LENGTH), 256)}).shape == (1, 4)
