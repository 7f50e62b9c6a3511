"""Every kernel in vqmosaic/kernels agrees with its plain reference: values and gradients, in the dtype that the kernel is for."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from vqmosaic.kernels import complex_rotation, decoding_products, dropout, group_norm, matmul_attention, single_query_attention, upsampling
from vqmosaic.kernels.decoding_products import PackedLinear, can_pack
from vqmosaic.kernels.group_norm import ReorderedGroupNorm

ROTATIONS_Sp2 = torch.stack([torch.cos(angles := torch.arange(11 * 4).view(11, 1, 4) / 7), torch.sin(angles)], dim=-1)


class Case(NamedTuple):
    kernel: Callable
    reference: Callable
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the inputs, which get gradients."""
    tolerance: float


CHANNELS = torch.linspace(0.5, 1.5, 64)


def channels_last(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def convolution(kernel: torch.Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(6, 5, 3, padding=1)
    conv.bias.data.copy_(torch.linspace(-1, 1, 5))
    conv._parameters["weight"] = kernel  # so that it gets a gradient
    return conv.to(kernel.dtype)


CASES = {
    "complex_rotation": Case(lambda heads: complex_rotation.rotate_as_complex(heads, ROTATIONS_Sp2),
                             lambda heads: complex_rotation.reference(heads, ROTATIONS_Sp2), ((2, 11, 3, 8),), 0.01),
    "matmul_attention": Case(lambda *inputs: matmul_attention.matmul_attention(*inputs, is_causal=True),
                             lambda *inputs: matmul_attention.reference(*inputs, is_causal=True), ((2, 3, 11, 8),) * 3, 0.03),
    "matmul_attention of all positions": Case(lambda *inputs: matmul_attention.matmul_attention(*inputs, is_causal=False),
                                              lambda *inputs: matmul_attention.reference(*inputs, is_causal=False), ((2, 1, 11, 8),) * 3, 0.03),
    "group_norm": Case(lambda x: ReorderedGroupNorm.apply(channels_last(x), CHANNELS.to(x.dtype), CHANNELS.to(x.dtype), 32, 1e-6, True),
                       lambda x: group_norm.reference(x, CHANNELS, CHANNELS, 32, 1e-6, True), ((2, 64, 5, 6),), 0.06),
    "upsampling": Case(lambda x, kernel: upsampling.upsample(convolution(kernel), x), lambda x, kernel: upsampling.reference(convolution(kernel), x),
                       ((2, 6, 5, 4), (5, 6, 3, 3)), 0.03),
}


def outputs_and_gradients(function: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, then the gradient of each input for a fixed gradient of the output."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_agree_with_the_reference(name, dtype):
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in case.shapes]
    found = outputs_and_gradients(case.kernel, inputs)
    expected = outputs_and_gradients(case.reference, [tensor.float() for tensor in inputs])
    for result, exact in zip(found, expected, strict=True):
        scale = exact.abs().max()
        assert result.shape == exact.shape and (result.float() - exact).abs().max() <= (1e-5 if dtype == torch.float32 else case.tolerance) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_packed_products_agree_with_linear(rows, dtype):
    if not can_pack("cpu", dtype):
        pytest.skip("this build of torch or this CPU does not support packed products")
    torch.manual_seed(0)
    linear, x_NK = nn.Linear(768, 512).to(dtype), torch.randn(rows, 768).to(dtype)
    with torch.inference_mode():
        found = PackedLinear(linear, rows)(x_NK).float()
        expected = decoding_products.reference(linear.float(), x_NK.float())
    assert (found - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 0.02) * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_single_query_attention_agrees_with_the_reference(dtype, key_heads, masked):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 1, 8, generator=generator).to(dtype)
    keys, values = (torch.randn(7, 3, key_heads, 8, generator=generator).permute(1, 2, 0, 3) for _ in range(2))
    mask_1S = (torch.arange(7) < 5)[None] if masked else None
    found = single_query_attention.single_query_attention(query, keys, values, mask_1S)
    expected = single_query_attention.reference(query.float(), keys, values, mask_1S)
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found.float() - expected).abs().max() <= (1e-6 if dtype == torch.float32 else 0.01) * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("drop", [dropout.drop_by_bits, dropout.reference])
def test_dropout_keeps_its_share_and_the_mean(drop, probability, dtype):
    torch.manual_seed(0)
    x = torch.ones(999, 1003, dtype=dtype, requires_grad=True)  # no multiple of the elements of a draw
    out = drop(x, probability)
    out.backward(x.detach())
    assert torch.equal(x.grad, out), "the gradient is dropped and scaled like the ones of x"
    out = out.detach()
    kept, deviation = out != 0, (probability * (1 - probability) / x.numel()) ** 0.5
    assert out.dtype == dtype and abs((~kept).float().mean() - probability) < 5 * deviation + 2**-16
    rounding = 1e-4 if dtype == torch.float32 else 0.006
    assert out[kept].unique().numel() == 1 and out[kept][0].item() == pytest.approx(1 / (1 - probability), rel=rounding)
    for dim in (0, 1):  # no row, column or place in a draw is dropped more than others
        shares = (~kept).float().mean(dim)
        assert (shares - probability).abs().max() < 6 * (probability * (1 - probability) / x.shape[dim]) ** 0.5
    neighbours = (~kept[:, 1:] & ~kept[:, :-1]).float().mean()
    assert abs(neighbours - probability**2) < 6 * probability / x.numel() ** 0.5


def test_dropout_of_nearly_everything():
    out = dropout.drop_by_bits(torch.ones(100, 100), 1 - 1e-9)
    assert out.isfinite().all() and (out == 0).float().mean() > 0.99


def test_dropout_depends_on_the_seed_only():
    x, drawn = torch.randn(7, 9), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropout.dropout(x, 0.5))
    torch.manual_seed(1)
    assert torch.equal(drawn[0], dropout.drop_by_bits(x, 0.5)), "on a CPU, drop_by_bits is used"
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert dropout.dropout(x, 0.5, training=False) is x and dropout.dropout(x, 0.0) is x
