"""Attention as matrix products, for training with short sequences in bf16 on a CPU.

torch's attention kernel is made for long sequences. For short ones, its backward pass takes several times as long as the few products that it
consists of.

In comments: B batch, S sequence, A heads, d head dimension.
"""

import torch
import torch.nn.functional as F

MAX_MATMUL_LENGTH = 256
"""The longest sequence for which attention is computed as matrix products. They keep the attention weights for the gradient."""


def reference(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """What matmul_attention computes: softmax(Q K^T / sqrt(d) + mask) V, (B, A, S, d). If causal, the mask is -inf for later positions."""
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal)


def can_use_matmul_attention(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether matmul_attention supports these queries and keys and is faster: short sequences in training, in bf16 on a CPU."""
    return (queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and queries.requires_grad and queries.shape == keys.shape
            and queries.shape[2] <= MAX_MATMUL_LENGTH)


def matmul_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """The attention output (B, A, S, d). Scores and weights are rounded to the dtype of the inputs."""
    heads, length, width = queries.shape[1:]
    queries, keys, values = (each.flatten(0, 1) for each in (queries, keys, values))                   # B A, S, d
    mask = queries.new_full((length, length), -torch.inf).triu(1) if is_causal else queries.new_zeros(())
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=width**-0.5)                     # B A, S, S
    return torch.bmm(scores.softmax(dim=-1), values).unflatten(0, (-1, heads))
