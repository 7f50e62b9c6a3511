"""Attention as matrix products, for training with short sequences in bf16 on a CPU. Two functions: causal with heads, and not causal with one head.

For short sequences, the backward pass of torch's attention kernel takes ten times as long as the few matrix products that it consists of (causal,
with heads), and is up to four times slower than that of separate products (one head). Not measured since the move.

In comments: B batch, S sequence, A heads, d head dimension, N positions, C channels.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

MAX_MATMUL_LENGTH = 256
"""Attention by matrix products, which keeps the attention weights for the gradient, is used up to this sequence length."""


def reference(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What MatmulAttention computes: softmax(Q K^T / sqrt(d) + mask) V, (B, A, S, d), with a mask of -inf for later positions."""
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)


def can_use_matmul_attention(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether MatmulAttention supports these queries and keys: short sequences in training, in bf16 on a CPU."""
    return (queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and queries.requires_grad and queries.shape == keys.shape
            and queries.shape[2] <= MAX_MATMUL_LENGTH and not torch.compiler.is_compiling())


class MatmulAttention(torch.autograd.Function):
    """Causal attention by matrix products, for short sequences. Keeps the weights. Scores and weights are rounded to the dtype of the input."""

    @staticmethod
    def forward(ctx, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The attention output (B, A, S, d)."""
        heads, length, width = queries.shape[1:]
        queries, keys, values = (each.flatten(0, 1) for each in (queries, keys, values))                       # B A, S, d
        mask_SS = queries.new_full((length, length), -torch.inf).triu(1)                                       # -inf for later positions
        weights = torch.baddbmm(mask_SS, queries, keys.transpose(1, 2), alpha=width**-0.5).softmax(dim=-1)     # B A, S, S
        ctx.save_for_backward(queries, keys, values, weights)
        return torch.bmm(weights, values).unflatten(0, (-1, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of queries, keys and values."""
        queries, keys, values, weights = ctx.saved_tensors
        grad_mixed = gradient.flatten(0, 1)                                                                    # B A, S, d
        grad_scores = torch._softmax_backward_data(torch.bmm(grad_mixed, values.transpose(1, 2)), weights, -1, weights.dtype)
        grad_scores *= queries.shape[-1]**-0.5                                                                 # B A, S, S
        gradients = torch.bmm(grad_scores, keys), torch.bmm(grad_scores.transpose(1, 2), queries), torch.bmm(weights.transpose(1, 2), grad_mixed)
        return tuple(each.unflatten(0, gradient.shape[:2]) for each in gradients)


def single_head_reference(query_BNC: torch.Tensor, key_BNC: torch.Tensor, value_BNC: torch.Tensor) -> torch.Tensor:
    """What single_head_matmul_attention computes: softmax(Q K^T / sqrt(C)) V, (B, N, C)."""
    return F.scaled_dot_product_attention(query_BNC[:, None], key_BNC[:, None], value_BNC[:, None])[:, 0]


def can_use_single_head_matmul_attention(query_BNC: torch.Tensor) -> bool:
    """Whether single_head_matmul_attention is faster for these queries: few positions in training, in bf16 on a CPU."""
    return (query_BNC.device.type == "cpu" and query_BNC.dtype == torch.bfloat16 and query_BNC.requires_grad
            and query_BNC.shape[1] <= MAX_MATMUL_LENGTH)


def single_head_matmul_attention(query_BNC: torch.Tensor, key_BNC: torch.Tensor, value_BNC: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(C)) V, (B, N, C), as two batched products with torch's own gradients."""
    scores_BNN = torch.baddbmm(query_BNC.new_zeros(()), query_BNC, key_BNC.transpose(1, 2), alpha=query_BNC.shape[2]**-0.5)
    return torch.bmm(scores_BNN.softmax(dim=-1), value_BNC)
