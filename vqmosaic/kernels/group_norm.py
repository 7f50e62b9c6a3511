"""GroupNorm, optionally followed by swish, for bf16 training on a CPU in channels_last, the memory format that is fastest for convolutions.

torch's channels_last kernels for GroupNorm are slow on CPUs, except the forward pass for large images. The backward pass is up to ten times as slow
as in the contiguous format (torch 2.13). Changing the format before and after costs far less.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class GroupNorm(nn.GroupNorm):
    """GroupNorm with 32 groups and eps 1e-6, optionally followed by swish, x sigmoid(x)."""

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x_BCHW: torch.Tensor, swish: bool = False) -> torch.Tensor:
        """(B, C, H, W) in the memory format of the input, and in its dtype unless autocast chooses another."""
        compute = ReorderedGroupNorm.apply if can_reorder(x_BCHW) else reference
        return compute(x_BCHW, self.weight, self.bias, self.num_groups, self.eps, swish)


def reference(x_BCHW: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, groups: int, eps: float, swish: bool) -> torch.Tensor:
    """What ReorderedGroupNorm computes: GroupNorm, followed by swish if asked for."""
    normed_BCHW = F.group_norm(x_BCHW, groups, weight_C, bias_C, eps)
    return F.silu(normed_BCHW) if swish else normed_BCHW


def can_reorder(x_BCHW: torch.Tensor) -> bool:
    """Whether ReorderedGroupNorm is faster for this input: in training, in bf16 and channels_last on a CPU, but not under torch.compile."""
    return (x_BCHW.device.type == "cpu" and x_BCHW.dtype == torch.bfloat16 and x_BCHW.requires_grad and not torch.compiler.is_compiling()
            and x_BCHW.is_contiguous(memory_format=torch.channels_last))


class ReorderedGroupNorm(torch.autograd.Function):
    """GroupNorm of a channels_last tensor, computed by the kernels for contiguous tensors."""

    @staticmethod
    def forward(ctx, x_BCHW: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, groups: int, eps: float, swish: bool) -> torch.Tensor:
        """(B, C, H, W) in channels_last."""
        batch, channels, height, width = x_BCHW.shape
        if height * width < 1024:  # for larger images, torch has a fast channels_last kernel
            x_BCHW = x_BCHW.contiguous()
        normed, mean, scale = torch.native_group_norm(x_BCHW, weight_C, bias_C, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x_BCHW, normed if swish else None, mean, scale, weight_C)
        ctx.groups = groups
        result = normed.contiguous(memory_format=torch.channels_last)
        return F.silu(result, inplace=result is not normed) if swish else result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_BCHW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the input, weight and bias."""
        x_BCHW, normed, mean, scale, weight_C = ctx.saved_tensors
        batch, channels, height, width = x_BCHW.shape
        if normed is not None:
            if gradient_BCHW.stride() != normed.stride():
                gradient_BCHW = torch.empty_like(normed).copy_(gradient_BCHW)
            gradient_BCHW = torch.ops.aten.silu_backward(gradient_BCHW, normed)
        gradient_of_x, gradient_of_weight, gradient_of_bias = torch.ops.aten.native_group_norm_backward(
            gradient_BCHW.contiguous(), x_BCHW.contiguous(), mean, scale, weight_C, batch, channels, height * width, ctx.groups, (True, True, True))
        return gradient_of_x.contiguous(memory_format=torch.channels_last), gradient_of_weight, gradient_of_bias, None, None, None
