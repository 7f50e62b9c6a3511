"""Causal self-attention of a GridTransformer: query and key normalization in each head, rotary embedding, attention.

Each function has the plain operators. For training in bf16 on a CPU, the kernels of vqmosaic/kernels compute the same faster: rotary.py what lies
between the joint projection and attention, matmul_attention.py the attention of short sequences.

In comments: B batch, S sequence, D width, E = 3 D outputs of the joint projection, A heads, d head dimension (A d = D), p pairs of a head.
"""

import torch
import torch.nn.functional as F

from vqmosaic.kernels.matmul_attention import MatmulAttention, can_use_matmul_attention
from vqmosaic.kernels.rotary import QueriesKeysValues, RotaryKernels


def queries_keys_values(hidden_BSE: torch.Tensor, value_embeddings_BSD: torch.Tensor | None, rotations_S2p2: torch.Tensor, heads: int, epsilon: float,
                        kernels: RotaryKernels | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalized and rotated queries and keys, and values, (B, A, S, d) each, from the joint projection.

    Value embeddings, if given, are added to the values. `kernels` come from select_kernels (rotary.py); None means plain operators.
    """
    if kernels is not None:
        return QueriesKeysValues.apply(hidden_BSE, value_embeddings_BSD, rotations_S2p2, heads, epsilon, kernels)
    # split, because the gradient of indexing would allocate a full tensor of zeros for each part
    projected, values = hidden_BSE.unflatten(-1, (3, heads, -1)).split((2, 1), dim=2)                          # B, S, 2 or 1, A, d
    queries, keys = rotate(F.layer_norm(projected, projected.shape[-1:], eps=epsilon), rotations_S2p2[:, :, None]).unbind(2)
    values = values.squeeze(2)
    if value_embeddings_BSD is not None:
        values = values + value_embeddings_BSD.view(values.shape)
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def rotate(heads: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbours in heads (..., d) by a cosine and a sine (..., p, 2), which broadcast."""
    pairs = (heads if heads.dtype == torch.float64 else heads.float()).unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling() and heads.dtype != torch.float64:  # complex product: one kernel, but torch.compile does not support it
        rotated = torch.view_as_complex(pairs) * torch.view_as_complex(rotations)
        return torch.view_as_real(rotated).flatten(-2).to(heads.dtype)
    (first, second), (cosines, sines) = pairs.unbind(-1), rotations.unbind(-1)
    return torch.stack([first * cosines - second * sines, first * sines + second * cosines], dim=-1).flatten(-2).to(heads.dtype)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask_SS: torch.Tensor | None = None) -> torch.Tensor:
    """Attention output (B, A, S, d) for queries, keys and values (B, A, S, d). Causal if there is no mask."""
    if mask_SS is None and can_use_matmul_attention(queries, keys):
        return MatmulAttention.apply(queries, keys, values)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask_SS, is_causal=mask_SS is None and queries.shape[2] > 1)
