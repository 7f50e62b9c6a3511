"""Query and key normalization in each head and rotary embedding, for training in bf16 on a CPU, as custom autograd functions.

The elementwise operations between the matrix products of attention work on more memory than a cache holds, and take longer than the products unless
torch.compile fuses them. There are two sets of kernels: EAGER_KERNELS, which call operators of torch, and compiled_kernels.

With compiled kernels, training processes 304.6 sequences/s, with EAGER_KERNELS 289.9 (benchmarks/RESULTS.md, 2026-11-27). EAGER_KERNELS normalize
rows as groups of a GroupNorm, whose kernel takes half the time of LayerNorm's. Their gain over plain operators: Not measured since the move.

In comments: B batch, S sequence, D width, E = 3 D outputs of the joint projection, A heads, d head dimension (A d = D), p pairs of a head. Rotated
pairs are neighbours (interleaved). Compiled kernels have all first elements of a head before all second elements (half-split).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from vqmosaic.kernels.embedding_lookup import is_unmodified


def reference(projected: torch.Tensor, rotations_S2p2: torch.Tensor, epsilon: float) -> torch.Tensor:
    """What RotaryKernels.forward computes, for interleaved pairs, in plain operators and float32. Its autograd gives RotaryKernels.backward."""
    pairs = F.layer_norm(projected.float(), projected.shape[-1:], eps=epsilon).unflatten(-1, (-1, 2))          # B, S, 2, A, p, 2
    (first, second), (cosines, sines) = pairs.unbind(-1), rotations_S2p2[:, :, None].unbind(-1)
    rotated = torch.stack([first * cosines - second * sines, first * sines + second * cosines], dim=-1).flatten(-2)
    return rotated.to(projected.dtype).permute(2, 0, 3, 1, 4)


class RotaryKernels(NamedTuple):
    """Query and key normalization and rotation, forward and backward."""

    half_split: bool
    """Layout of the pairs of a head: all first elements before all second elements, or interleaved."""
    forward: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """Maps projections (B, S, 2, A, d) of queries and keys, rotations and epsilon to normalized and rotated queries and keys (2, B, A, S, d)."""
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor], None]
    """Maps gradients (B, A, S, d) of queries and of keys, projections, rotations and epsilon to the gradient of the projections, which it writes into
    the last argument (B, S, 2, A, d)."""


def select_kernels(x_BSD: torch.Tensor, layer: nn.Module, kernels: RotaryKernels) -> RotaryKernels | None:
    """The kernels for a block without a cache, given its input and its joint projection `layer`. None means plain operators.

    Half-split kernels need a plain nn.Linear, whose weights `project` reorders.
    """
    if x_BSD.device.type != "cpu" or x_BSD.dtype != torch.bfloat16 or not x_BSD.requires_grad or torch.compiler.is_compiling():
        return None
    return EAGER_KERNELS if kernels.half_split and not is_unmodified(layer, nn.Linear) else kernels


def project(x_BSD: torch.Tensor, layer: nn.Module, heads: int, kernels: RotaryKernels | None) -> torch.Tensor:
    """The joint projection (B, S, E) to queries, keys and values, with pairs in the layout of `kernels`; interleaved if None."""
    if kernels is None or not kernels.half_split:
        return layer(x_BSD)
    return F.linear(x_BSD, HalfSplit.apply(layer.weight, heads, x_BSD.dtype))


class QueriesKeysValues(torch.autograd.Function):
    """`queries_keys_values` of stage2_prior/model/grid_attention.py with custom kernels. Normalization and rotation are in float32."""

    @staticmethod
    def forward(ctx, hidden_BSE: torch.Tensor, value_embeddings_BSD: torch.Tensor | None, rotations_S2p2: torch.Tensor, heads: int,
                epsilon: float, kernels: RotaryKernels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, (B, A, S, d) each."""
        projected = hidden_BSE.unflatten(-1, (3, heads, -1))                                                   # B, S, 3, A, d
        queries, keys = kernels.forward(projected[:, :, :2], rotations_S2p2, epsilon)
        values = projected[:, :, 2].transpose(1, 2)
        values = values.new_empty(values.shape).copy_(values) if value_embeddings_BSD is None else torch.add(
            values, value_embeddings_BSD.unflatten(-1, (heads, -1)).transpose(1, 2), out=values.new_empty(values.shape))
        ctx.save_for_backward(hidden_BSE, rotations_S2p2)
        ctx.heads, ctx.epsilon, ctx.kernels, ctx.has_embeddings = heads, epsilon, kernels, value_embeddings_BSD is not None
        return queries, keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_queries: torch.Tensor, grad_keys: torch.Tensor, grad_values: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the joint projection and of the value embeddings."""
        hidden_BSE, rotations_S2p2 = ctx.saved_tensors
        projected = hidden_BSE.unflatten(-1, (3, ctx.heads, -1))                                               # B, S, 3, A, d
        result_BSE = torch.empty_like(hidden_BSE)
        parts = result_BSE.unflatten(-1, (3, ctx.heads, -1))
        ctx.kernels.backward(grad_queries, grad_keys, projected[:, :, :2], rotations_S2p2, ctx.epsilon, parts[:, :, :2])
        parts[:, :, 2] = grad_values.transpose(1, 2)
        embeddings_BSD = result_BSE[..., -hidden_BSE.shape[-1] // 3:] if ctx.has_embeddings else None
        return result_BSE, embeddings_BSD, None, None, None, None


def normalize_and_rotate(projected: torch.Tensor, rotations_S2p2: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RotaryKernels.forward with torch's kernels. Rows are normalized as groups of a GroupNorm, whose kernel takes half the time of LayerNorm's."""
    rows = projected.numel() // projected.shape[-1]
    normed, _, _ = torch.native_group_norm(projected.float().contiguous(), None, None, 1, rows, projected.shape[-1], rows, epsilon)
    rotated = rotate_(normed.view(projected.shape), rotations_S2p2).permute(2, 0, 3, 1, 4)
    return projected.new_empty(rotated.shape).copy_(rotated)


def normalize_and_rotate_backward(grad_queries: torch.Tensor, grad_keys: torch.Tensor, projected: torch.Tensor, rotations_S2p2: torch.Tensor,
                                  epsilon: float, out: torch.Tensor) -> None:
    """RotaryKernels.backward with torch's kernels. Means and standard deviations are recomputed."""
    grad_normed = projected.new_empty(projected.shape, dtype=torch.float32)
    grad_normed[:, :, 0], grad_normed[:, :, 1] = grad_queries.transpose(1, 2), grad_keys.transpose(1, 2)
    rotate_(grad_normed, rotations_S2p2 * rotations_S2p2.new_tensor([1, -1]))
    projected, width, rows = projected.float().contiguous(), projected.shape[-1], projected.numel() // projected.shape[-1]
    _, mean, scale = torch.native_group_norm(projected, None, None, 1, rows, width, rows, epsilon)
    moments = (each.view(*projected.shape[:-1], 1) for each in (mean, scale))
    out.copy_(torch.ops.aten.native_layer_norm_backward(grad_normed, projected, (width,), *moments, None, None, (True, False, False))[0])


def rotate_(heads: torch.Tensor, rotations_S2p2: torch.Tensor) -> torch.Tensor:
    """In-place `rotate` for float32 heads (B, S, 2, A, d)."""
    torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(rotations_S2p2)[:, :, None])
    return heads


EAGER_KERNELS = RotaryKernels(False, normalize_and_rotate, normalize_and_rotate_backward)


def fused_normalize_and_rotate(projected: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RotaryKernels.forward for torch.compile, half-split. A rotation is x * cosines + x_swapped * sines, where x_swapped exchanges the halves."""
    normed, _ = normalize(projected, epsilon)
    normed = normed.unflatten(-1, (2, -1))                                                                     # B, S, 2, A, 2, p
    return (normed * cosines + normed.flip(-2) * sines).flatten(-2).to(projected.dtype).permute(2, 0, 3, 1, 4).contiguous()


def fused_normalize_and_rotate_backward(grad_queries: torch.Tensor, grad_keys: torch.Tensor, projected: torch.Tensor, cosines: torch.Tensor,
                                        sines: torch.Tensor, epsilon: float, out: torch.Tensor) -> None:
    """RotaryKernels.backward for torch.compile, half-split."""
    normed, scale = normalize(projected, epsilon)
    rotated = torch.stack([grad_queries, grad_keys], dim=1).permute(0, 3, 1, 2, 4).float().unflatten(-1, (2, -1))    # B, S, 2, A, 2, p
    grad_normed = (rotated * cosines - rotated.flip(-2) * sines).flatten(-2)
    out.copy_(scale * (grad_normed - grad_normed.mean(-1, keepdim=True) - normed * (grad_normed * normed).mean(-1, keepdim=True)))


def half_split_tables(rotations_S2p2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables for the half-split layout, (S, 2, 1, 2, p) each: cosines, and sines for the exchanged halves, negative for the first half."""
    cosines, sines = rotations_S2p2[:, :, None].unbind(-1)
    return torch.stack([cosines, cosines], dim=-2), torch.stack([-sines, sines], dim=-2)


def normalize(projected: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize each head in float32. Returns (x - mean) / standard deviation, and 1 / standard deviation (..., 1)."""
    centred = projected.float() - projected.float().mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    return centred * scale, scale


@functools.cache
def compiled_kernels() -> RotaryKernels:
    """The compiled kernels. They compile on the first call with each shape, which takes some seconds."""
    forward = torch.compile(fused_normalize_and_rotate, dynamic=False)
    backward = torch.compile(fused_normalize_and_rotate_backward, dynamic=False)
    return RotaryKernels(True, lambda projected, rotations_S2p2, epsilon: forward(projected, *half_split_tables(rotations_S2p2), epsilon),
                         lambda grad_queries, grad_keys, projected, rotations_S2p2, epsilon, out:
                         backward(grad_queries, grad_keys, projected, *half_split_tables(rotations_S2p2), epsilon, out))


class HalfSplit(torch.autograd.Function):
    """Converts the weights (E, D) of a joint projection to half-split rows and to `dtype`, to which autocast would convert them anyway."""

    @staticmethod
    def forward(ctx, weights: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """Half-split weights (E, D) from interleaved weights (E, D)."""
        ctx.heads, ctx.dtype = heads, weights.dtype
        result = torch.empty_like(weights, dtype=dtype)
        for out, rows in zip(view_pairs(result, heads, half_split=True), view_pairs(weights, heads, half_split=False), strict=True):
            out.copy_(rows)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the interleaved weights."""
        result = torch.empty_like(gradient, dtype=ctx.dtype)
        for out, rows in zip(view_pairs(result, ctx.heads, half_split=False), view_pairs(gradient, ctx.heads, half_split=True), strict=True):
            out.copy_(rows)
        return result, None, None


def view_pairs(weights: torch.Tensor, heads: int, half_split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the weights (E, D) of a joint projection: pairs (2 A, p, 2, D) of queries and keys, and rows (D, D) of values."""
    rows = len(weights) // 3 * 2
    if half_split:
        return weights[:rows].unflatten(0, (2 * heads, 2, -1)).transpose(1, 2), weights[rows:]
    return weights[:rows].unflatten(0, (2 * heads, -1, 2)), weights[rows:]
