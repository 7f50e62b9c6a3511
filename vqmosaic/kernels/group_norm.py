"""GroupNorm with swish after it, for training in bf16 on a CPU with channels that come last, the memory order that its convolutions like.

torch's kernels for that order are slow there, all but the one for the forward pass over large pictures, and that of the gradient up to ten times as
slow as for the other order (torch 2.13): changing the order before and after costs less by far.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class GroupNorm(nn.GroupNorm):
    """GroupNorm with 32 groups and eps 1e-6, with or without swish, x sigmoid(x), after it."""

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x_BCHW: torch.Tensor, swish: bool = False) -> torch.Tensor:
        """(B, C, H, W) of the input's memory order, and of its format where autocast does not choose another."""
        in_bf16_on_cpu = x_BCHW.device.type == "cpu" and x_BCHW.dtype == torch.bfloat16 and x_BCHW.requires_grad
        if in_bf16_on_cpu and torch.compiler.is_compiling():
            normed = self.as_line(x_BCHW)
            return F.silu(normed).to(x_BCHW.dtype) if swish else normed.to(x_BCHW.dtype)
        if in_bf16_on_cpu and x_BCHW.is_contiguous(memory_format=torch.channels_last):
            return ReorderedGroupNorm.apply(x_BCHW, self.weight, self.bias, self.num_groups, self.eps, swish)
        normed = super().forward(x_BCHW)
        return F.silu(normed) if swish else normed

    def as_line(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """GroupNorm in float32 as torch.compile makes few passes of it: channels of an image times one number, plus another.

        What channels of a group have in common goes from and to channels by products with a matrix, whose results the compiler computes once and not
        for each element. In float64, for a variance is the small difference of large numbers, and products in float32 may be set to be less exact.
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
    """GroupNorm of channels that come last, by the kernels for channels that come first."""

    @staticmethod
    def forward(ctx, x_BCHW: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, groups: int, eps: float, swish: bool) -> torch.Tensor:
        """(B, C, H, W), channels last."""
        batch, channels, height, width = x_BCHW.shape
        if height * width < 1024:  # for more, torch has a fast kernel for this order
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
        into_x, into_weight, into_bias = torch.ops.aten.native_group_norm_backward(
            gradient_BCHW.contiguous(), x_BCHW.contiguous(), mean, scale, weight_C, batch, channels, height * width, ctx.groups, (True, True, True))
        return into_x.contiguous(memory_format=torch.channels_last), into_weight, into_bias, None, None, None
