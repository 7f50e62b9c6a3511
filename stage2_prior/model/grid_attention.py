"""Causal self-attention of a GridTransformer: query and key normalization in each head, rotary embedding, attention.

On some devices, vqmosaic/kernels has faster implementations of the last two.

In comments: B batch, S sequence, E = 3 D outputs of the joint projection, A heads, d head dimension (A d = D), p pairs of a head.
Rotations are (S, 2, p, 2): a cosine and a sine for each position, for queries and keys, and for each pair; or (B, S, 2, p, 2) if the order of
tokens differs between sequences.
"""

import torch
import torch.nn.functional as F

from vqmosaic.kernels import complex_rotation
from vqmosaic.kernels.matmul_attention import can_use_matmul_attention, matmul_attention
from vqmosaic.kernels.single_query_attention import can_use_single_query_attention, single_query_attention


def queries_keys_values(hidden_BSE: torch.Tensor, value_embeddings_BSD: torch.Tensor | None, rotations: torch.Tensor, heads: int,
                        epsilon: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalized and rotated queries and keys, and values, (B, A, S, d) each, from the joint projection.

    Value embeddings, if given, are added to the values.
    """
    queries_and_keys, values = hidden_BSE.unflatten(-1, (3, heads, -1)).split((2, 1), dim=2)                   # B, S, 2 or 1, A, d
    queries, keys = normalize_and_rotate(queries_and_keys, rotations, epsilon).unbind(2)
    values = values.squeeze(2)
    if value_embeddings_BSD is not None:
        values = values + value_embeddings_BSD.view(values.shape)
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def normalize_and_rotate(heads: torch.Tensor, rotations: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Heads (..., A, d), each normalized, then rotated by rotations (..., p, 2), which are the same for all A heads."""
    return rotate(F.layer_norm(heads, heads.shape[-1:], eps=epsilon), rotations[..., None, :, :])


def rotate(heads: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbouring dimensions of heads (..., d) by rotations (..., p, 2), a cosine and a sine for each pair.

    The leading dimensions broadcast. Computes in float32, or in float64 if the heads are float64.
    """
    if complex_rotation.can_rotate_as_complex(heads):
        return complex_rotation.rotate_as_complex(heads, rotations)
    return complex_rotation.reference(heads, rotations)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask_SS: torch.Tensor | None = None,
           is_causal: bool = True) -> torch.Tensor:
    """Attention output (B, A, S, d) for queries, keys and values (B, A, S, d). Without a mask, causal or of all queries to all keys."""
    if mask_SS is None and can_use_matmul_attention(queries, keys):
        return matmul_attention(queries, keys, values, is_causal)
    if can_use_single_query_attention(queries, keys):
        return single_query_attention(queries, keys, values, mask_SS)
    is_causal = is_causal and mask_SS is None and queries.shape[2] > 1
    # a key-value cache may have another dtype than the model
    return F.scaled_dot_product_attention(queries.to(keys.dtype), keys, values, attn_mask=mask_SS, is_causal=is_causal).to(queries.dtype)
