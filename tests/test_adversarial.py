"""Adversarial losses: values, signs and gradients, which network they train, and the adaptive weight."""

import math

import pytest
import torch
from torch import nn

from stage1_tokenizer.adversarial.adversarial_losses import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    GRADIENT_EPS,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from stage1_tokenizer.adversarial.discriminator import PatchDiscriminator
from stage1_tokenizer.perceptual import feature_matching_loss
from vqmosaic.recipes.tokenizer_sections import ADVERSARIAL_LOSSES, AdversarialConfig

REAL, FAKE = torch.tensor([0.5, 2.0]), torch.tensor([-0.25, 1.0])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_every_loss_name_has_a_function():
    assert set(DISCRIMINATOR_LOSSES) == set(GENERATOR_LOSSES) == set(ADVERSARIAL_LOSSES)


# --- values and gradients ------------------------------------------------------------------------------------------------------


def test_discriminator_loss_values():
    assert discriminator_loss("hinge", REAL, FAKE).item() == pytest.approx(0.5 * ((0.5 + 0) / 2 + (0.75 + 2) / 2))
    entropy = -0.5 * ((math.log(sigmoid(0.5)) + math.log(sigmoid(2))) / 2 + (math.log(1 - sigmoid(-0.25)) + math.log(1 - sigmoid(1))) / 2)
    for name in ("vanilla", "non_saturating"):
        assert discriminator_loss(name, REAL, FAKE).item() == pytest.approx(entropy)


def test_generator_loss_values():
    assert generator_loss("hinge", FAKE).item() == pytest.approx(-0.375)
    assert generator_loss("vanilla", FAKE).item() == pytest.approx((math.log(1 - sigmoid(-0.25)) + math.log(1 - sigmoid(1))) / 2)
    assert generator_loss("non_saturating", FAKE).item() == pytest.approx(-(math.log(sigmoid(-0.25)) + math.log(sigmoid(1))) / 2)


def test_loss_gradients():
    expected = {"hinge": ([-0.25, 0.0], [0.25, 0.25], [-0.5, -0.5])}
    for name in ("vanilla", "non_saturating"):
        expected[name] = ([-(1 - sigmoid(0.5)) / 4, -(1 - sigmoid(2)) / 4], [sigmoid(-0.25) / 4, sigmoid(1) / 4], None)
    expected["vanilla"] = (*expected["vanilla"][:2], [-sigmoid(-0.25) / 2, -sigmoid(1) / 2])
    expected["non_saturating"] = (*expected["non_saturating"][:2], [-(1 - sigmoid(-0.25)) / 2, -(1 - sigmoid(1)) / 2])
    for name, (by_real, by_fake, by_generator) in expected.items():
        real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
        found = (*torch.autograd.grad(discriminator_loss(name, real, fake), (real, fake)), *torch.autograd.grad(generator_loss(name, fake), fake))
        for gradient, expected_values in zip(found, (by_real, by_fake, by_generator), strict=True):
            torch.testing.assert_close(gradient, torch.tensor(expected_values))


# --- signs, minima, saturation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_signs_of_gradients(name):
    real, fake = (torch.zeros(2, 1, 3, 3).requires_grad_() for _ in range(2))
    by_real, by_fake = torch.autograd.grad(discriminator_loss(name, real, fake), (real, fake))
    assert (by_real < 0).all() and (by_fake > 0).all()  # descent raises real logits and lowers fake ones
    (by_generator,) = torch.autograd.grad(generator_loss(name, fake), fake)
    assert (by_generator < 0).all()


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_minima_of_losses(name):
    grid = torch.linspace(-4, 4, 81)
    by_real = torch.stack([discriminator_loss(name, value, torch.tensor(0.0)) for value in grid])
    by_fake = torch.stack([discriminator_loss(name, torch.tensor(0.0), value) for value in grid])
    by_generator = torch.stack([generator_loss(name, value) for value in grid])
    assert by_real[0] > by_real[40] > by_real.min() and by_real[-1] == by_real.min()
    assert by_fake[-1] > by_fake[40] > by_fake.min() and by_fake[0] == by_fake.min()
    assert (by_generator.diff() < 0).all()
    if name == "hinge":  # it is constant beyond the margins
        assert (by_real[grid >= 1] == by_real.min()).all() and (by_fake[grid <= -1] == by_fake.min()).all()
    else:  # with equal logits for real and fake, D = 1/2 is optimal
        equal_logits_loss = torch.stack([discriminator_loss(name, value, value) for value in grid])
        assert grid[equal_logits_loss.argmin()].item() == pytest.approx(0, abs=1e-6) and equal_logits_loss.min().item() == pytest.approx(math.log(2))


def test_only_the_vanilla_generator_loss_saturates():
    gradients = {}
    for name in ADVERSARIAL_LOSSES:
        fake = torch.tensor([-12.0], requires_grad=True)
        gradients[name] = torch.autograd.grad(generator_loss(name, fake), fake)[0].item()
    assert gradients["hinge"] == -1 and gradients["non_saturating"] == pytest.approx(-1, abs=1e-4) and -1e-4 < gradients["vanilla"] < 0


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_losses_are_float32_and_finite_for_any_logits(name):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = torch.tensor([-6e4, -1.0, 0.0, 6e4], dtype=dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = discriminator_loss(name, logits, logits), generator_loss(name, logits)
        assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses)
        sum(losses).backward()
        assert torch.isfinite(logits.grad).all()


# --- which network is trained ----------------------------------------------------------------------------------------------------


def tiny_networks() -> tuple[nn.Conv2d, PatchDiscriminator, torch.Tensor]:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(AdversarialConfig(weight=0.1, layers=1, channels=8, spectral_norm=True), 3, seed=0)
    return nn.Conv2d(3, 3, 3, padding=1), discriminator, torch.rand(2, 3, 8, 8) * 2 - 1


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_generator_and_discriminator_losses_update_separate_networks(name):
    generator, discriminator, images = tiny_networks()
    discriminator.requires_grad_(False)
    fakes = generator(images)
    generator_loss(name, discriminator(fakes)).backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in generator.parameters())
    generator_gradients = [parameter.grad.clone() for parameter in generator.parameters()]
    discriminator.requires_grad_(True)
    real, fake = discriminator(torch.cat([images, fakes.detach()])).chunk(2)
    discriminator_loss(name, real, fake).backward()
    assert all(torch.equal(parameter.grad, before) for parameter, before in zip(generator.parameters(), generator_gradients, strict=True))
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_losses_train_a_discriminator_and_fool_it(name):
    _, discriminator, images = tiny_networks()
    fakes = images.flip(1) * 0.2
    parameters = list(discriminator.parameters())
    for _ in range(30):
        gradients = torch.autograd.grad(discriminator_loss(name, discriminator(images), discriminator(fakes)), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-0.1)
    real, fake = discriminator(images).mean(), discriminator(fakes).mean()
    assert real > fake + 0.3
    discriminator.requires_grad_(False)
    fakes.requires_grad_()
    loss = generator_loss(name, discriminator(fakes))
    (gradient,) = torch.autograd.grad(loss, fakes)
    assert discriminator(fakes - 0.1 * gradient / gradient.abs().max()).mean() > fake


# --- adaptive weight ---------------------------------------------------------------------------------------------------------------


def two_losses(weight: torch.Tensor, reconstruction: float = 3.0, adversarial: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two losses with the gradients (3, 0, 4) * reconstruction / 3 and (0, 2, 0) * adversarial at the last layer."""
    output = weight * torch.tensor([1.0, 2.0, 1.0])
    return (reconstruction / 3 * (3 * output[0] + 4 * output[2])), adversarial * output[1]


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    last_layer = torch.ones(3, requires_grad=True)
    reconstruction, adversarial = two_losses(last_layer)
    weight = adaptive_weight(reconstruction, adversarial, last_layer, 10.0)
    assert weight.item() == pytest.approx(5 / (2 + GRADIENT_EPS))
    assert weight.dtype == torch.float32 and weight.shape == () and not weight.requires_grad and last_layer.grad is None
    (reconstruction + weight * adversarial).backward()  # the graphs were retained
    torch.testing.assert_close(last_layer.grad, torch.tensor([3.0, 2 * weight.item(), 4.0]))


def test_adaptive_weight_of_a_network():
    generator, discriminator, images = tiny_networks()
    discriminator.requires_grad_(False)
    fakes = generator(images)
    losses = (fakes - images).abs().mean(), generator_loss("hinge", discriminator(fakes))
    norms = [torch.autograd.grad(loss, generator.weight, retain_graph=True)[0].norm().item() for loss in losses]
    assert adaptive_weight(*losses, generator.weight, 1e9).item() == pytest.approx(norms[0] / (norms[1] + GRADIENT_EPS), rel=1e-5)


def test_adaptive_weight_is_clamped_and_finite():
    last_layer = torch.ones(3, requires_grad=True)

    def weight(**factors):
        return adaptive_weight(*two_losses(last_layer, **factors), last_layer, 10.0).item()

    assert weight(reconstruction=300) == 10
    assert weight(adversarial=0) == 10
    assert weight(reconstruction=0) == 0
    assert weight(reconstruction=0, adversarial=0) == 0
    for bad in (math.nan, math.inf):
        assert weight(adversarial=bad) == 0 and weight(reconstruction=bad) == 0


def test_adaptive_weight_is_float32_under_autocast():
    generator, discriminator, images = tiny_networks()
    discriminator.requires_grad_(False)

    def compute_weight():
        fakes = generator(images)
        return adaptive_weight((fakes.float() - images).abs().mean(), generator_loss("hinge", discriminator(fakes)), generator.weight, 1e9)

    expected = compute_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = compute_weight()
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, expected, rtol=0.1, atol=0)


# --- feature matching ----------------------------------------------------------------------------------------------------------------


def test_feature_matching_weights_layers_equally():
    real = [torch.tensor([[[[1.0, -3.0]]]]), torch.tensor([[[[200.0]]]])]
    fake = [torch.tensor([[[[2.0, -3.0]]]]), torch.tensor([[[[100.0]]]])]
    assert feature_matching_loss(real, fake).item() == pytest.approx((0.5 / 2 + 100 / 200) / 2, rel=1e-5)
    scaled = feature_matching_loss([real[0] * 1000, real[1]], [fake[0] * 1000, fake[1]])
    torch.testing.assert_close(scaled, feature_matching_loss(real, fake), rtol=1e-5, atol=0)


def test_feature_matching_trains_only_the_generator_and_is_float32():
    generator, discriminator, images = tiny_networks()
    discriminator.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real = discriminator.features(images.requires_grad_())[1]
        loss = feature_matching_loss(real, discriminator.features(generator(images.detach()))[1])
    assert loss.dtype == torch.float32 and loss > 0
    loss.backward()
    assert images.grad is None and all(parameter.grad is None for parameter in discriminator.parameters())
    assert generator.weight.grad.abs().sum() > 0
    assert feature_matching_loss(real, real).item() == 0
    assert torch.isfinite(feature_matching_loss([torch.zeros(1, 2)], [torch.ones(1, 2)]))
