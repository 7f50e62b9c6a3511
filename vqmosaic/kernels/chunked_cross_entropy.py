"""Mean cross-entropy for training on a CPU, with the gradient computed in the forward pass, in chunks of rows.

The float32 intermediates of a chunk stay in the CPU's cache. Not measured since the move.

Shape suffixes: N tokens of a batch, K codes.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**17
"""Logits processed at a time on a CPU. The float32 intermediates of a chunk fit in its cache."""


def reference(logits_NK: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """What ChunkedCrossEntropy computes: the mean of -log softmax(logits)[id], in float32."""
    return F.cross_entropy(logits_NK.float(), ids_N)


def can_use_chunked_cross_entropy(logits_NK: torch.Tensor) -> bool:
    """Whether ChunkedCrossEntropy is faster for these logits: in training on a CPU, but not under torch.compile."""
    return logits_NK.device.type == "cpu" and logits_NK.requires_grad and not torch.compiler.is_compiling()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy that also computes its gradient in the forward pass, in chunks of rows: float32 intermediates stay in the CPU's cache."""

    @staticmethod
    def forward(ctx, logits_NK: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        """The mean loss, a float32 scalar."""
        losses_N = logits_NK.new_empty(len(ids_N), dtype=torch.float32)
        gradient_NK = torch.empty_like(logits_NK)
        chunk_rows = max(1, CHUNK_ELEMENTS // logits_NK.shape[1])
        for logits, ids, losses, gradient in zip(*(each.split(chunk_rows) for each in (logits_NK, ids_N, losses_N, gradient_NK)), strict=True):
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
        return gradient_NK if float(gradient) == 1 else gradient_NK * gradient, None  # 1 except with gradient accumulation
