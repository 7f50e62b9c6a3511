"""The PatchGAN discriminator and differentiable augmentation."""

import copy

import pytest
import torch

from stage1_tokenizer.adversarial.differentiable_augmentation import augment_images, augment_pair
from stage1_tokenizer.adversarial.discriminator import PatchDiscriminator, group_count
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.recipes.tokenizer_sections import AUGMENTATIONS, AdversarialConfig, patches_per_side

NORMS = [("group", False), ("none", False), ("none", True), ("group", True)]


def make(norm: str = "group", spectral: bool = False, layers: int = 2, channels: int = 8, seed: int = 0) -> PatchDiscriminator:
    config = AdversarialConfig(weight=0.1, norm=norm, spectral_norm=spectral, layers=layers, channels=channels)
    return PatchDiscriminator(config, 3, seed)


def random_images(count: int, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


# --- network -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 7, 12, 16, 24, 30, 32, 47, 48])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_shape_of_logits_matches_patches_per_side(layers, size):
    discriminator = make(layers=layers)
    if size < 3 * 2**layers:
        with pytest.raises(InputError, match=f"adversarial.layers is {layers}.*they have {size}"):
            patches_per_side(size, layers)
        with pytest.raises(InputError, match=r"adversarial\.layers"):
            discriminator(random_images(1, size=size))
        return
    side = patches_per_side(size, layers)
    logits_B1hw, features = discriminator.features(random_images(2, size=size))
    assert logits_B1hw.shape == (2, 1, side, side)
    assert len(features) == layers + 1 and all(torch.isfinite(feature).all() for feature in features)
    assert torch.equal(logits_B1hw, discriminator(random_images(2, size=size)))


def test_too_many_layers_are_refused_by_the_recipe():
    with pytest.raises(InputError, match=r"adversarial.layers is 3.*at most 2, or data.image_size to at least 24"):
        Recipe(data=DataConfig(image_size=16), adversarial=AdversarialConfig(weight=0.1, layers=3))
    with pytest.raises(InputError, match=r"set data.image_size to at least 24"):
        patches_per_side(5, 3)
    Recipe(data=DataConfig(image_size=16), adversarial=AdversarialConfig(weight=0.1, layers=2))
    Recipe(data=DataConfig(image_size=16), adversarial=AdversarialConfig(weight=0.0, layers=3))
    assert patches_per_side(32, 3) == 2


def test_receptive_field_of_a_logit():
    for layers, patch in ((1, 16), (2, 34), (3, 70)):
        images = random_images(1, size=96).double().requires_grad_()
        logits_B1hw = make("none", layers=layers).double()(images)
        center = logits_B1hw.shape[-1] // 2
        logits_B1hw[0, 0, center, center].backward()
        seen = images.grad[0].abs().sum(0).nonzero()
        assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [patch, patch]


def test_channels_double_up_to_eight_times():
    discriminator = make(layers=5, channels=16)
    assert [block[0].out_channels for block in discriminator.blocks] == [16, 32, 64, 128, 128, 128]
    assert [block[0].stride[0] for block in discriminator.blocks] == [2, 2, 2, 2, 2, 1]
    assert discriminator.conv_out.out_channels == 1 and discriminator.conv_out.stride == (1, 1)
    assert len(discriminator.blocks[0]) == 2  # no norm in the first block


@pytest.mark.parametrize("channels", range(8, 136, 8))
def test_group_count_divides_every_allowed_width(channels):
    for multiplier in (2, 4, 8):
        width = channels * multiplier
        assert width % group_count(width) == 0 and 2 <= group_count(width) <= 32 and width // group_count(width) >= 4


@pytest.mark.parametrize(("norm", "spectral"), NORMS)
def test_logits_do_not_depend_on_other_images_in_the_batch(norm, spectral):
    discriminator = make(norm, spectral).eval()
    images = random_images(4)
    batch_logits = discriminator(images)
    single_logits = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(batch_logits, single_logits, atol=1e-6, rtol=1e-5)
    other_batch = torch.cat([images[:1], images[1:] * 100 + 7])
    torch.testing.assert_close(discriminator(other_batch)[:1], batch_logits[:1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("spectral", [False, True])
def test_weights_depend_on_the_seed_and_keep_the_global_rng_state(spectral):
    torch.manual_seed(5)
    first, after = make(spectral=spectral), torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    second, other = make(spectral=spectral).state_dict(), make(spectral=spectral, seed=1).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.state_dict().items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def test_initial_weights_have_standard_deviation_of_0_02():
    weight = make(channels=64).blocks[1][0].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean().item()) < 1e-3


# --- spectral norm -------------------------------------------------------------------------------------------------------------


def state_copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def states_are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_spectral_norm_bounds_the_largest_singular_value():
    discriminator = make("none", spectral=True)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(50)
    for _ in range(30):
        discriminator.commit()
    for convolution in (*(block[0] for block in discriminator.blocks), discriminator.conv_out):
        assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_only_commit_updates_spectral_norm():
    discriminator = make("none", spectral=True)
    with torch.no_grad():  # so that the power iteration has not converged
        discriminator.blocks[1][0].parametrizations.weight.original[0].mul_(3)
    before = state_copy(discriminator)
    discriminator.requires_grad_(False)
    images = random_images(2).requires_grad_()
    discriminator(images).mean().backward()
    assert states_are_equal(before, state_copy(discriminator)) and images.grad.abs().sum() > 0
    discriminator.requires_grad_(True)
    discriminator(images).mean().backward()
    discriminator.eval()(images)
    assert states_are_equal(before, state_copy(discriminator)), "a skipped step must not change the state"
    discriminator.commit()
    assert not states_are_equal(before, state_copy(discriminator))


@pytest.mark.parametrize("spectral", [False, True])
def test_training_continues_identically_from_a_state_dict(spectral):
    def steps(discriminator, count):
        optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
        for step in range(count):
            discriminator.requires_grad_(False)
            discriminator(random_images(2))
            discriminator.requires_grad_(True)
            optimizer.zero_grad()
            (discriminator(random_images(2) * (step + 1)) ** 2).mean().backward()
            optimizer.step()
            discriminator.commit()
        return discriminator

    first = steps(make(spectral=spectral), 2)
    resumed = make(spectral=spectral, seed=3)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert states_are_equal(state_copy(steps(first, 2)), state_copy(steps(resumed, 2)))


@pytest.mark.parametrize(("norm", "spectral"), NORMS)
def test_autocast_matches_float32_up_to_rounding(norm, spectral):
    discriminator = make(norm, spectral)
    expected = discriminator.eval()(random_images(2))
    before = state_copy(discriminator.train())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_B1hw = discriminator(random_images(2))
    logits_B1hw.float().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in discriminator.parameters())
    assert all(tensor.dtype == before[name].dtype for name, tensor in discriminator.state_dict().items())
    torch.testing.assert_close(logits_B1hw.float(), expected, atol=0.03, rtol=0.03)


def test_spectral_norm_runs_once_per_forward_without_autocast():
    """Under autocast, its products would be in half precision on a GPU."""
    discriminator, seen = make(spectral=True), []
    discriminator.conv_out.parametrizations.weight[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert discriminator(random_images(1)).dtype == torch.bfloat16
    assert seen == [False]


# --- differentiable augmentation -------------------------------------------------------------------------------------------------


def augmented(images_BCHW, names, seed=0):
    torch.manual_seed(seed)
    return augment_images(images_BCHW, names)


@pytest.mark.parametrize("names", [[name] for name in AUGMENTATIONS] + [list(AUGMENTATIONS)], ids="+".join)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_shape_determinism_and_gradients(names, channels):
    images = random_images(4, channels, size=8).double().requires_grad_()
    first = augmented(images, names)
    assert first.shape == images.shape and first.dtype == images.dtype
    assert torch.equal(first, augmented(images, names))
    assert not torch.equal(first, augmented(images, names, seed=1)) and not torch.equal(first, images)
    assert augmented(images.bfloat16(), names).dtype == torch.bfloat16
    if "color" not in names:  # it computes in float32, which is too imprecise for gradcheck
        assert torch.autograd.gradcheck(lambda x: augmented(x, names), (images[:2, :1, :4, :4].detach().requires_grad_(),))
    first.sum().backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0


def test_order_of_augmentations_does_not_matter_and_an_empty_list_does_nothing():
    images = random_images(4)
    assert torch.equal(augmented(images, ["cutout", "translation", "color"]), augmented(images, AUGMENTATIONS))
    assert augmented(images, []) is images


def test_gradient_of_color_augmentation():
    images, direction = random_images(3), random_images(3, size=16).flip(0)
    images.requires_grad_()
    slope = torch.autograd.functional.jvp(lambda x: augmented(x, ["color"]), images, direction)[1]
    torch.testing.assert_close(slope, augmented(images + direction, ["color"]) - augmented(images, ["color"]), atol=1e-5, rtol=1e-4)


def test_color_augmentation_covers_its_ranges_per_image():
    zero_images = torch.zeros(500, 3, 4, 4)
    shifts = augmented(zero_images, ["color"]).mean((1, 2, 3))
    assert shifts.min() < -0.45 and shifts.max() > 0.45 and shifts.abs().max() <= 0.5
    steps = torch.tensor([-1.0, 1.0]).repeat(8).view(1, 1, 4, 4).expand(500, 1, 4, 4)
    contrast = augmented(steps, ["color"]).std((1, 2, 3)) / steps[0].std()  # images with one channel skip saturation
    assert 0.5 <= contrast.min() < 0.53 and 1.47 < contrast.max() <= 1.5
    colourful = torch.tensor([-0.5, 0.0, 0.5]).view(1, 3, 1, 1).expand(500, 3, 4, 4)
    spread = augmented(colourful, ["color"]).std((1, 2, 3)) / colourful[0].std()
    assert spread.min() < 0.1 and 1.5 < spread.max() <= 3


def test_translation_shifts_by_whole_pixels_and_fills_with_zeros():
    images = random_images(1, size=16).expand(300, 3, 16, 16) + 3
    seen = set()
    for moved, image in zip(augmented(images, ["translation"]), images, strict=True):
        inside = (moved != 0).all(0).nonzero()
        top, left = inside.amin(0).tolist()
        bottom, right = inside.amax(0).tolist()
        shift = (top or bottom - 15, left or right - 15)
        canvas = torch.zeros(3, 20, 20)
        canvas[:, 2 + shift[0]:18 + shift[0], 2 + shift[1]:18 + shift[1]] = image
        assert torch.equal(moved, canvas[:, 2:18, 2:18])
        seen.add(shift)
    assert seen == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_cutout_zeroes_a_square_of_half_the_image_size():
    for size in (15, 16):
        zeroed = augmented(torch.ones(300, 3, size, size), ["cutout"]) == 0
        assert torch.equal(zeroed.any(1), zeroed.all(1))
        heights, widths = zeroed[:, 0].any(2).sum(1), zeroed[:, 0].any(1).sum(1)
        assert torch.equal(zeroed[:, 0].sum((1, 2)), heights * widths)  # a rectangle
        assert heights.max() == 8 and widths.max() == 8 and 4 <= heights.min() < 8
        assert zeroed.float().mean(0).min() > 0  # every pixel can be zeroed


def test_augment_pair_applies_the_same_augmentation_to_both_batches():
    images, offset = random_images(4), 0.25
    torch.manual_seed(0)
    first, second = augment_pair(images, images, AUGMENTATIONS)
    assert torch.equal(first, second) and torch.equal(first, augmented(images, AUGMENTATIONS))
    torch.manual_seed(0)
    first, second = augment_pair(images, images + offset, ["translation", "cutout"])
    difference = second - first
    kept = difference.abs() > 0.1
    assert kept.float().mean() > 0.5
    torch.testing.assert_close(difference[kept], torch.full_like(difference[kept], offset))
    joint = augmented(torch.cat([images, images]), ["translation"])
    assert not torch.equal(joint[:4], joint[4:])  # images of one batch are augmented independently
