"""Masks: the pixels of an image that are drawn again, the tokens that cover them, and the seam between new and kept pixels.

In comments and names: N images, H and W their sides in pixels, P = H * W pixels, T tokens of all grids.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt

from pipelines.editing.edit_inputs import check_mask, picture_mask
from stage1_tokenizer.image_files.read_images import describe_path
from token_shards.manifest import Grid
from vqmosaic.errors import InputError


def masks_from(mask: Any, images: int, sides: tuple[int, int]) -> torch.Tensor:
    """The masks (N, H, W) of N images as bool: True is drawn again. Raises InputError for another size or type, and for masks without such pixels.

    `mask` is one mask for all images or a list of one for each. A mask is a PIL image, in which white pixels are drawn again, or a bool array or
    tensor (H, W). An array or tensor may hold several, (N, H, W).
    """
    parts = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    if not parts:
        raise InputError("mask is an empty list; give one mask for each image, or a single one for all.")
    arrays = [picture_mask("the mask", part) if isinstance(part, Image.Image) else array_mask(part) for part in parts]
    count = sum(map(len, arrays))
    if count not in (1, images):
        raise InputError(f"there are {count} masks and {images} images; give one mask for each image, or a single one for all.")
    for array_NHW in arrays:
        check_mask("the mask", array_NHW, sides)
    return torch.from_numpy(np.concatenate(arrays)).expand(images, -1, -1)


def array_mask(given: Any) -> np.ndarray:
    """The masks (N, H, W) in a bool array or tensor (H, W) or (N, H, W). Raises InputError for anything else."""
    array = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else given
    if not isinstance(array, np.ndarray) or array.dtype != bool or array.ndim not in (2, 3):
        found = f"an array of {array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else f"of type {type(given).__name__}"
        hint = describe_path(given) or " For numbers, give mask > 0."
        raise InputError(f"the mask is {found}; allowed: a PIL image, or a bool array or tensor (H, W) or (B, H, W).{hint}")
    return array if array.ndim == 3 else array[None]


def tokens_in_masks(masks_NHW: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """Which tokens (N, T) cover at least one masked pixel, for all grids of a tokenizer. This widens the mask to the token grid."""
    return share_in_masks(masks_NHW, grids) > 0


def share_in_masks(masks_NHW: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """The share (N, T) of masked pixels among those that each token covers, for all grids of a tokenizer."""
    parts = []
    for grid in grids:
        share_N1hw = F.adaptive_avg_pool2d(masks_NHW[:, None].float(), (grid.height, grid.width))
        parts.append(share_N1hw.flatten(1).repeat_interleave(grid.depth, dim=1))
    return torch.cat(parts, dim=1)


def token_side(grids: Sequence[Grid], sides: tuple[int, int]) -> int:
    """The side of the smallest token in pixels, at least 1."""
    return max(1, min(min(sides[0] // grid.height, sides[1] // grid.width) for grid in grids))


class MaskedImages:
    """Images (N, C, H, W) in [-1, 1] and masks (N, H, W) of the pixels that are drawn again."""

    def __init__(self, images_NCHW: torch.Tensor, masks_NHW: torch.Tensor, band: int):
        """`band` is the width in pixels of the seam, inside of the mask, in which new pixels are adapted to the kept ones."""
        self.images_NCHW, self.masks_NHW = images_NCHW, masks_NHW
        count, pixels = len(masks_NHW), masks_NHW[0].numel()
        nearest_NP, distances_NP = np.tile(np.arange(pixels), (count, 1)), np.full((count, pixels), np.inf)
        for number, mask_HW in enumerate(masks_NHW.numpy()):
            if not mask_HW.all():
                distances_HW, (rows_HW, columns_HW) = distance_transform_edt(mask_HW, return_indices=True)
                distances_NP[number] = distances_HW.ravel()
                nearest_NP[number] = (rows_HW * mask_HW.shape[1] + columns_HW).ravel()
        self.nearest_NP = torch.from_numpy(nearest_NP)
        """For each pixel, the number of the nearest one that is kept."""
        self.weights_NHW = torch.from_numpy(1 - distances_NP / band).clamp_min(0).float().view(masks_NHW.shape)
        """How much of the difference at the edge of the mask is added to a pixel: 1 for kept pixels, 0 at a distance of `band`."""

    def filled(self) -> torch.Tensor:
        """The images with each masked pixel replaced by the nearest kept one, so that what is under the mask has no influence."""
        return nearest_pixels(self.images_NCHW, self.nearest_NP)

    def paste(self, drawn_BCHW: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """The given images with these numbers, with masked pixels from the drawn ones, on the CPU. All other pixels are unchanged.

        Where a drawn image differs from the given one at the edge of the mask, the difference is added to the new pixels, fading with the distance.
        So there is no visible seam.
        """
        drawn_BCHW, images_BCHW = drawn_BCHW.float().clamp(-1, 1).cpu(), self.images_NCHW[list(numbers)]
        differences_BCHW = nearest_pixels(images_BCHW - drawn_BCHW, self.nearest_NP[list(numbers)])
        blended_BCHW = (drawn_BCHW + differences_BCHW * self.weights_NHW[list(numbers), None]).clamp(-1, 1)
        return torch.where(self.masks_NHW[list(numbers), None], blended_BCHW, images_BCHW)


def nearest_pixels(values_NCHW: torch.Tensor, nearest_NP: torch.Tensor) -> torch.Tensor:
    """The values (N, C, H, W) at the nearest kept pixels."""
    index_NCP = nearest_NP[:, None].expand(-1, values_NCHW.shape[1], -1)
    return values_NCHW.flatten(2).gather(2, index_NCP).view(values_NCHW.shape)
