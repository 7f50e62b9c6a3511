"""A moving average of the weights with decay warm-up, based on torch.optim.swa_utils."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that tracks a moving average of its weights. The decay rises as (1 + n) / (10 + n) up to `decay`. Buffers are copied."""

    @torch.no_grad()
    def lerp(averages, current, count):
        warm_decay = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, current, 1 - warm_decay)

    copy = AveragedModel(model, multi_avg_fn=lerp)
    copy.requires_grad_(False)
    return copy.eval()
