"""A GridTransformer's self-attention from its joint projection on: queries and keys normalized in each head, rotated by places, causal.

Once in plain operations, and once for training in bf16 on a CPU. There torch's kernel takes, for short sequences, ten times as long for the gradient
as the few products that it is; and the passes between them, each over memory that no cache holds, cost more than the products, unless
torch.compile makes one of them.

In comments: B batch, S sequence, D width, E = 3 D numbers of the joint projection, A heads, d width of a head (A d = D), p its pairs. Pairs that are
rotated are neighbours (interleaved); compiled passes want all firsts of a head before all seconds (half-split).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from vqmosaic.kernels.embedding_lookup import is_untouched

LONGEST = 256
"""Positions up to which weights of all pairs are kept for the gradient."""


def queries_keys_values(hidden_BSE: torch.Tensor, value_embeddings_BSD: torch.Tensor | None, rotations_S2p2: torch.Tensor, heads: int, epsilon: float,
                        passes: "Passes | None" = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys, normalized and rotated, and values, (B, A, S, d) each, of what `project` gave.

    Embeddings, if there are any, are added to the values. `passes` are those of passes_for.
    """
    if passes is not None:
        return QueriesKeysValues.apply(hidden_BSE, value_embeddings_BSD, rotations_S2p2, heads, epsilon, passes)
    # split, as the gradient of each part taken by an index would be a whole tensor of zeros and the part
    projected, values = hidden_BSE.unflatten(-1, (3, heads, -1)).split((2, 1), dim=2)                          # B, S, 2 or 1, A, d
    queries, keys = rotate(F.layer_norm(projected, projected.shape[-1:], eps=epsilon), rotations_S2p2[:, :, None]).unbind(2)
    values = values.squeeze(2)
    if value_embeddings_BSD is not None:
        values = values + value_embeddings_BSD.view(values.shape)
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def rotate(heads: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Heads (..., d), each pair of neighbouring numbers rotated by a cosine and a sine (..., p, 2), which broadcast."""
    pairs = (heads if heads.dtype == torch.float64 else heads.float()).unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling() and heads.dtype != torch.float64:  # as complex numbers: one pass, which torch.compile cannot make
        rotated = torch.view_as_complex(pairs) * torch.view_as_complex(rotations)
        return torch.view_as_real(rotated).flatten(-2).to(heads.dtype)
    (first, second), (cosines, sines) = pairs.unbind(-1), rotations.unbind(-1)
    return torch.stack([first * cosines - second * sines, first * sines + second * cosines], dim=-1).flatten(-2).to(heads.dtype)


class Passes(NamedTuple):
    """What lies between the projection and the products, and its gradient."""

    half_split: bool
    """How they want the pairs of a head: all firsts before all seconds, or interleaved."""
    queries_keys: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """Of the projections (B, S, 2, A, d) of queries and keys, of rotations and epsilon: those normalized and rotated, (2, B, A, S, d)."""
    gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor], None]
    """Of the gradients (B, A, S, d) of both, of the projections, of rotations and epsilon: the gradient of the projections, written into the last
    argument (B, S, 2, A, d)."""


def queries_keys(projected: torch.Tensor, rotations_S2p2: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Passes.queries_keys by torch's kernels: rows are normalized as groups of a GroupNorm, whose kernel takes half of the time of LayerNorm's."""
    rows = projected.numel() // projected.shape[-1]
    normed, _, _ = torch.native_group_norm(projected.float().contiguous(), None, None, 1, rows, projected.shape[-1], rows, epsilon)
    turned = turn(normed.view(projected.shape), rotations_S2p2).permute(2, 0, 3, 1, 4)
    return projected.new_empty(turned.shape).copy_(turned)


def queries_keys_gradient(of_queries: torch.Tensor, of_keys: torch.Tensor, projected: torch.Tensor, rotations_S2p2: torch.Tensor,
                          epsilon: float, into: torch.Tensor) -> None:
    """Passes.gradient by torch's kernels; means and deviations are computed again."""
    turned_back = projected.new_empty(projected.shape, dtype=torch.float32)
    turned_back[:, :, 0], turned_back[:, :, 1] = of_queries.transpose(1, 2), of_keys.transpose(1, 2)
    turn(turned_back, rotations_S2p2 * rotations_S2p2.new_tensor([1, -1]))
    projected, width, rows = projected.float().contiguous(), projected.shape[-1], projected.numel() // projected.shape[-1]
    _, mean, scale = torch.native_group_norm(projected, None, None, 1, rows, width, rows, epsilon)
    moments = (each.view(*projected.shape[:-1], 1) for each in (mean, scale))
    into.copy_(torch.ops.aten.native_layer_norm_backward(turned_back, projected, (width,), *moments, None, None, (True, False, False))[0])


def turn(heads: torch.Tensor, rotations_S2p2: torch.Tensor) -> torch.Tensor:
    """rotate for float32 heads (B, S, 2, A, d), in place."""
    torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(rotations_S2p2)[:, :, None])
    return heads


def queries_keys_in_one(projected: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Passes.queries_keys in one pass, half-split: a rotation is the sum of the numbers and of their others, each times a table."""
    normed, _ = normalize(projected, epsilon)
    normed = normed.unflatten(-1, (2, -1))                                                                     # B, S, 2, A, 2, p
    return (normed * cosines + normed.flip(-2) * sines).flatten(-2).to(projected.dtype).permute(2, 0, 3, 1, 4).contiguous()


def queries_keys_gradient_in_one(of_queries: torch.Tensor, of_keys: torch.Tensor, projected: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor,
                                 epsilon: float, into: torch.Tensor) -> None:
    """Passes.gradient in one pass, half-split."""
    normed, scale = normalize(projected, epsilon)
    turned = torch.stack([of_queries, of_keys], dim=1).permute(0, 3, 1, 2, 4).float().unflatten(-1, (2, -1))         # B, S, 2, A, 2, p
    gradient = (turned * cosines - turned.flip(-2) * sines).flatten(-2)
    into.copy_(scale * (gradient - gradient.mean(-1, keepdim=True) - normed * (gradient * normed).mean(-1, keepdim=True)))


def tables(rotations_S2p2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For halves: cosines, and sines by which the other of a pair is to be multiplied, (S, 2, 1, 2, p)."""
    cosines, sines = rotations_S2p2[:, :, None].unbind(-1)
    return torch.stack([cosines, cosines], dim=-2), torch.stack([-sines, sines], dim=-2)


def normalize(projected: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head's numbers less their mean over their deviation, in float32, and one over the deviation (..., 1)."""
    centred = projected.float() - projected.float().mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    return centred * scale, scale


KERNELS = Passes(False, queries_keys, queries_keys_gradient)


@functools.cache
def compiled_passes() -> Passes:
    """The passes compiled: when first called, once for each shape, some seconds."""
    forward, gradient = (torch.compile(each, dynamic=False) for each in (queries_keys_in_one, queries_keys_gradient_in_one))
    return Passes(True, lambda projected, rotations_S2p2, epsilon: forward(projected, *tables(rotations_S2p2), epsilon),
                  lambda of_queries, of_keys, projected, rotations_S2p2, epsilon, into:
                  gradient(of_queries, of_keys, projected, *tables(rotations_S2p2), epsilon, into))


def passes_for(x_BSD: torch.Tensor, layer: nn.Module, passes: Passes) -> Passes | None:
    """The passes by which a block without a cache goes for its input and its joint projection; None for plain operations."""
    if x_BSD.device.type != "cpu" or x_BSD.dtype != torch.bfloat16 or not x_BSD.requires_grad or torch.compiler.is_compiling():
        return None
    return KERNELS if passes.half_split and not is_untouched(layer, nn.Linear) else passes


def project(x_BSD: torch.Tensor, layer: nn.Module, heads: int, passes: Passes | None) -> torch.Tensor:
    """The joint projection (B, S, E) to queries, keys and values, with pairs as `passes` want them; without passes, interleaved."""
    if passes is None or not passes.half_split:
        return layer(x_BSD)
    return F.linear(x_BSD, HalfSplit.apply(layer.weight, heads, x_BSD.dtype))


class HalfSplit(torch.autograd.Function):
    """The weights (E, D) of a joint projection with their rows half-split, in a format that under autocast they are put into anyway."""

    @staticmethod
    def forward(ctx, weights: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """(E, D) half-split, of (E, D) interleaved."""
        ctx.heads, ctx.dtype = heads, weights.dtype
        result = torch.empty_like(weights, dtype=dtype)
        for into, rows in zip(by_pairs(result, heads, half_split=True), by_pairs(weights, heads, half_split=False), strict=True):
            into.copy_(rows)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the weights, interleaved."""
        result = torch.empty_like(gradient, dtype=ctx.dtype)
        for into, rows in zip(by_pairs(result, ctx.heads, half_split=False), by_pairs(gradient, ctx.heads, half_split=True), strict=True):
            into.copy_(rows)
        return result, None, None


def by_pairs(weights: torch.Tensor, heads: int, half_split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the rows (E, D) of a joint projection: (2 A, p, 2, D) of queries and keys, (D, D) of values."""
    rows = len(weights) // 3 * 2
    if half_split:
        return weights[:rows].unflatten(0, (2 * heads, 2, -1)).transpose(1, 2), weights[rows:]
    return weights[:rows].unflatten(0, (2 * heads, -1, 2)), weights[rows:]


class QueriesKeysValues(torch.autograd.Function):
    """queries_keys_values by a few passes, normalization and rotation in float32."""

    @staticmethod
    def forward(ctx, hidden_BSE: torch.Tensor, value_embeddings_BSD: torch.Tensor | None, rotations_S2p2: torch.Tensor, heads: int,
                epsilon: float, passes: Passes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, (B, A, S, d) each."""
        projected = hidden_BSE.unflatten(-1, (3, heads, -1))                                                   # B, S, 3, A, d
        queries, keys = passes.queries_keys(projected[:, :, :2], rotations_S2p2, epsilon)
        values = projected[:, :, 2].transpose(1, 2)
        values = values.new_empty(values.shape).copy_(values) if value_embeddings_BSD is None else torch.add(
            values, value_embeddings_BSD.unflatten(-1, (heads, -1)).transpose(1, 2), out=values.new_empty(values.shape))
        ctx.save_for_backward(hidden_BSE, rotations_S2p2)
        ctx.heads, ctx.epsilon, ctx.passes, ctx.has_embeddings = heads, epsilon, passes, value_embeddings_BSD is not None
        return queries, keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx, of_queries: torch.Tensor, of_keys: torch.Tensor, of_values: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the joint projection and of the embeddings, by those of queries, keys and values."""
        hidden_BSE, rotations_S2p2 = ctx.saved_tensors
        projected = hidden_BSE.unflatten(-1, (3, ctx.heads, -1))                                               # B, S, 3, A, d
        result_BSE = torch.empty_like(hidden_BSE)
        parts = result_BSE.unflatten(-1, (3, ctx.heads, -1))
        ctx.passes.gradient(of_queries, of_keys, projected[:, :, :2], rotations_S2p2, ctx.epsilon, parts[:, :, :2])
        parts[:, :, 2] = of_values.transpose(1, 2)
        embeddings_BSD = result_BSE[..., -hidden_BSE.shape[-1] // 3:] if ctx.has_embeddings else None
        return result_BSE, embeddings_BSD, None, None, None, None


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask_SS: torch.Tensor | None = None) -> torch.Tensor:
    """What the heads mix (B, A, S, d), of queries, keys and values (B, A, S, d), under a mask or, without one, of those before and oneself."""
    if mask_SS is None and trains_by_products(queries, keys):
        return AttentionByProducts.apply(queries, keys, values)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask_SS, is_causal=mask_SS is None and queries.shape[2] > 1)


def trains_by_products(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether AttentionByProducts is for these queries and keys."""
    return (queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and queries.requires_grad and queries.shape == keys.shape
            and queries.shape[2] <= LONGEST and not torch.compiler.is_compiling())


class AttentionByProducts(torch.autograd.Function):
    """attend, causal, for short sequences: weights are kept, rounded to the format of the input, as scores are before them."""

    @staticmethod
    def forward(ctx, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What the heads mix."""
        heads, length, width = queries.shape[1:]
        queries, keys, values = (each.flatten(0, 1) for each in (queries, keys, values))                       # B A, S, d
        unseen_SS = queries.new_full((length, length), -torch.inf).triu(1)                                     # what a position must not see
        weights = torch.baddbmm(unseen_SS, queries, keys.transpose(1, 2), alpha=width**-0.5).softmax(dim=-1)   # B A, S, S
        ctx.save_for_backward(queries, keys, values, weights)
        return torch.bmm(weights, values).unflatten(0, (-1, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of queries, keys and values."""
        queries, keys, values, weights = ctx.saved_tensors
        gradients = gradient.flatten(0, 1)                                                                     # B A, S, d
        of_scores = torch._softmax_backward_data(torch.bmm(gradients, values.transpose(1, 2)), weights, -1, weights.dtype)
        of_scores *= queries.shape[-1]**-0.5                                                                   # B A, S, S
        found = torch.bmm(of_scores, keys), torch.bmm(of_scores.transpose(1, 2), queries), torch.bmm(weights.transpose(1, 2), gradients)
        return tuple(each.unflatten(0, gradient.shape[:2]) for each in found)
