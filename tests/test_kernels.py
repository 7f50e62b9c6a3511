"""Every kernel in vqmosaic/kernels agrees with its plain reference: values and gradients, in the dtype that the kernel is for."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqmosaic.kernels import chunked_cross_entropy, matmul_attention, rotary, squared_relu
from vqmosaic.kernels.decoding_products import Product
from vqmosaic.kernels.embedding_lookup import EmbeddingLookup, Occurrences
from vqmosaic.kernels.group_norm import GroupNorm, ReorderedGroupNorm

ROTATIONS_S2p2 = torch.stack([torch.cos(angles := torch.arange(11 * 2 * 4).view(11, 2, 4) / 7), torch.sin(angles)], dim=-1)


class Case(NamedTuple):
    kernel: Callable
    reference: Callable
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the inputs, which get gradients."""
    tolerance: float


IDS = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(9, (40,), generator=torch.Generator().manual_seed(2))
CHANNELS = torch.linspace(0.5, 1.5, 64)


def rotary_kernel(projected: torch.Tensor) -> torch.Tensor:
    """EAGER_KERNELS as an autograd function of the projections (B, S, 2, A, d), through QueriesKeysValues."""
    hidden = torch.cat([projected, torch.zeros_like(projected[:, :, :1])], dim=2).flatten(2)
    queries, keys, _ = rotary.QueriesKeysValues.apply(hidden, None, ROTATIONS_S2p2, projected.shape[3], 1e-5, rotary.EAGER_KERNELS)
    return torch.stack([queries, keys])


def group_norm_reference(x_BCHW: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(x_BCHW.float(), 32, CHANNELS, CHANNELS, 1e-6)).to(x_BCHW.dtype)


def channels_last(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW.contiguous(memory_format=torch.channels_last)


CASES = {
    "rotary": Case(rotary_kernel, lambda projected: rotary.reference(projected, ROTATIONS_S2p2, 1e-5), ((2, 11, 2, 3, 8),), 0.03),
    "matmul_attention": Case(matmul_attention.MatmulAttention.apply, matmul_attention.reference, ((2, 3, 11, 8),) * 3, 0.03),
    "single_head_matmul_attention": Case(matmul_attention.single_head_matmul_attention, matmul_attention.single_head_reference,
                                         ((2, 16, 8),) * 3, 0.03),
    "squared_relu": Case(squared_relu.squared_relu, squared_relu.reference, ((5, 33),), 0.01),
    "chunked_cross_entropy": Case(lambda logits: chunked_cross_entropy.ChunkedCrossEntropy.apply(logits, TARGETS),
                                  lambda logits: chunked_cross_entropy.reference(logits, TARGETS), ((40, 9),), 0.01),
    "embedding_lookup": Case(lambda table: EmbeddingLookup.apply(table, IDS, Occurrences.of(IDS, 7), table.dtype),
                             lambda table: F.embedding(IDS, table), ((7, 6),), 0.02),
    "group_norm": Case(lambda x: ReorderedGroupNorm.apply(channels_last(x), CHANNELS.to(x.dtype), CHANNELS.to(x.dtype), 32, 1e-6, True),
                       group_norm_reference, ((2, 64, 5, 6),), 0.06),
    "group_norm_as_affine": Case(lambda x: F.silu(group_norm().as_affine(x)).to(x.dtype), group_norm_reference, ((2, 64, 5, 6),), 0.06),
}


def group_norm() -> GroupNorm:
    norm = GroupNorm(64)
    norm.weight.data.copy_(CHANNELS)
    norm.bias.data.copy_(CHANNELS)
    return norm


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
    torch.manual_seed(0)
    layers = [nn.Linear(768, 512, bias=False), nn.Linear(768, 256, bias=False)]
    layers = [layer.to(dtype) for layer in layers]
    x_NK = torch.randn(rows, 768).to(dtype)
    with torch.inference_mode():
        found = Product(layers, rows)(x_NK).float()
        expected = torch.cat([F.linear(x_NK.float(), layer.weight.float()) for layer in layers], dim=1)
    assert (found - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 0.02) * expected.abs().max()
