"""What the prior is trained to make small; in float32 whatever the logits are."""

import torch
import torch.nn.functional as F


def next_token_loss(logits_BTK: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token, in float32."""
    return F.cross_entropy(logits_BTK.float().flatten(0, 1), ids_BT.flatten())


def z_loss(logits_BTK: torch.Tensor) -> torch.Tensor:
    """Mean of (log sum_k exp(logit_k))^2 over the positions, in float32: 0 where the logits are normalized log probabilities already.

    Logits of -inf, which pad the smaller of several grids, count for nothing. Source: PaLM (Chowdhery et al. 2022, section 5), where its
    weight is 1e-4.
    """
    return logits_BTK.float().logsumexp(dim=-1).square().mean()
