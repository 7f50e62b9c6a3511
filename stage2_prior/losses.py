"""What the prior is trained to make small; in float32 whatever the logits are."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

NUMBERS = 2**17
"""Logits that are looked at together, a part of a processor's cache."""


def next_token_loss(logits_BTK: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token, in float32."""
    logits_NK, ids_N = logits_BTK.flatten(0, 1), ids_BT.flatten()
    if logits_NK.device.type == "cpu" and logits_NK.requires_grad and not torch.compiler.is_compiling():
        return CrossEntropyInParts.apply(logits_NK, ids_N)
    return F.cross_entropy(logits_NK.float(), ids_N)


class CrossEntropyInParts(torch.autograd.Function):
    """The mean cross-entropy and, at once, its gradient, some rows at a time: the float32 numbers between stay in the processor's cache."""

    @staticmethod
    def forward(ctx, logits_NK: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        """A scalar in float32."""
        losses_N = logits_NK.new_empty(len(ids_N), dtype=torch.float32)
        gradient_NK = torch.empty_like(logits_NK)
        rows = max(1, NUMBERS // logits_NK.shape[1])
        for logits, ids, losses, gradient in zip(*(each.split(rows) for each in (logits_NK, ids_N, losses_N, gradient_NK)), strict=True):
            log_probabilities = logits.float().log_softmax(dim=-1)
            losses.copy_(log_probabilities.gather(1, ids[:, None])[:, 0])
            probabilities = log_probabilities.exp_()
            probabilities.scatter_add_(1, ids[:, None], probabilities.new_full((len(ids), 1), -1.0))
            torch.div(probabilities, len(ids_N), out=gradient)
        ctx.save_for_backward(gradient_NK)
        return -losses_N.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of the logits."""
        gradient_NK, = ctx.saved_tensors
        return gradient_NK if float(gradient) == 1 else gradient_NK * gradient, None  # it is 1 but where micro-batches are added up


def z_loss(logits_BTK: torch.Tensor) -> torch.Tensor:
    """Mean of (log sum_k exp(logit_k))^2 over the positions, in float32: 0 where the logits are normalized log probabilities already.

    Logits of -inf, which pad the smaller of several grids, count for nothing. Source: PaLM (Chowdhery et al. 2022, section 5), where its
    weight is 1e-4.
    """
    return logits_BTK.float().logsumexp(dim=-1).square().mean()
