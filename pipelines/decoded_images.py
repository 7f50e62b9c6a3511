"""Decodes ids to images in batches, and converts images to the output types of a pipeline."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from stage1_tokenizer.image_files.images import to_pil, to_uint8
from stage1_tokenizer.tiles.tiled_images import decode_tiled
from stage1_tokenizer.tokenizer_protocol import Ids, Tokenizer, ids_in, split_ids
from vqmosaic.errors import InputError
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width
from vqmosaic.runs.out_of_memory import FittingBatches, ranges

Result = TypeVar("Result")
OUTPUT_TYPES = ("pil", "np", "pt")
MAX_BATCH_PIXELS, MAX_BATCH_IMAGES = 8 * 256**2, 64
"""Largest number of pixels and of images in a batch of the encoder or decoder, whose feature maps are far larger than the images."""


def tokenizer_batch_size(image_size: ImageSize) -> int:
    """Number of images of this size in a batch of the encoder or decoder."""
    return max(1, min(MAX_BATCH_IMAGES, MAX_BATCH_PIXELS // math.prod(height_and_width(image_size))))


def decode_in_batches(tokenizer: Tokenizer, ids: Ids, is_larger: bool = False, fitting: FittingBatches | None = None) -> Iterator[torch.Tensor]:
    """Decode ids, as `Tokenizer.encode` returns them, and yield batches of images (B, C, H, W) in [-1, 1] on the tokenizer's device.

    Images larger than the training images (`is_larger`) are decoded in tiles, and are on the CPU. `fitting` remembers from call to call how many
    images, or tiles, fit into memory.

    Raises InputError if a dict does not have ids of all grids, for the same number of images.
    """
    if isinstance(ids, dict):
        tokenizer.check_grid_names(ids)
        if len({len(grid_ids) for grid_ids in ids.values()}) > 1:
            counts = ", ".join(f"{name}: {len(grid_ids)}" for name, grid_ids in ids.items())
            raise InputError(f"the grids have ids of different numbers of images ({counts}). Give the ids of the same images in all grids.")
    batch_size = tokenizer_batch_size(tokenizer.transform.image_size)
    if fitting is None:
        fitting = FittingBatches(tokenizer.device)
    if is_larger:
        for batch in split_ids(ids, 1, tokenizer.device):
            yield decode_tiled(tokenizer, batch, batch_size=batch_size, fitting=fitting)
        return
    batches = ranges(len(next(iter(ids.values())) if isinstance(ids, dict) else ids), batch_size)
    for _, images_BCHW in fitting.run(batches, lambda part: tokenizer.decode(ids_in(ids, part, tokenizer.device))):
        yield images_BCHW


def map_batches(batches: Iterable[torch.Tensor], device: torch.device, compute: Callable[[torch.Tensor], Result]) -> list[Result]:
    """The results of a function for batches of images on a device. Those that do not fit into its memory are split."""
    fitting = FittingBatches(device)
    return [result for images_BCHW in batches for result in map_parts(fitting, images_BCHW, compute)]


def map_parts(fitting: FittingBatches, images_BCHW: torch.Tensor, compute: Callable[[torch.Tensor], Result]) -> Iterator[Result]:
    """The results of a function for a batch of images, or for the parts of it that fit into memory."""
    def compute_part(part: range) -> Result:
        return compute(images_BCHW[part.start:part.stop].to(fitting.device))

    return (result for _, result in fitting.run([range(len(images_BCHW))], compute_part))


def to_output_type(images_BCHW: torch.Tensor, output_type: str, keep_alpha: bool = False) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """Convert decoded images in [-1, 1] to an output type (pil, np or pt), on the CPU. `keep_alpha` gives pil images the mode LA or RGBA."""
    if output_type == "pt":
        return images_BCHW.clamp(-1, 1).cpu()
    if output_type == "pil" and keep_alpha and images_BCHW.shape[1] in (2, 4):
        return [Image.fromarray(pixels_HWC) for pixels_HWC in to_uint8(images_BCHW)]  # Pillow takes 2 channels for LA and 4 for RGBA
    return to_uint8(images_BCHW) if output_type == "np" else to_pil(images_BCHW)


def concatenate(batches: Iterable[list | np.ndarray | torch.Tensor]) -> list | np.ndarray | torch.Tensor:
    """Concatenate batches of one type: lists, arrays or tensors."""
    batches = list(batches)
    if isinstance(batches[0], list):
        return [image for batch in batches for image in batch]
    return np.concatenate(batches) if isinstance(batches[0], np.ndarray) else torch.cat(cast("list[torch.Tensor]", batches))  # all of one type


def as_ids(token_ids: Any) -> Ids:
    """Ids that a user gave as tensors, arrays or lists, as a tensor or a dict of tensors. A scalar gets an axis, because it cannot be split."""
    if isinstance(token_ids, Mapping):
        return {name: torch.atleast_1d(torch.as_tensor(ids)) for name, ids in token_ids.items()}
    return torch.atleast_1d(torch.as_tensor(token_ids))
