"""GroupNorm with swish: values and gradients are equal for all kernels and memory formats."""

import pytest
import torch
import torch.nn.functional as F

from vqmosaic.kernels.group_norm import GroupNorm


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 2
    return numbers.to(dtype).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int) -> GroupNorm:
    norm = GroupNorm(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, channels))
        norm.bias.copy_(torch.linspace(1, -1, channels))
    return norm


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize("shape", [(2, 32, 32, 40), (3, 64, 5, 7), (2, 96, 1, 1), (1, 32, 8, 8)])
def test_bf16_channels_last_matches_float32_up_to_rounding(shape, swish):
    norm = norm_of(shape[1])
    x, gradient = images(shape, 1, torch.bfloat16).requires_grad_(), images(shape, 2, torch.bfloat16)
    found = norm(x, swish=swish)
    assert type(found.grad_fn).__name__ == "ReorderedGroupNormBackward"
    exact = x.detach().float().requires_grad_()
    expected = F.group_norm(exact, 32, norm.weight, norm.bias, 1e-6)
    expected = F.silu(expected) if swish else expected
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    parameters = (norm.weight, norm.bias)
    found = (found, *torch.autograd.grad(found, (x, *parameters), gradient))
    expected = (expected, *torch.autograd.grad(expected, (exact, *parameters), gradient.float()))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs).abs().max() <= 0.01 * theirs.abs().max()


@pytest.mark.slow
def test_compiled_bf16_matches_float32_up_to_rounding():
    norm = norm_of(64)
    x, gradient = images((2, 64, 8, 8), 1, torch.bfloat16).requires_grad_(), images((2, 64, 8, 8), 2, torch.bfloat16)
    exact = x.detach().float().requires_grad_()
    found, expected = torch.compile(norm)(x, swish=True), norm(exact, swish=True)
    assert found.dtype == torch.bfloat16
    found = (found, *torch.autograd.grad(found, (x, *norm.parameters()), gradient))
    expected = (expected, *torch.autograd.grad(expected, (exact, *norm.parameters()), gradient.float()))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs).abs().max() <= 0.01 * theirs.abs().max()


def test_float32_equals_torch_group_norm():
    norm, x = norm_of(64), images((2, 64, 6, 5), 3, torch.float32)
    assert torch.equal(norm(x), F.group_norm(x, 32, norm.weight, norm.bias, 1e-6)) and torch.equal(norm(x, swish=True), F.silu(norm(x)))
