"""A moving average of the weights with decay warm-up, on torch.optim.swa_utils."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows its weights: decay rises as (1 + n) / (10 + n) up to `decay`; buffers are copied as they are."""

    @torch.no_grad()
    def lerp(averages, current, count):
        warmed = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, current, 1 - warmed)

    copy = AveragedModel(model, multi_avg_fn=lerp)
    copy.requires_grad_(False)
    return copy.eval()
