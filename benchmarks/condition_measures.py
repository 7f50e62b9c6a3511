"""Measures of images that were generated from a low resolution or from edges. All images are uint8 (N, H, W, C)."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import cifar10
from stage1_tokenizer.image_files.images import ImageTransform

EDGE_THRESHOLD = 64
"""Pixels of an image of edges from this value on are edges: a quarter of a step from black to white."""
EDGE_TOLERANCE = 1
"""Edges match if they are at most this many pixels apart, in each direction."""


def derive(transform: ImageTransform, images_NHWC: torch.Tensor) -> torch.Tensor:
    """The images of a condition, such as the edges, computed as the condition's tokenizer computes them."""
    return torch.from_numpy(np.stack([transform.derive(image_HWC) for image_HWC in images_NHWC.numpy()]))


def upsample_bicubic(images_NHWC: torch.Tensor, side: int) -> torch.Tensor:
    """Images enlarged to squares by Pillow's bicubic resize."""
    resized = [np.array(Image.fromarray(image_HWC).resize((side, side), Image.Resampling.BICUBIC)) for image_HWC in images_NHWC.numpy()]
    return torch.from_numpy(np.stack(resized))


def psnr(found_NHWC: torch.Tensor, expected_NHWC: torch.Tensor) -> float:
    """PSNR in dB over all pixels."""
    return cifar10.psnr(cifar10.to_float(found_NHWC), cifar10.to_float(expected_NHWC))


def edge_f_score(found_NHWC: torch.Tensor, expected_NHWC: torch.Tensor) -> float:
    """The F-score of images of edges, over all pixels.

    Precision is the fraction of the found edge pixels with an expected one within EDGE_TOLERANCE, recall the fraction of the expected ones with a
    found one.
    """
    found_N1HW, expected_N1HW = ((images_NHWC.movedim(-1, 1) >= EDGE_THRESHOLD).float() for images_NHWC in (found_NHWC, expected_NHWC))
    near_found_N1HW, near_expected_N1HW = (F.max_pool2d(edges_N1HW, 2 * EDGE_TOLERANCE + 1, stride=1, padding=EDGE_TOLERANCE)
                                           for edges_N1HW in (found_N1HW, expected_N1HW))
    precision = (found_N1HW * near_expected_N1HW).sum().double() / found_N1HW.sum().clamp_min(1)
    recall = (expected_N1HW * near_found_N1HW).sum().double() / expected_N1HW.sum().clamp_min(1)
    return float(2 * precision * recall / (precision + recall).clamp_min(1e-12))
