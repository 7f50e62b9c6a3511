"""A moving average of the weights with decay warm-up, based on torch.optim.swa_utils."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """An AveragedModel in eval mode, without gradients, which holds a moving average of the model's weights.

    The first update copies the weights. Update n + 1 uses the decay min(decay, (1 + n) / (10 + n)). Every update copies the buffers.
    """

    @torch.no_grad()
    def move_towards(averages: Tensors, weights: Tensors, num_updates: torch.Tensor | int) -> None:
        warm_decay = min(decay, (1 + int(num_updates)) / (10 + int(num_updates)))
        torch._foreach_lerp_(averages, weights, 1 - warm_decay)

    average = AveragedModel(model, multi_avg_fn=move_towards)
    average.requires_grad_(False)
    return average.eval()
