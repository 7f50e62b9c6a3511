"""A GridTransformer's self-attention from its joint projection on: queries and keys normalized in each head, rotated by places, causal.

Once in plain operations, and once for training in bf16 on a CPU. There torch's kernel takes, for short sequences, ten times as long for the gradient
as the few products that it is; and the passes between them, each over memory that no cache holds, cost more than the products, unless
torch.compile makes one of them.

In comments: B batch, S sequence, D width, A heads, d width of a head (A d = D), p its pairs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LONGEST = 256
"""Positions up to which weights of all pairs are kept for the gradient."""


def queries_keys_values(hidden_BSE: torch.Tensor, rotations_S2p2: torch.Tensor, heads: int, epsilon: float) -> tuple[torch.Tensor, ...]:
    """Queries and keys, normalized and rotated, and values, (B, S, A, d) each, of what E = 3 D numbers hold."""
    hidden = hidden_BSE.unflatten(-1, (3, heads, -1))                                                          # B, S, 3, A, d
    queries_keys = rotate(F.layer_norm(hidden[:, :, :2], hidden.shape[-1:], eps=epsilon), rotations_S2p2[:, :, None])
    return *queries_keys.unbind(2), hidden[:, :, 2]


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

    queries_keys: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """Of the projections (B, S, 2, A, d) of queries and keys, of rotations and epsilon: those normalized and rotated, (2, B, A, S, d)."""
    gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    """Of the gradient (2, B, A, S, d) of these, of the projections, of rotations and epsilon: the gradient (B, S, 2, A, d) of the projections."""


def queries_keys(projected: torch.Tensor, rotations_S2p2: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Passes.queries_keys by torch's kernels: rows are normalized as groups of a GroupNorm, whose kernel takes half of the time of LayerNorm's."""
    rows = projected.numel() // projected.shape[-1]
    normed, _, _ = torch.native_group_norm(projected.float().contiguous(), None, None, 1, rows, projected.shape[-1], rows, epsilon)
    turned = turn(normed.view(projected.shape), rotations_S2p2).permute(2, 0, 3, 1, 4)
    return projected.new_empty(turned.shape).copy_(turned)


def queries_keys_gradient(gradient: torch.Tensor, projected: torch.Tensor, rotations_S2p2: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Passes.gradient by torch's kernels; means and deviations are computed again."""
    turned_back = projected.new_empty(projected.shape, dtype=torch.float32).copy_(gradient.permute(1, 3, 0, 2, 4))
    turn(turned_back, rotations_S2p2 * rotations_S2p2.new_tensor([1, -1]))
    projected, width, rows = projected.float().contiguous(), projected.shape[-1], projected.numel() // projected.shape[-1]
    _, mean, scale = torch.native_group_norm(projected, None, None, 1, rows, width, rows, epsilon)
    moments = (each.view(*projected.shape[:-1], 1) for each in (mean, scale))
    return torch.ops.aten.native_layer_norm_backward(turned_back, projected, (width,), *moments, None, None, (True, False, False))[0]


def turn(heads: torch.Tensor, rotations_S2p2: torch.Tensor) -> torch.Tensor:
    """rotate for float32 heads (B, S, 2, A, d), in place."""
    torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(rotations_S2p2)[:, :, None])
    return heads


def queries_keys_in_one(projected: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Passes.queries_keys in one pass: a rotation is the sum of the numbers and of their neighbours, each times a table."""
    normed, _ = normalize(projected, epsilon)
    return (normed * cosines + swap(normed) * sines).to(projected.dtype).permute(2, 0, 3, 1, 4).contiguous()


def queries_keys_gradient_in_one(gradient: torch.Tensor, projected: torch.Tensor, rotations_S2p2: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Passes.gradient in one pass."""
    normed, scale = normalize(projected, epsilon)
    first, second = gradient.permute(1, 3, 0, 2, 4).float().unflatten(-1, (-1, 2)).unbind(-1)                  # B, S, 2, A, p each
    cosines, sines = rotations_S2p2[:, :, None].unbind(-1)
    gradient = torch.stack([first * cosines + second * sines, second * cosines - first * sines], dim=-1).flatten(-2)
    return (scale * (gradient - gradient.mean(-1, keepdim=True) - normed * (gradient * normed).mean(-1, keepdim=True))).to(projected.dtype)


def tables(rotations_S2p2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines (S, 2, 1, d), and sines by which the other of a pair is to be multiplied."""
    cosines, sines = rotations_S2p2[:, :, None].unbind(-1)
    return cosines.repeat_interleave(2, -1), torch.stack([-sines, sines], dim=-1).flatten(-2)


def swap(x: torch.Tensor) -> torch.Tensor:
    """x with the two of each pair of neighbours in the last dimension in each other's place."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def normalize(projected: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head's numbers less their mean over their deviation, in float32, and one over the deviation (..., 1)."""
    centred = projected.float() - projected.float().mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    return centred * scale, scale


KERNELS = Passes(queries_keys, queries_keys_gradient)


@functools.cache
def compiled_passes() -> Passes:
    """The passes compiled: when first called, once for each shape, some seconds."""
    forward, gradient = (torch.compile(each, dynamic=False) for each in (queries_keys_in_one, queries_keys_gradient_in_one))
    return Passes(lambda projected, rotations_S2p2, epsilon: forward(projected, *tables(rotations_S2p2), epsilon), gradient)


def trains_by_passes(hidden_BSE: torch.Tensor) -> bool:
    """Whether attend is for this input."""
    return (hidden_BSE.device.type == "cpu" and hidden_BSE.dtype == torch.bfloat16 and hidden_BSE.requires_grad and hidden_BSE.shape[1] <= LONGEST
            and not torch.compiler.is_compiling())


def attend(hidden_BSE: torch.Tensor, value_embeddings_BSD: torch.Tensor | None, rotations_S2p2: torch.Tensor, heads: int, epsilon: float,
           passes: Passes = KERNELS) -> torch.Tensor:
    """Causal attention over whole sequences: what the heads mix, (B, S, D). Embeddings, if there are any, are added to the values."""
    return AttentionByPasses.apply(hidden_BSE, value_embeddings_BSD, rotations_S2p2, heads, epsilon, passes)


class AttentionByPasses(torch.autograd.Function):
    """attend: normalization and rotation in float32, products in the format of the input, and scores rounded to it."""

    @staticmethod
    def forward(ctx, hidden_BSE: torch.Tensor, value_embeddings_BSD: torch.Tensor | None, rotations_S2p2: torch.Tensor, heads: int,
                epsilon: float, passes: Passes) -> torch.Tensor:
        """What the heads mix, (B, S, D)."""
        length = hidden_BSE.shape[1]
        projected = hidden_BSE.unflatten(-1, (3, heads, -1))                                                   # B, S, 3, A, d
        queries, keys = passes.queries_keys(projected[:, :, :2], rotations_S2p2, epsilon).flatten(1, 2)        # B A, S, d each
        values = projected[:, :, 2].transpose(1, 2).clone(memory_format=torch.contiguous_format)               # B, A, S, d
        if value_embeddings_BSD is not None:
            values += value_embeddings_BSD.unflatten(-1, (heads, -1)).transpose(1, 2)
        values = values.flatten(0, 1)                                                                          # B A, S, d
        unseen_SS = hidden_BSE.new_full((length, length), -torch.inf).triu(1)                                  # what a position must not see
        weights = torch.baddbmm(unseen_SS, queries, keys.transpose(1, 2), alpha=queries.shape[-1]**-0.5).softmax(dim=-1)  # B A, S, S
        ctx.save_for_backward(hidden_BSE, rotations_S2p2, queries, keys, values, weights)
        ctx.heads, ctx.epsilon, ctx.passes, ctx.has_embeddings = heads, epsilon, passes, value_embeddings_BSD is not None
        return torch.bmm(weights, values).unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_BSD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the joint projection and of the embeddings."""
        hidden_BSE, rotations_S2p2, queries, keys, values, weights = ctx.saved_tensors
        projected = hidden_BSE.unflatten(-1, (3, ctx.heads, -1))
        mixed = gradient_BSD.unflatten(-1, (ctx.heads, -1)).transpose(1, 2).flatten(0, 1)                      # B A, S, d
        scores = torch._softmax_backward_data(torch.bmm(mixed, values.transpose(1, 2)), weights, -1, weights.dtype)
        scores *= queries.shape[-1]**-0.5                                                                      # B A, S, S
        both = torch.empty(2, *queries.shape, dtype=queries.dtype)
        torch.bmm(scores, keys, out=both[0])
        torch.bmm(scores.transpose(1, 2), queries, out=both[1])
        result_BSE = torch.empty_like(hidden_BSE)
        parts = result_BSE.unflatten(-1, (3, ctx.heads, -1))
        parts[:, :, :2] = ctx.passes.gradient(both.unflatten(1, (-1, ctx.heads)), projected[:, :, :2], rotations_S2p2, ctx.epsilon)
        parts[:, :, 2] = torch.bmm(weights.transpose(1, 2), mixed).unflatten(0, (-1, ctx.heads)).transpose(1, 2)
        embeddings = result_BSE[..., -gradient_BSD.shape[-1]:] if ctx.has_embeddings else None
        return result_BSE, embeddings, None, None, None, None
