"""Which channels people and pretrained networks see of images with 1 to 4 channels."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # reading images does not load torch
    from torch import Tensor

PILLOW_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""The mode of an 8-bit PIL image with this number of channels."""


def colour_channels(images_BCHW: "Tensor") -> "Tensor":
    """The channels without alpha, (B, 1, H, W) or (B, 3, H, W): the first of 2 channels, the first three of 4.

    Pretrained networks take three channels. They get these, a single one repeated.
    """
    return images_BCHW[..., :1 if images_BCHW.shape[-3] < 3 else 3, :, :]


def visible_pixels(pixels_HWC: np.ndarray) -> np.ndarray:
    """uint8 images (..., H, W, C) as people see them, grey or RGB: the first of 2 channels, or RGB composited on white if there are 4.

    Compositing on white is also how images with alpha are read with 1 or 3 channels.
    """
    if pixels_HWC.shape[-1] == 2:
        return pixels_HWC[..., :1]
    if pixels_HWC.shape[-1] != 4:
        return pixels_HWC
    colours, alpha = pixels_HWC[..., :3].astype(np.uint16), pixels_HWC[..., 3:].astype(np.uint16)
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
