"""Losses of the prior, computed in float32 for logits of any dtype."""

import torch
import torch.nn.functional as F

from vqmosaic.kernels.chunked_cross_entropy import ChunkedCrossEntropy, can_use_chunked_cross_entropy


def next_token_loss(logits_BTK: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token, in float32."""
    logits_NK, ids_N = logits_BTK.flatten(0, 1), ids_BT.flatten()
    if can_use_chunked_cross_entropy(logits_NK):
        return ChunkedCrossEntropy.apply(logits_NK, ids_N)
    return F.cross_entropy(logits_NK.float(), ids_N)


def z_loss(logits_BTK: torch.Tensor) -> torch.Tensor:
    """Mean of (log sum_k exp(logit_k))^2 over the positions, in float32: 0 if the logits are normalized log probabilities.

    Logits of -inf, which pad the smaller of several grids, contribute nothing. Source: PaLM (Chowdhery et al. 2022, section 5), with weight
    1e-4.
    """
    return logits_BTK.float().logsumexp(dim=-1).square().mean()
