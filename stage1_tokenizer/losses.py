"""Reconstruction losses by name, for images in [-1, 1]."""

import torch
import torch.nn.functional as F

RECONSTRUCTION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


def reconstruction_loss(name: str, reconstructions_BCHW: torch.Tensor, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean loss over all pixels, computed in float32 even under autocast."""
    return RECONSTRUCTION_LOSSES[name](reconstructions_BCHW.float(), images_BCHW.float())
