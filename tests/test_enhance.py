"""Enhancing images: the evidence for codes, which tokens are drawn again, and what is kept."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributions import MultivariateNormal

from pipelines import ImageGenerationPipeline
from pipelines.editing import scores
from pipelines.editing.given_images import tokens_of
from pipelines.editing.masked_images import masks_from, tokens_in_masks
from pipelines.editing.scores import unexpected_bits
from pipelines.enhancing import code_evidence, enhance_methods
from pipelines.enhancing.code_evidence import NOISE_SAMPLES, evidence_for_codes
from pipelines.enhancing.enhance_methods import largest_share
from pipelines.generation_request import tries_seeds
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.quantizers import QUANTIZERS
from stage1_tokenizer.tokenizer_protocol import Tokenizer
from stage2_prior.segments import GivenGrid
from tests.conditioned import CLASSES, CODES
from tests.editing import TOKEN, box_mask, make_pipe, make_prior, random_image, two_grids
from token_shards.manifest import Grid
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.recipes.tokenizer_sections import NEAREST_CODE_KINDS, TokenizerConfig
from vqmosaic.seeding import generator

LEVELS = 8


class BlockMeans(Tokenizer):
    """The mean grey value of each block of TOKEN x TOKEN pixels, rounded to the nearest of LEVELS values."""

    def __init__(self):
        super().__init__(ImageTransform(16, 1))
        self.register_buffer("codes_K1", torch.linspace(-1, 1, LEVELS)[:, None])
        self.token_fingerprint = "f" * 64

    @property
    def grids(self) -> list[Grid]:
        return [Grid("image", LEVELS, 16 // TOKEN, 16 // TOKEN)]

    def encode_grids(self, images_BCHW):
        (vectors_Bhw1, codes_K1), = self.vectors_and_codes(images_BCHW).values()
        return {"image": (vectors_Bhw1 - codes_K1[:, 0]).abs().argmin(dim=-1)}

    def decode_grids(self, ids):
        return F.interpolate(self.codes_K1[:, 0][ids["image"]][:, None], scale_factor=TOKEN)

    def vectors_and_codes(self, images_BCHW):
        return {"image": (F.avg_pool2d(images_BCHW, TOKEN).permute(0, 2, 3, 1), self.codes_K1)}

    def network_config(self):
        return {}

    @classmethod
    def from_config(cls, network, transform, class_names, where, version):
        return cls()


@pytest.fixture(scope="module", params=["any order", "raster order"])
def trained(request) -> ImageGenerationPipeline:
    """A pipeline that has learned images of one grey value."""
    tokenizer = BlockMeans().eval()
    prior = make_prior(tokenizer, any_order=request.param == "any order", class_names=None).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=0.01)
    ids_BT = torch.arange(LEVELS).repeat(4)[:, None].expand(-1, 16)
    for step in range(60):
        orders_BT = torch.from_numpy(generator("orders", step).random(ids_BT.shape).argsort(axis=1)) if prior.any_order else None
        optimizer.zero_grad()
        prior.loss(ids_BT, orders_BT=orders_BT).backward()
        optimizer.step()
    return ImageGenerationPipeline(tokenizer, prior.eval(), SamplingConfig(order="spread", steps=8) if prior.any_order else SamplingConfig())


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("grey") / "tokenizer")


def grey_image(pipe: ImageGenerationPipeline, level: int, noise: float = 0.0) -> torch.Tensor:
    """An image (1, 1, 16, 16) of one of the levels, with noise in steps of 8 bits."""
    pixels_HW = torch.from_numpy(generator("noise", level).standard_normal((16, 16), dtype="float32")) * noise / 127.5
    return (pixels_HW + pipe.tokenizer.codes_K1[level]).clamp(-1, 1)[None, None]


# --- what it is for ------------------------------------------------------------------------------------------------------------


def test_an_odd_token_is_replaced_and_all_others_are_kept(trained):
    """A prior in raster order also finds the tokens after an odd one unlikely, so only the last token can be odd."""
    for place in (5, 15) if trained.prior.any_order else (15,):
        image_1CHW = grey_image(trained, 3)
        row, column = (TOKEN * part for part in divmod(place, 4))
        image_1CHW[..., row:row + TOKEN, column:column + TOKEN] = trained.tokenizer.codes_K1[6]
        assert (trained.encode(image_1CHW) != 3).sum() == 1
        assert (trained.enhance(image_1CHW, noise=200, strength=1 / 16, seed=1).token_ids == 3).all()


def test_noise_is_removed(trained):
    """Encoding and decoding alone leave many wrong tokens."""
    projected, right = 0, 0
    for level in (2, 3, 5):
        image_1CHW = grey_image(trained, level, noise=80.0)
        projected += int((trained.encode(image_1CHW) == level).sum())
        right += int((trained.enhance(image_1CHW, noise=80, num_tries=6, seed=1).token_ids == level).sum())
    assert projected < 36 and right == 48, (projected, right)


def test_missing_pixels_are_filled_and_the_others_are_kept(trained):
    image_1CHW, mask_HW = grey_image(trained, 4, noise=3.0), torch.from_numpy(np.random.default_rng(0).random((16, 16)) < 0.3)
    mask_HW[4:8, 4:8] = True  # a whole token
    damaged_1CHW = image_1CHW.masked_fill(mask_HW, 1.0)
    out = trained.enhance(damaged_1CHW, noise=10, mask=mask_HW, seed=1, output_type="pt")
    assert torch.equal(out.images[..., ~mask_HW], image_1CHW[..., ~mask_HW])
    assert (out.token_ids == 4).all() and (out.images - image_1CHW).abs().max() < 0.2
    other = trained.enhance(image_1CHW.masked_fill(mask_HW, -1.0), noise=10, mask=mask_HW, seed=1, output_type="pt")
    assert torch.equal(out.images, other.images), "what is under the mask has no influence"


# --- evidence ------------------------------------------------------------------------------------------------------------------


def test_evidence_is_that_of_a_gaussian(pipe):
    """Its covariance is measured on the reconstruction of the image; quantization is equal in all directions."""
    tokenizer, noise = pipe.tokenizer, 0.3
    images_BCHW = torch.stack([tokenizer.transform(random_image(pipe, seed)) for seed in range(3)])
    found_BnK = evidence_for_codes(tokenizer, images_BCHW, noise)["image"]
    for number, image_CHW in enumerate(images_BCHW):
        vectors, codes_KF = tokenizer.vectors_and_codes(image_CHW[None])["image"]
        vectors_nF, ids_n = vectors.flatten(0, 2), tokenizer.encode(image_CHW[None]).flatten()
        restored_1CHW = tokenizer.reconstruct(image_CHW[None]).clamp(-1, 1)
        still_nF = tokenizer.vectors_and_codes(restored_1CHW)["image"][0].flatten(0, 2)
        draws = [torch.from_numpy(generator("restoration noise", draw).standard_normal(image_CHW.shape, dtype="float32"))
                 for draw in range(NOISE_SAMPLES)]
        shifts = [tokenizer.vectors_and_codes((restored_1CHW + noise * draw_CHW).clamp(-1, 1))["image"][0].flatten(0, 2) - still_nF
                  for draw_CHW in draws]
        covariance_FF = sum(shift_nF.T @ shift_nF for shift_nF in shifts) / (16 * NOISE_SAMPLES)
        covariance_FF += (vectors_nF - codes_KF[ids_n]).square().mean() * torch.eye(len(covariance_FF))
        expected_nK = MultivariateNormal(codes_KF, covariance_FF).log_prob(vectors_nF[:, None])
        torch.testing.assert_close(found_BnK[number].log_softmax(-1), expected_nK.log_softmax(-1), atol=1e-3, rtol=1e-3)


def test_without_noise_the_nearest_code_has_the_most_evidence(pipe):
    images_BCHW = torch.stack([pipe.tokenizer.transform(random_image(pipe, seed)) for seed in range(3)])
    assert torch.equal(evidence_for_codes(pipe.tokenizer, images_BCHW, 1e-6)["image"].argmax(dim=-1), tokens_of(pipe.tokenizer, images_BCHW))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_vectors_are_quantized_to_the_nearest_codes(kind):
    config = TokenizerConfig(quantizer=kind, codebook_size=64, code_dim=6, l2_normalize=kind == "ema")
    quantizer = QUANTIZERS[kind](config, seed=1).eval()
    latents_BDhw = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    found = quantizer.vectors_and_codes(latents_BDhw)
    assert (found is not None) == (kind in (*NEAREST_CODE_KINDS, "fsq", "lfq"))
    if found is not None:
        vectors_BhwF, codes_KF = found
        nearest = torch.cdist(vectors_BhwF.flatten(0, 2), codes_KF).argmin(dim=1)
        assert torch.equal(nearest, quantizer(latents_BDhw).ids.flatten())


def test_evidence_is_added_to_the_logits_after_guidance(pipe):
    prior = pipe.prior
    known_BT = torch.arange(16)[None].clone()
    known_BT[0, 5] = -1
    last_1T = torch.tensor([[*(place for place in range(16) if place != 5), 5]])
    filled_BT = known_BT.clamp_min(0)
    with torch.no_grad():
        conditional_K, unconditional_K = (prior(filled_BT, torch.tensor([index]), orders_BT=last_1T)[0, 5] for index in (1, -1))
    evidence_BTK = torch.randn(1, 16, CODES, generator=torch.Generator().manual_seed(0)) * 20
    guided_K = unconditional_K + 3 * (conditional_K - unconditional_K)
    for logits_K, scale in ((conditional_K, 1.0), (guided_K, 3.0)):
        sampling = SamplingConfig(temperature=0.0, guidance_scale=scale)
        drawn_BT = prior.sample([1], sampling, [0], known_BT=known_BT, evidence_BTK=evidence_BTK)
        assert drawn_BT[0, 5] == (logits_K + evidence_BTK[0, 5]).argmax() != logits_K.argmax()
    for wrong, words in ((evidence_BTK[0], "evidence is torch.float32"), (evidence_BTK.long(), "evidence is torch.int64"), ([1.0], "'list'"),
                         (evidence_BTK / 0, "not finite")):
        with pytest.raises(InputError, match=words):
            prior.sample([1], SamplingConfig(), [0], evidence_BTK=wrong)


@pytest.mark.parametrize("case", ["one prior", "two priors", "raster order"])
def test_evidence_of_several_grids(case, tmp_path):
    """Evidence for a single code of each token selects it, whatever the number of codes of the grid. Grids without evidence are drawn as before."""
    tokenizer = two_grids(tmp_path / "tokenizer")
    coarse, fine = tokenizer.grids
    priors = [make_prior(tokenizer, any_order=case != "raster order")] if case != "two priors" else [
        make_prior(tokenizer, grids=[coarse]), make_prior(tokenizer, grids=[fine], class_drop=0.1, conditions=[GivenGrid(grid=coarse)])]
    pipe = ImageGenerationPipeline(tokenizer, priors)
    wanted = {"coarse": torch.tensor([[0, 4, 2, 1]]), "fine": torch.arange(16)[None]}
    evidence = {grid.name: F.one_hot(wanted[grid.name], grid.codebook_size) * 1e4 for grid in tokenizer.grids}
    drawn = pipe.sample_ids([1], SamplingConfig(), [3], evidence=evidence)
    assert all(torch.equal(drawn[name].flatten(1), ids) for name, ids in wanted.items())
    half = pipe.sample_ids([1], SamplingConfig(), [3], evidence={"fine": evidence["fine"]})
    assert torch.equal(half["coarse"], pipe.sample_ids([1], SamplingConfig(), [3])["coarse"]) and torch.equal(half["fine"].flatten(1), wanted["fine"])


# --- which tokens are drawn ------------------------------------------------------------------------------------------------------


def test_unexpected_bits_are_those_given_all_other_tokens(pipe):
    """With as many parts as tokens. The entropy of the prediction is subtracted."""
    ids_BT = torch.stack([torch.arange(16), torch.arange(16).flip(0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "PARTS", 16)
        found_BT = unexpected_bits(pipe.tokenizer, pipe.chain, ids_BT, [0, 1], {})
    for place in (0, 7, 15):
        last_BT = torch.tensor([[*(other for other in range(16) if other != place), place]]).expand(2, -1)
        with torch.no_grad():
            log_BK = pipe.prior(ids_BT, torch.tensor([0, 1]), orders_BT=last_BT)[:, place].log_softmax(-1)
        expected_B = -log_BK.gather(1, ids_BT[:, place, None])[:, 0] + (log_BK.exp() * log_BK).sum(dim=1)
        torch.testing.assert_close(found_BT[:, place], expected_B / math.log(2), atol=1e-4, rtol=1e-4)
    in_parts_BT = unexpected_bits(pipe.tokenizer, pipe.chain, ids_BT, [0, 1], {})
    assert (in_parts_BT != found_BT).any() and (in_parts_BT != 0).all(), "every token is in one of the parts"


def test_the_share_with_the_most_bits():
    grids = [Grid("a", 5, 1, 2), Grid("b", 5, 2, 2)]
    bits_BT = torch.tensor([[1.0, 2.0, 5.0, 3.0, 4.0, 0.0]]).expand(2, -1)
    is_candidate_BT = torch.tensor([[True] * 6, [True, False, False, True, True, False]])
    assert largest_share(bits_BT, is_candidate_BT, 0.5, grids).long().tolist() == [[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0]]
    assert largest_share(bits_BT, torch.zeros(2, 6, dtype=torch.bool), 0.5, grids).sum() == 0


@pytest.mark.parametrize("case", ["any order", "raster order", "two grids"])
def test_a_share_of_the_tokens_is_drawn(case, pipe, tmp_path):
    if case == "two grids":
        tokenizer = two_grids(tmp_path / "tokenizer", channels=3)
        each = ImageGenerationPipeline(tokenizer, make_prior(tokenizer))
    else:
        each = pipe if case == "any order" else make_pipe(tmp_path / "tokenizer", any_order=False)
    image, tokenizer = random_image(each), each.tokenizer
    given_1T = tokens_of(tokenizer, tokenizer.transform(image)[None])
    for strength in (0.01, 0.3):
        ids_BT = tokenizer.join_tokens(each.enhance(image, 60, strength, num_images_per_label=8, seed=1).token_ids)
        allowed_1T = largest_share(unexpected_bits(tokenizer, each.chain, given_1T, None, {}), torch.ones_like(given_1T, dtype=torch.bool), strength,
                                   tokenizer.grids)
        assert (ids_BT != given_1T).any() and not ((ids_BT != given_1T) & ~allowed_1T).any()


# --- habits of the pipeline ------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_batches(pipe, monkeypatch):
    images = [random_image(pipe, seed) for seed in range(3)]
    arguments = {"noise": 60, "strength": 0.5, "class_labels": ["ant", "bee", "ant"], "num_images_per_label": 2, "seed": 3}
    together = pipe.enhance(images, **arguments)
    alone = pipe.enhance(images, batch_size=1, **arguments)
    assert torch.equal(together.token_ids, alone.token_ids) and not torch.equal(together.token_ids[0], together.token_ids[1])
    part = pipe.enhance_part([images[2], images[0]], [2, 0], 3, 60, 0.5, ["ant", "ant"], num_images_per_label=2)
    assert torch.equal(part.token_ids, together.token_ids[[4, 5, 0, 1]]) and part.seeds == [together.seeds[number] for number in (4, 5, 0, 1)]
    monkeypatch.setattr(enhance_methods, "MAX_LOGITS", 2 * 16 * CODES)
    sizes = []
    monkeypatch.setattr(enhance_methods, "evidence_for_codes", lambda *given: sizes.append(len(given[1])) or code_evidence.evidence_for_codes(*given))
    assert torch.equal(pipe.enhance(images, **arguments).token_ids, together.token_ids) and sizes == [1, 1, 1], "two results at a time"
    assert not torch.equal(pipe.enhance(images, **arguments | {"seed": 4}).token_ids, together.token_ids)
    with pytest.raises(InputError, match="there are 1 positions and 3 images"):
        pipe.enhance_part(images, [0], 3)


def test_several_tries_return_the_most_likely_one_for_the_image(pipe):
    image = random_image(pipe)
    arguments = {"noise": 30, "num_images_per_label": 8, "seed": 5, "class_labels": "ant"}
    best = pipe.enhance(image, num_tries=4, **arguments)
    evidence = {"image": evidence_for_codes(pipe.tokenizer, pipe.tokenizer.transform(image)[None], 30 / 127.5)["image"].expand(8, -1, -1)}
    seeds = pipe.enhance(image, **arguments).seeds
    tries = [pipe.sample_ids([0] * 8, SamplingConfig(), own, evidence=evidence).flatten(1) for own in tries_seeds(seeds, 4)]
    with torch.no_grad():
        nll_KB = torch.stack([torch.stack([pipe.prior.loss(ids[number][None], torch.tensor([0])) * 16 for number in range(8)]) for ids in tries])
    observed_KB = torch.stack([evidence["image"].gather(2, ids[..., None]).sum(dim=(1, 2)) for ids in tries])
    chosen_B = (nll_KB - observed_KB).argmin(dim=0).tolist()
    assert chosen_B != nll_KB.argmin(dim=0).tolist() and set(chosen_B) != {0}
    assert all(torch.equal(best.token_ids[number].flatten(), tries[chosen][number]) for number, chosen in enumerate(chosen_B))


def test_the_mean_of_several_results(pipe):
    images, mask_HW = [random_image(pipe, seed) for seed in range(2)], box_mask(pipe, 3, 4, 5, 9)
    arguments = {"noise": 80, "seed": 2, "class_labels": CLASSES, "output_type": "pt"}
    mean, single = pipe.enhance(images, average=3, **arguments), pipe.enhance(images, num_images_per_label=3, **arguments)
    torch.testing.assert_close(mean.images, single.images.unflatten(0, (2, 3)).mean(dim=1))
    assert torch.equal(mean.token_ids, single.token_ids[::3]) and mean.seeds == single.seeds[::3] and mean.class_indices == [0, 1]
    assert [image.size for image in pipe.enhance(images, average=3, seed=2).images] == [(16, 16)] * 2
    kept_HW = torch.from_numpy(~mask_HW)
    given_NCHW = torch.stack([pipe.tokenizer.transform(image) for image in images])
    masked = pipe.enhance(images, mask=mask_HW, average=3, **arguments).images
    assert torch.equal(masked[..., kept_HW], given_NCHW[..., kept_HW])
    assert pipe.enhance(images, average=3, callback=lambda *_: False).stopped
    part = pipe.enhance_part([images[1]], [1], 2, 80, average=3, class_labels="bee", output_type="pt")
    torch.testing.assert_close(part.images[0], mean.images[1])


def test_guidance_is_off_unless_it_is_given(pipe, monkeypatch):
    image = random_image(pipe)
    monkeypatch.setattr(pipe, "sampling", SamplingConfig(guidance_scale=6.0))
    without, with_scale_1, guided = (pipe.enhance(image, 60, class_labels="bee", seed=1, **given).token_ids
                                     for given in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 6.0}))
    assert torch.equal(without, with_scale_1) and not torch.equal(without, guided)


def test_channels_types_and_a_callback(tmp_path):
    pipe = make_pipe(tmp_path / "tokenizer", channels=4, size=[16, 24], order="spread", steps=3)
    image, calls = random_image(pipe), []
    out = pipe.enhance(image, class_labels=CLASSES, seed=1, callback=lambda *done: calls.append(done))
    assert [result.mode for result in out.images] == ["RGBA", "RGBA"] and out.images[0].size == (24, 16) and calls[-1] == (24, 24)
    stopped = pipe.enhance(image, callback=lambda *_: False)
    assert stopped.stopped and not len(stopped.images)


WHITE = Image.new("L", (16, 16), 255)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"noise": 0}, "noise is 0; allowed: above 0, at most 255"), ({"noise": 256}, "noise is 256"), ({"noise": True}, "noise is True"),
    ({"noise": "25"}, "noise is '25'"), ({"noise": math.nan}, "noise is nan"), ({"strength": 0}, "strength is 0; allowed: above 0, at most 1"),
    ({"strength": 1.5}, "strength is 1.5"), ({"mask": Image.new("L", (16, 16))}, "has no white"), ({"num_tries": 0}, "num_tries is 0"),
    ({"average": 0}, "average is 0"), ({"class_labels": "cow"}, "no class 'cow'"), ({"sharpness": 2}, "sharpness"),
    ({"batch_size": "8"}, "batch_size is '8'"),
    ({"batch_size": 0}, "batch_size is 0"), ({"image": WHITE.resize((8, 32))}, "the image is 8 x 32 pixels"),
])
def test_invalid_arguments_are_refused_before_anything_is_encoded(pipe, monkeypatch, arguments, words):
    monkeypatch.setattr(enhance_methods, "tokens_of", lambda *_: pytest.fail("the image was encoded"))
    with pytest.raises(InputError, match=words):
        pipe.enhance(**{"image": WHITE} | arguments)


def test_tokenizers_that_do_not_choose_the_nearest_code(tmp_path):
    tokenizer = two_grids(tmp_path / "tokenizer")
    pipe = ImageGenerationPipeline(tokenizer, make_prior(tokenizer))
    image = random_image(pipe)
    with pytest.raises(InputError, match=r"does not choose the nearest codes \(grid coarse, fine\).* Give a strength below 1"):
        pipe.enhance(image)
    mask_HW = box_mask(pipe, 4, 4, 8, 8)
    out = pipe.enhance(image, mask=mask_HW, seed=1)
    assert np.array_equal(np.asarray(out.images[0])[~mask_HW], np.asarray(image)[~mask_HW])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_only_tokens_that_cover_missing_pixels_are_drawn(pipe, strength, monkeypatch):
    """The evidence counts with the share of kept pixels: 3 of 4 for the first token, none for the second one."""
    image, mask_HW, given = random_image(pipe), box_mask(pipe, 3, 4, 8, 8), []
    sample_ids = pipe.sample_ids
    monkeypatch.setattr(pipe, "sample_ids", lambda *args, **kwargs: given.append(kwargs["evidence"]) or sample_ids(*args, **kwargs))
    ids_BT = pipe.enhance(image, 100, strength, mask=mask_HW, num_images_per_label=8, seed=1).token_ids.flatten(1)
    is_changed_T = (ids_BT != ids_BT[0]).any(dim=0)
    is_covered_T = tokens_in_masks(masks_from(mask_HW, 1, (16, 16)), pipe.tokenizer.grids)[0]
    assert is_changed_T.any() and not (is_changed_T & ~is_covered_T).any() and is_changed_T.sum() <= 2 * strength
    observed_nK = given[0]["image"][0]
    assert (observed_nK[5] == 0).all() and (observed_nK[4] != 0).any()
    whole = enhance_methods.weighted_evidence({"image": torch.ones(1, 16, CODES)}, 1 - enhance_methods.share_in_masks(
        masks_from(mask_HW, 1, (16, 16)), pipe.tokenizer.grids), pipe.tokenizer.grids)
    assert whole["image"][0, 4, 0] == 0.75 and whole["image"][0, 5, 0] == 0
