"""The images of an edit, as tensors with exactly the values of the given pixels, and the masks of the pixels to draw."""

import dataclasses
from typing import Any

import torch
from PIL import Image

from pipelines.decoded_images import tokenizer_batch_size
from pipelines.editing.edit_inputs import ImageForm, checked_box, checked_image, checked_keep, checked_strength
from pipelines.editing.masked_images import masks_from
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import ImageTransform, as_batches
from stage1_tokenizer.tokenizer_protocol import Tokenizer

EDITED = "this pipeline edits images"


def images_and_masks(images: Any, drawn_by: str, value: Any, transform: ImageTransform) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The images (N, C, H, W) of an edit, and the masks (N, H, W) of the pixels to draw. With a strength, there are no masks: all pixels may change.

    Args:
        images: a PIL image, a list of them, or a tensor (N, C, H, W) in [-1, 1]. With a box, they have its size.
        drawn_by: the name of the argument that says what to draw again, such as "mask".
        value: its value.
        transform: that of the pipeline.

    Raises:
        InputError: an image has another size or cannot be read, or the value is not allowed.
    """
    height, width = transform.sides
    if drawn_by == "box":
        left, top, right, bottom = checked_box("box", value, height, width)
        part_NCHW = images_of_size(images, transform, (bottom - top, right - left), "box is a place")
        images_NCHW = part_NCHW.new_zeros(len(part_NCHW), part_NCHW.shape[1], height, width)
        images_NCHW[..., top:bottom, left:right] = part_NCHW
        masks_NHW = torch.ones(len(images_NCHW), height, width, dtype=torch.bool)
        masks_NHW[:, top:bottom, left:right] = False
        return images_NCHW, masks_NHW
    images_NCHW = images_of_size(images, transform, (height, width), EDITED)
    if drawn_by == "mask":
        return images_NCHW, masks_from(value, len(images_NCHW), (height, width))
    if drawn_by == "strength":
        checked_strength("strength", value)
        return images_NCHW, None
    share, masks_NHW = checked_keep("keep", value), torch.ones(len(images_NCHW), height, width, dtype=torch.bool)
    kept_NHW = masks_NHW.movedim(2, 1) if value == "left" else masks_NHW
    kept_NHW[:, :min(max(1, round(share * kept_NHW.shape[1])), kept_NHW.shape[1] - 1)] = False
    return images_NCHW, masks_NHW


def images_of_size(images: Any, transform: ImageTransform, sides: tuple[int, int], where: str) -> torch.Tensor:
    """Images as float32 (N, C, H, W) in [-1, 1] on the CPU, with the channels of the transform. They are not resized.

    Args:
        images: a PIL image, a list of them, or a tensor (N, C, H, W) in [-1, 1].
        sides: the height and width that they must have.
        where: what needs this size, for the message, such as "this pipeline edits images".

    Raises:
        InputError: an image has another size or cannot be read.
    """
    own, form = dataclasses.replace(transform.without_derivation, image_size=sides), ImageForm(transform.channels, transform.value_range, sides)
    if isinstance(images, Image.Image | FloatImage):
        images = [checked_image("the image", images, form, where)]
    elif isinstance(images, (list, tuple)) and all(isinstance(image, Image.Image | FloatImage) for image in images):
        images = [checked_image(f"image {number}", image, form, where) for number, image in enumerate(images)]
    return torch.cat(list(as_batches(images, own, tokenizer_batch_size(sides)))).cpu()


def tokens_of(tokenizer: Tokenizer, images_NCHW: torch.Tensor) -> torch.Tensor:
    """The tokens (N, T) of all grids of the tokenizer, on the CPU."""
    batches = images_NCHW.split(tokenizer_batch_size(tokenizer.transform.image_size))
    return torch.cat([tokenizer.join_tokens(tokenizer.encode(batch.to(tokenizer.device))).cpu() for batch in batches])
