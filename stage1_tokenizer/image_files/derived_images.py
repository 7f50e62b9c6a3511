"""Images that are computed from another image: its low resolution, its edges, and the image in grey.

They are made from a view of the image, after crop, flip and shift, and have its type: uint8 (H, W, C), or float32 in [-1, 1] with data.value_range.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from stage1_tokenizer.image_files.float_images import LUMA
from vqmosaic.errors import InputError

STRONGEST_STEP = 4.0
"""The Sobel filter's response to a vertical edge from 0 to 1."""


def derived_image(pixels_HWC: np.ndarray, derived: Mapping[str, Any]) -> np.ndarray:
    """The image that `derived` (kind, and factor or method) describes, of the same type.

    low_resolution: mean of each square of factor x factor pixels. grey: luma of red, green and blue; alpha is ignored. edges: one channel, black
    where there are none; sobel is the gradient magnitude of the grey image, where a step from black to white is white, and canny marks thin lines.
    """
    if derived["kind"] == "low_resolution":
        means = area_mean(pixels_HWC.astype(np.float64), derived["factor"])  # of 8-bit values, exact sums: the same for a mirrored image
        return means.astype(np.float32) if pixels_HWC.dtype == np.float32 else np.rint(means).astype(np.uint8)
    grey_HW = grey(_as_numbers(pixels_HWC))
    if derived["kind"] == "edges":
        grey_HW = sobel_edges(grey_HW) if derived["method"] == "sobel" else canny_edges(grey_HW)
    return _as_type(grey_HW[:, :, None], pixels_HWC.dtype)


def area_mean(values_HWC: np.ndarray, factor: int) -> np.ndarray:
    """The mean of each square of factor x factor pixels: (H / factor, W / factor, C)."""
    height, width, channels = values_HWC.shape
    return values_HWC.reshape(height // factor, factor, width // factor, factor, channels).mean(axis=(1, 3))


def grey(values_HWC: np.ndarray) -> np.ndarray:
    """The grey image (H, W): the luma of red, green and blue, or the first channel of 1 or 2."""
    if values_HWC.shape[2] < 3:
        return values_HWC[:, :, 0]
    return values_HWC[:, :, :3] @ np.array(LUMA)


def sobel_edges(grey_HW: np.ndarray) -> np.ndarray:
    """The gradient magnitude (H, W) of an image in [0, 1], clipped to [0, 1]. 1 is a step from 0 to 1. The border pixels are repeated."""
    from scipy import ndimage  # imported here, because most runs have no edges

    gradients = (ndimage.sobel(grey_HW, axis=axis, mode="nearest") for axis in (0, 1))
    return (np.hypot(*gradients) / STRONGEST_STEP).clip(0, 1)


def canny_edges(grey_HW: np.ndarray) -> np.ndarray:
    """The edges (H, W) of an image in [0, 1], 0 or 1 (Canny 1986), smoothed with a standard deviation of one pixel."""
    from skimage import feature

    return feature.canny(grey_HW, sigma=1.0).astype(np.float64)


def check_derived_kind(field: str, derived: Mapping[str, Any]) -> None:
    """Raise InputError, which names the field, if the images need a package that is not installed. Imports nothing."""
    if derived.get("method") == "canny" and importlib.util.find_spec("skimage") is None:
        raise InputError(f"{field}.method is 'canny', which needs the package scikit-image: pip install 'vqmosaic[edges]'. Or set it to sobel.")


def _as_numbers(pixels: np.ndarray) -> np.ndarray:
    """Pixels as float64 in [0, 1]."""
    return (pixels.astype(np.float64) + 1) / 2 if pixels.dtype == np.float32 else pixels / 255.0


def _as_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in [0, 1] as uint8, rounded, or as float32 in [-1, 1]."""
    return (values * 2 - 1).astype(np.float32) if dtype == np.float32 else np.rint(values * 255).astype(np.uint8)
