"""Losses of the prior, computed in float32 for logits of any dtype."""

import torch
import torch.nn.functional as F


def next_token_loss(logits_BTK: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token, in float32."""
    return F.cross_entropy(logits_BTK.flatten(0, 1).float(), ids_BT.flatten())


def z_loss(logits_BTK: torch.Tensor) -> torch.Tensor:
    """Mean of (log sum_k exp(logit_k))^2 over the positions, in float32: 0 if the logits are normalized log probabilities.

    Logits of -inf, which pad the smaller of several grids, contribute nothing. Source: PaLM (Chowdhery et al. 2022, section 5), with weight
    1e-4.
    """
    return logits_BTK.float().logsumexp(dim=-1).square().mean()
