"""Orders of tokens: training, exact logits of several tokens per pass, known tokens, and settings that a prior does not support."""

import itertools

import numpy as np
import pytest
import torch

from stage2_prior.generation import passes
from stage2_prior.generation.decoding import ReferenceDecoder, StaticDecoder, make_decoder
from stage2_prior.generation.drawing_order import drawing_orders, tokens_per_pass
from stage2_prior.generation.passes import OrderedPasses
from stage2_prior.given_ids import start_ids
from stage2_prior.prior import TokenPrior
from stage2_prior.token_batches import random_share
from stage2_prior.vocabulary import Vocabulary
from tests.test_segments import FULL, random_given
from tests.tiny_priors import TWO_GRIDS, VOCABULARY, random_batch, tiny_prior
from token_shards import Grid
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import PriorConfig, PriorTrainingConfig, SamplingConfig

OPTIONS = {"class embeddings": {"embedding_blocks": 0}, "embeddings of all ids": {"embedding_blocks": 1, "intermediate_size": 64},
           "query blocks without embeddings": {"query_embeddings": False, "num_hidden_layers": 3}}


def any_order_prior(vocabulary: Vocabulary = VOCABULARY, seed: int = 0, **options) -> TokenPrior:
    """A tiny prior for any order, with random weights everywhere, so that every input changes its logits."""
    config = PriorConfig(architecture="grid_transformer", width=32, layers=2, heads=2, dropout=0.0, options=options)
    prior = TokenPrior.from_config(config, vocabulary, seed, any_order=True).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return prior


def random_orders(images: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permuted(np.tile(np.arange(length), (images, 1)), axis=1))


@pytest.mark.parametrize("vocabulary", [VOCABULARY, TWO_GRIDS], ids=["one grid", "two grids"])
def test_raster_order_gives_the_logits_without_an_order(vocabulary):
    prior = any_order_prior(vocabulary)
    ids_BT, classes_B = random_batch(vocabulary, size=4)
    raster_BT = torch.arange(vocabulary.num_tokens).expand(4, -1)
    with torch.no_grad():
        torch.testing.assert_close(prior(ids_BT, classes_B, orders_BT=raster_BT), prior(ids_BT, classes_B))


@pytest.mark.parametrize("vocabulary", [VOCABULARY, TWO_GRIDS], ids=["one grid", "two grids"])
def test_a_token_is_predicted_from_the_tokens_before_it_in_the_order(vocabulary):
    prior, length = any_order_prior(vocabulary), vocabulary.num_tokens
    ids_BT, classes_B = random_batch(vocabulary, size=1)
    orders_BT = random_orders(1, length)
    with torch.no_grad():
        logits_TK = prior(ids_BT, classes_B, orders_BT=orders_BT)[0]
        for place in range(length):
            changed_BT = ids_BT.clone()
            start, stop = vocabulary.position_ranges()[place]
            changed_BT[0, place] = (ids_BT[0, place] + 1) % (stop - start)
            is_same_T = (prior(changed_BT, classes_B, orders_BT=orders_BT)[0] == logits_TK).all(dim=-1)
            before, after = orders_BT[0].tolist().index(place), orders_BT[0].tolist()
            assert is_same_T[after[:before + 1]].all() and not is_same_T[after[before + 1:]].any()


@pytest.mark.parametrize("decoder", [StaticDecoder, ReferenceDecoder])
@pytest.mark.parametrize("known", [0, 1, 4])
@pytest.mark.parametrize("by_confidence", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocabulary", [VOCABULARY, TWO_GRIDS, FULL], ids=["one grid", "two grids", "conditions"])
def test_logits_of_a_pass_are_those_of_a_fresh_pass_on_the_known_tokens(decoder, known, by_confidence, options, vocabulary):
    prior, length, images = any_order_prior(vocabulary, **options), vocabulary.num_tokens, 3
    ids_BT, classes_B = random_batch(vocabulary, size=images)
    orders_BT = random_orders(images, length)
    orders_BT[:, :known] = orders_BT[:, :known].sort(dim=1).values
    known_BT = torch.full_like(ids_BT, passes.UNKNOWN).scatter(1, orders_BT[:, :known], ids_BT.gather(1, orders_BT[:, :known]))
    counts = [2, 1, length - known - 3] if length - known > 3 else [1] * (length - known)
    noise_BT = torch.from_numpy(np.random.default_rng(0).normal(size=(images, length))) if by_confidence else None
    given = random_given(images, vocabulary) if vocabulary.conditions else None
    start_BP = start_ids(vocabulary, classes_B, given, ids_BT)
    with torch.no_grad():
        made = make_decoder(prior.model, vocabulary.num_codes, images, start_BP.shape[1] + length)
        assert isinstance(made, StaticDecoder)
        used = made if decoder is StaticDecoder else ReferenceDecoder(prior.model, images)
        steps = OrderedPasses(used, vocabulary, start_BP, known_BT, orders_BT, counts, noise_BT)
        for count in counts:
            before_BT, filled = steps.ids_BT.clone(), steps.filled
            logits_BmK, places_Bm = steps.predict()
            assert places_Bm.shape[1] == (length - filled if by_confidence else count)
            for number in range(places_Bm.shape[1]):  # a fresh pass that has seen only the known tokens
                place_B1 = places_Bm[:, number:number + 1]
                order_BT = torch.cat([steps.orders_BT[:, :filled], place_B1, steps.orders_BT[:, filled:]], dim=1)
                rest_BT = torch.stack([torch.tensor(list(dict.fromkeys(row))) for row in order_BT.tolist()])
                fresh_BTK = prior(before_BT.clamp_min(0), classes_B, given, rest_BT)
                expected_BK = fresh_BTK.gather(1, place_B1[..., None].expand(-1, -1, fresh_BTK.shape[-1]))[:, 0]
                found_BK = logits_BmK[:, number]
                is_code = expected_BK.isfinite()
                torch.testing.assert_close(torch.where(is_code, found_BK[:, :expected_BK.shape[1]], 0.0), torch.where(is_code, expected_BK, 0.0),
                                           rtol=0, atol=1e-4)
            steps.accept(ids_BT.gather(1, places_Bm), logits_BmK)
    assert torch.equal(steps.ids_BT, ids_BT) and steps.remaining == 0


def test_sampling_in_random_order_follows_the_chain_rule():
    vocabulary = Vocabulary(grids=[Grid(name="image", codebook_size=3, height=1, width=3)], class_names=None, token_fingerprint="f" * 64)
    prior, images = any_order_prior(vocabulary), 20_000
    drawn_BT = prior.sample(None, SamplingConfig(order="random"), range(images))
    orders_BT = torch.from_numpy(drawing_orders("random", vocabulary.grids, range(images)))
    for order in itertools.permutations(range(3)):
        is_order_B = (orders_BT == torch.tensor(order)).all(dim=1)
        counts = torch.zeros(27).index_add(0, (drawn_BT[is_order_B] * torch.tensor([9, 3, 1])).sum(dim=1), torch.ones(int(is_order_B.sum())))
        ids_BT = torch.cartesian_prod(*[torch.arange(3)] * 3)
        with torch.no_grad():
            log_p_BT = prior(ids_BT, orders_BT=torch.tensor([order] * 27)).log_softmax(dim=-1).gather(-1, ids_BT[..., None])[..., 0]
        expected_B = log_p_BT.sum(dim=1).exp()
        torch.testing.assert_close(expected_B.sum(), torch.tensor(1.0))
        share = counts / counts.sum()
        deviations = (share - expected_B).abs() / (expected_B * (1 - expected_B) / counts.sum()).sqrt()
        assert deviations.max() < 4.5, f"{order}: {deviations.max():.1f} standard errors"


@pytest.mark.parametrize("order", ["raster", "random", "spread", "confidence"])
@pytest.mark.parametrize("steps", [None, 3, 1])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, TWO_GRIDS], ids=["one grid", "two grids"])
def test_samples_depend_on_their_own_seed_only(order, steps, vocabulary):
    prior = any_order_prior(vocabulary)
    classes = [0, 1, 2, 0] if vocabulary.num_classes else None
    settings = SamplingConfig(order=order, steps=steps, guidance_scale=1.5 if classes else 1.0)
    together_BT = prior.sample(classes, settings, [7, 8, 9, 10])
    alone_1T = prior.sample(classes and classes[2:3], settings, [9])
    assert torch.equal(together_BT[2:3], alone_1T)
    for place, (start, stop) in enumerate(vocabulary.position_ranges()):
        assert together_BT[:, place].min() >= 0 and together_BT[:, place].max() < stop - start


def test_samples_in_raster_order_are_those_of_forward_passes_without_an_order():
    prior, classes_B = any_order_prior(), torch.tensor([0, 1, 2])
    ids_BT = prior.sample(classes_B, SamplingConfig(temperature=0), [1, 2, 3])
    with torch.no_grad():
        assert torch.equal(prior(ids_BT, classes_B).argmax(dim=-1), ids_BT)


def test_samples_with_conditions_depend_on_them_and_on_their_own_seed_only():
    prior, given = any_order_prior(FULL), random_given(3)
    settings = SamplingConfig(order="spread", steps=2)
    together_BT = prior.sample([0, 1, 0], settings, [1, 2, 3], given=given, segment_guidance={"text": 9.0})
    alone = {name: ids[2:] for name, ids in given.items()}
    assert torch.equal(prior.sample([0], settings, [3], given=alone, segment_guidance={"text": 9.0}), together_BT[2:])
    assert not torch.equal(prior.sample([0, 1, 0], settings, [1, 2, 3], given=given), together_BT)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "grid_transformer"])
def test_known_tokens_before_all_others_work_for_every_prior(architecture):
    prior = tiny_prior(architecture).eval()
    settings = SamplingConfig(guidance_scale=1.5)
    whole_BT = prior.sample([0, 1, 2], settings, [1, 2, 3])
    known_BT = whole_BT.clone()
    known_BT[0, 4:], known_BT[1, 2:] = -1, -1  # the third image is known completely
    assert torch.equal(prior.sample([0, 1, 2], settings, [1, 2, 3], known_BT=known_BT), whole_BT)


def test_known_tokens_are_kept_and_differ_between_images():
    prior, settings = any_order_prior(), SamplingConfig(order="spread", steps=2, guidance_scale=1.5)
    known_BT = torch.full((3, 9), -1)
    known_BT[0, [0, 8]], known_BT[1, 4], known_BT[2, [3, 5]] = torch.tensor([1, 2]), 3, torch.tensor([4, 5])
    progress = []
    sampled_BT = prior.sample([0, 1, 2], settings, [1, 2, 3], lambda done, total: progress.append((done, total)), known_BT=known_BT)
    is_known_BT = known_BT >= 0
    assert torch.equal(sampled_BT[is_known_BT], known_BT[is_known_BT]) and sampled_BT.min() >= 0
    assert torch.equal(sampled_BT[1:2], prior.sample([1], settings, [2], known_BT=known_BT[1:2]))
    assert progress[-1] == (9, 9) and [done for done, _ in progress] == sorted(done for done, _ in progress)


@pytest.mark.parametrize(("settings", "words"), [
    ({"order": "random"}, "sampling.order is 'random', but the prior was trained in raster order"),
    ({"steps": 3}, "sampling.steps is 3, but the prior was trained in raster order"),
    ({"steps": 10}, "sampling.steps is 10; allowed: 1 to 9"),
])
@pytest.mark.parametrize("architecture", ["llama", "grid_transformer"])
def test_priors_trained_in_raster_order_refuse_other_orders(architecture, settings, words):
    with pytest.raises(InputError, match=words):
        tiny_prior(architecture).sample([0], SamplingConfig(**settings), [1])


def test_priors_trained_in_raster_order_refuse_known_tokens_after_unknown_ones():
    known_BT = torch.full((1, 9), -1)
    known_BT[0, 3] = 1
    with pytest.raises(InputError, match="there are known tokens after unknown ones, but the prior was trained in raster order"):
        tiny_prior().sample([0], SamplingConfig(), [1], known_BT=known_BT)


@pytest.mark.parametrize("architecture", ["llama", "grid_transformer"])
def test_priors_trained_in_raster_order_keep_tokens_that_they_do_not_see(architecture):
    """At temperature 0, each drawn token is the likeliest one after the known and drawn tokens before it."""
    prior, settings = tiny_prior(architecture).eval(), SamplingConfig(temperature=0.0)
    known_BT = torch.full((3, 9), -1)
    known_BT[0, [0, 3, 8]], known_BT[1, [4, 5, 6]] = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])  # as many, at other places
    known_BT[2] = torch.arange(9)
    ids_BT = prior.sample([0, 1, 2], settings, [1, 2, 3], known_BT=known_BT, keep_unseen=True)
    is_known_BT = known_BT >= 0
    assert torch.equal(ids_BT[is_known_BT], known_BT[is_known_BT])
    with torch.no_grad():
        likeliest_BT = prior(ids_BT, torch.tensor([0, 1, 2])).argmax(dim=-1)
    assert torch.equal(ids_BT[~is_known_BT], likeliest_BT[~is_known_BT])
    assert torch.equal(ids_BT[1:2], prior.sample([1], settings, [2], known_BT=known_BT[1:2], keep_unseen=True))


@pytest.mark.parametrize(("known", "words"), [
    (torch.zeros(1, 8, dtype=torch.int64), r"known is torch.int64 \(1, 8\); give a tensor of int64 ids of shape \(1, 9\)"),
    (torch.zeros(1, 9), "known is torch.float32"), ([[0] * 9], "known is 'list'"),
    (torch.full((1, 9), 48), "allowed: -1 for tokens to draw, and ids below the codebook size"), (torch.full((1, 9), -2), "from -2 to -2"),
])
def test_invalid_known_tokens_are_refused(known, words):
    with pytest.raises(InputError, match=words):
        any_order_prior().sample([0], SamplingConfig(), [1], known_BT=known)


def test_other_architectures_do_not_learn_orders():
    with pytest.raises(InputError, match=r"prior\.architecture is 'llama', which predicts tokens only in raster order"):
        TokenPrior.from_config(PriorConfig(architecture="llama", width=32, layers=1, heads=2), VOCABULARY, 0, any_order=True)


def test_a_saved_prior_keeps_its_orders(tmp_path):
    prior = any_order_prior()
    prior.save_pretrained(tmp_path)
    loaded, settings = TokenPrior.from_pretrained(tmp_path), SamplingConfig(order="spread", steps=3)
    assert loaded.any_order and not tiny_prior("grid_transformer").any_order
    assert torch.equal(loaded.sample([0, 1], settings, [1, 2]), prior.sample([0, 1], settings, [1, 2]))


@pytest.mark.parametrize("schedule", ["cosine", "arccos", "linear"])
def test_each_pass_draws_at_least_one_token_and_all_passes_draw_all(schedule):
    for unknown, steps in itertools.product(range(1, 40), range(1, 45)):
        counts = tokens_per_pass(unknown, steps, schedule)
        assert len(counts) == min(steps, unknown) and min(counts) >= 1 and sum(counts) == unknown
    assert tokens_per_pass(64, None, schedule) == [1] * 64
    assert tokens_per_pass(64, 8, schedule) == {"cosine": [1, 4, 6, 8, 9, 12, 12, 12], "arccos": [5, 5, 6, 5, 7, 7, 8, 21],
                                                "linear": [8] * 8}[schedule]


GRIDS_OF_ORDERS = [[Grid(name="image", codebook_size=8, height=8, width=8)], [Grid(name="image", codebook_size=8, height=3, width=5, depth=2)],
                   [Grid(name="top", codebook_size=8, height=2, width=3), Grid(name="bottom", codebook_size=4, height=4, width=6)]]


@pytest.mark.parametrize("order", ["raster", "random", "spread"])
@pytest.mark.parametrize("grids", GRIDS_OF_ORDERS, ids=["square", "deep", "two grids"])
def test_orders_hold_every_place_once_grid_by_grid_and_follow_from_the_seed(order, grids):
    orders_BT = drawing_orders(order, grids, [5, 6, 5])
    first = 0
    for grid in grids:
        part_BT = orders_BT[:, first:first + grid.num_tokens]
        assert (np.sort(part_BT, axis=1) == np.arange(first, first + grid.num_tokens)).all()
        first += grid.num_tokens
    assert (orders_BT[0] == orders_BT[2]).all() and (orders_BT[0] == orders_BT[1]).all() == (order == "raster")


@pytest.mark.parametrize(("height", "width", "distances_apart"), [(8, 8, ((2, 5.6), (4, 4), (8, 2.8), (16, 2))),
                                                                  (4, 8, ((2, 4.4), (4, 2.2), (8, 1.4)))], ids=["square", "wide"])
def test_spread_keeps_tokens_apart(height, width, distances_apart):
    """On a torus, the second place is at the opposite point."""
    grid = Grid(name="image", codebook_size=8, height=height, width=width)
    for row in drawing_orders("spread", [grid], range(20)):
        for count, apart in distances_apart:
            rows, columns = row[:count] // width, row[:count] % width
            down, across = (np.abs(axis[:, None] - axis) for axis in (rows, columns))
            distances = np.hypot(np.minimum(down, height - down), np.minimum(across, width - across))
            assert distances[~np.eye(count, dtype=bool)].min() >= apart


def test_random_share_falls_between_the_two_fractions():
    training = PriorTrainingConfig(order="annealed", order_annealing=[0.5, 0.75], final_random_share=0.2)
    assert [round(random_share(training, progress), 3) for progress in (0, 0.5, 0.625, 0.75, 0.99)] == [1, 1, 0.6, 0.2, 0.2]
    assert random_share(PriorTrainingConfig(order="random"), 0.9) == 1 and random_share(PriorTrainingConfig(), 0) == 0
    assert random_share(PriorTrainingConfig(order="annealed", order_annealing=[0.5, 0.5], final_random_share=0.25), 0.5) == 0.25
    for changes, words in (({"order": "spiral"}, "prior_training.order"), ({"order_annealing": [0.8, 0.2]}, "prior_training.order_annealing"),
                           ({"final_random_share": 2.0}, "prior_training.final_random_share")):
        with pytest.raises(InputError, match=words):
            PriorTrainingConfig(**changes)
