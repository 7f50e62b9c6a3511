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
        in_bf16_on_cpu = x_BCHW.device.type == "cpu" and x_BCHW.dtype == torch.bfloat16 and x_BCHW.requires_grad
        if in_bf16_on_cpu and torch.compiler.is_compiling():
            normed = self.as_affine(x_BCHW)
            return F.silu(normed).to(x_BCHW.dtype) if swish else normed.to(x_BCHW.dtype)
        if in_bf16_on_cpu and x_BCHW.is_contiguous(memory_format=torch.channels_last):
            return ReorderedGroupNorm.apply(x_BCHW, self.weight, self.bias, self.num_groups, self.eps, swish)
        normed = super().forward(x_BCHW)
        return F.silu(normed) if swish else normed

    def as_affine(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """GroupNorm in float32 as a scale and a shift for each channel of each image, which torch.compile turns into few passes over the data.

        Means over groups, and their way back to channels, are products with a matrix (C, G): the compiler computes their results once and not for
        each element. They are in float64, because a variance is the small difference of large numbers, and float32 products may have been set to a
        lower precision.
        """
        x_BCHW = x_BCHW.float()
        channels = x_BCHW.shape[1]
        group_C = torch.arange(channels, device=x_BCHW.device) // (channels // self.num_groups)
        is_in_CG = (group_C[:, None] == torch.arange(self.num_groups, device=x_BCHW.device)).double()
        with torch.autocast(x_BCHW.device.type, enabled=False):
            moments = torch.cat([x_BCHW.mean((2, 3)), x_BCHW.square().mean((2, 3))]).double() @ is_in_CG * (self.num_groups / channels)
            mean_BG, square_BG = moments.chunk(2)
            scale_BG = torch.rsqrt((square_BG - mean_BG.square()).clamp_min(0) + self.eps)
            scale_BC, shift_BC = (torch.cat([scale_BG, mean_BG * scale_BG]) @ is_in_CG.T).float().chunk(2)
        a_BC, b_BC = scale_BC * self.weight, self.bias - shift_BC * self.weight
        return x_BCHW * a_BC[:, :, None, None] + b_BC[:, :, None, None]


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
