"""Attention of one query per head as two matrix products, for sampling on a CPU.

torch's attention kernel is made for many queries. In bf16, it takes longer than products in float32, even with a thousand keys. So the key-value
cache of a bf16 model is in float32 on a CPU (stage2_prior/generation/decoding.py).

In comments: N rows, A heads of queries, d head dimension, S positions in the cache.
"""

import torch
import torch.nn.functional as F


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask_1S: torch.Tensor | None = None) -> torch.Tensor:
    """What single_query_attention computes, (N, A, 1, d): masked softmax(q K^T / sqrt(d)) V. Several heads may share keys and values."""
    return F.scaled_dot_product_attention(query, keys.to(query.dtype), values.to(query.dtype), attn_mask=mask_1S,
                                          enable_gqa=query.shape[1] != keys.shape[1])


def can_use_single_query_attention(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether single_query_attention supports these inputs and is faster: one query without gradient and float32 keys, on a CPU."""
    return query.device.type == "cpu" and query.shape[2] == 1 and keys.dtype == torch.float32 and not (query.requires_grad or keys.requires_grad)


def single_query_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask_1S: torch.Tensor | None = None) -> torch.Tensor:
    """The attention output (N, A, 1, d) in the dtype of the query, computed in float32.

    Args:
        query: (N, A, 1, d).
        keys, values: (N, key heads, S, d) in float32. Each key head serves A / key heads query heads.
        mask_1S: True for the keys to attend to; None for all keys.
    """
    rows, key_heads, positions, width = keys.shape
    queries = (query.float() * width**-0.5).reshape(rows * key_heads, -1, width)                       # N key heads, queries per key head, d
    scores = torch.bmm(queries, keys.reshape(rows * key_heads, positions, width).transpose(1, 2))      # N key heads, queries per key head, S
    if mask_1S is not None:
        scores.masked_fill_(~mask_1S, -torch.inf)
    return torch.bmm(scores.softmax(dim=-1), values.reshape(rows * key_heads, positions, width)).view(query.shape).to(query.dtype)
