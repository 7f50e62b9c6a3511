"""Orders of tokens in training: the share of images in random order, several drawn grids, and a grid that is not square."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stage2_prior.generation.drawing_order import drawing_orders
from stage2_prior.prior import TokenPrior
from stage2_prior.token_batches import TokenBatches, random_orders, random_share, validation_samples
from stage2_prior.train import train
from stage2_prior.vocabulary import Vocabulary
from tests.conditioned import write_shards
from tests.run_files import records
from tests.test_condition_training import learned, recipe_for
from token_shards import Grid, TokenShardReader
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import hashes

WIDE, TOP = Grid("image", 6, 2, 4), Grid("top", 5, 1, 2)
IMAGES = 400


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Tokens of a wide grid, in which the tokens of a row are equal and rows are independent, and of a small grid."""
    rng = np.random.default_rng(0)
    ids = {"top": rng.integers(0, 5, (IMAGES, 2)), "image": rng.integers(0, 6, (IMAGES, 2)).repeat(4, axis=1)}
    return write_shards(tmp_path_factory.mktemp("tokens"), [TOP, WIDE], ids, labels=[number % 2 for number in range(IMAGES)])


def vocabulary_of(*grids: Grid) -> Vocabulary:
    return Vocabulary(grids=list(grids), class_names=["ant", "bee"], token_fingerprint="f" * 64, label_drop=0.1)


def batches_of(tokens: Path, *grids: Grid, seed: int = 0) -> TokenBatches:
    return TokenBatches(TokenShardReader(tokens / "train", seed), vocabulary_of(*grids), seed, 0.1)


def is_random(orders_BT: torch.Tensor) -> torch.Tensor:
    return (orders_BT != torch.arange(orders_BT.shape[1])).any(dim=1)


def test_a_share_of_the_images_is_in_random_order(tokens):
    batches = batches_of(tokens, WIDE)
    orders_BT = batches.batch(0, IMAGES, random_share=0.3).orders_BT
    assert 0.22 < is_random(orders_BT).float().mean() < 0.38
    assert torch.equal(orders_BT.sort(dim=1).values, torch.arange(8).expand(IMAGES, -1))
    assert len(orders_BT.unique(dim=0)) > 0.9 * is_random(orders_BT).sum(), "each image has an order of its own"
    all_random_BT = batches.batch(0, IMAGES, random_share=1.0).orders_BT
    assert is_random(all_random_BT).all() and torch.equal(all_random_BT[is_random(orders_BT)], orders_BT[is_random(orders_BT)])
    assert not is_random(batches.batch(0, IMAGES, random_share=0.0).orders_BT).any()


def test_the_order_of_an_image_depends_on_seed_and_epoch_but_not_on_rank_or_batch(tokens):
    batches = batches_of(tokens, WIDE)
    whole_BT = batches.batch(0, 200, random_share=0.3).orders_BT
    for parts in ([batches.batch(0, 200, rank, 2, random_share=0.3) for rank in range(2)],
                  [batches.batch(step, 50, random_share=0.3) for step in range(4)]):
        assert torch.equal(torch.cat([part.orders_BT for part in parts]), whole_BT)
    samples, epochs = np.arange(200), np.zeros(200, dtype=np.int64)
    orders_BT = batches.orders(epochs, samples, 0.3)
    for other_BT in (batches_of(tokens, WIDE, seed=1).orders(epochs, samples, 0.3), batches.orders(epochs + 1, samples, 0.3)):
        both_random_B = (orders_BT != np.arange(8)).any(axis=1) & (other_BT != np.arange(8)).any(axis=1)
        assert 5 < both_random_B.sum() < 40, "0.3 * 0.3 of the images"
        assert (orders_BT[both_random_B] != other_BT[both_random_B]).any(axis=1).all()


def test_training_follows_the_annealed_share(tokens, tmp_path, monkeypatch):
    batches_used, orders_used = {}, []
    batch, forward = TokenBatches.batch, TokenPrior.forward

    def recorded_batch(self, step, batch_size, rank, world_size, share):
        batches_used[step] = share, batch(self, step, batch_size, rank, world_size, share)
        return batches_used[step][1]

    def recorded_forward(self, ids_BT, classes_B, given, orders_BT):
        if self.training:
            orders_used.append(orders_BT)
        return forward(self, ids_BT, classes_B, given, orders_BT)

    monkeypatch.setattr(TokenBatches, "batch", recorded_batch)
    monkeypatch.setattr(TokenPrior, "forward", recorded_forward)
    recipe = recipe_for(tokens, tmp_path / "run", prior_training__drawn="[image]", prior_training__order="annealed",
                        prior_training__order_annealing=[0.2, 0.8], prior_training__final_random_share=0.25, prior_training__batch_size=64)
    train(recipe)
    assert [batches_used[step][0] for step in range(6)] == [random_share(recipe.prior_training, step / 6) for step in range(6)]
    assert [share for share, _ in batches_used.values()] == pytest.approx([1, 1, 5 / 6, 0.625, 5 / 12, 0.25], abs=1e-9)
    for (_, used), orders_BT in zip(batches_used.values(), orders_used[-6:], strict=True):  # the trial steps come first
        assert torch.equal(orders_BT, used.orders_BT)
    shares = [float(is_random(orders_BT).float().mean()) for orders_BT in orders_used[-6:]]
    assert shares[0] == shares[1] == 1 and shares[5] < 0.5


def test_a_prior_for_any_order_learns_a_wide_grid(tokens):
    """The first token of a row determines the others."""
    prior = learned(vocabulary_of(WIDE), tokens, 120, any_order=True)
    for settings in (SamplingConfig(order="spread"), SamplingConfig(order="random", steps=8)):
        rows = prior.sample([0, 1] * 20, settings, range(40)).view(40, 2, 4)
        assert (rows == rows[:, :, :1]).float().mean() > 0.9 and (rows[:, 0, 0] == rows[:, 1, 0]).float().mean() < 0.5


def test_random_orders_of_several_grids_draw_one_grid_after_another_as_in_sampling(tokens, tmp_path):
    orders_BT = batches_of(tokens, TOP, WIDE).batch(0, 100, random_share=1.0).orders_BT
    sampling_BT = torch.from_numpy(drawing_orders("random", [TOP, WIDE], range(100)))
    for orders in (orders_BT, sampling_BT):
        first, second = orders.split([2, 8], dim=1)
        assert torch.equal(first.sort(dim=1).values, torch.arange(2).expand(100, -1)) and len(first.unique(dim=0)) == 2
        assert torch.equal(second.sort(dim=1).values, torch.arange(2, 10).expand(100, -1)) and len(second.unique(dim=0)) > 95
    recipe = recipe_for(tokens, tmp_path / "run", prior_training__order="random")
    train(recipe)
    prior, reader = TokenPrior.from_pretrained(tmp_path / "run/checkpoints/prior/last"), TokenShardReader(tokens / "validation")
    samples = reader.samples(validation_samples(reader, 64))
    orders_BT, ids_BT = (torch.from_numpy(array) for array in (random_orders(samples.samples_B, [TOP, WIDE], "validation"), samples.ids_BT))
    with torch.no_grad():
        logits_BTK = prior(ids_BT, torch.from_numpy(samples.labels_B), orders_BT=orders_BT)
    expected = torch.nn.functional.cross_entropy(logits_BTK.flatten(0, 1), ids_BT.flatten()).item()
    assert records(tmp_path / "run", "prior", "validation")[-1]["nll_in_random_order"] == pytest.approx(expected, rel=1e-5)


def test_random_orders_of_one_grid_have_the_random_numbers_of_a_permutation_of_all_tokens():
    samples = np.array([3, 11, 500])
    expected_BT = hashes(samples[:, None] * 8 + np.arange(8), "random orders", 7, 1).argsort(axis=1)
    assert (random_orders(samples, [WIDE], 7, 1) == expected_BT).all()
