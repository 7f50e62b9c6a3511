"""The images of an edit, as tensors with exactly the values of the given pixels, and the masks of the pixels to draw."""

import dataclasses
from typing import Any

import torch
from PIL import Image

from pipelines.decoded_images import map_batches, tokenizer_batch_size
from pipelines.editing.edit_inputs import ImageForm, checked_box, checked_image, checked_keep, checked_strength
from pipelines.editing.masked_images import masks_from
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import ImageTransform, as_batches
from stage1_tokenizer.image_files.read_images import read_image
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from stage1_tokenizer.tiles.tiled_images import encode_tiled
from stage1_tokenizer.tokenizer_protocol import Tokenizer
from vqmosaic.errors import InputError

EDITED = "this pipeline edits images"


def images_and_masks(images: Any, drawn_by: str, value: Any, transform: ImageTransform,
                     size: tuple[int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The images (N, C, H, W) of an edit, and the masks (N, H, W) of the pixels to draw. With a strength, there are no masks: all pixels may change.

    Args:
        images: a PIL image, a list of them, or a tensor (N, C, H, W) in [-1, 1]. With a box, they have its size.
        drawn_by: the name of the argument that says what to draw again, such as "mask".
        value: its value.
        transform: that of the pipeline.
        size: height and width of the results, if they are larger than the training images.

    Raises:
        InputError: an image has another size or cannot be read, or the value is not allowed.
    """
    height, width = size or transform.sides
    if drawn_by == "box":
        left, top, right, bottom = checked_box("box", value, height, width)
        part_NCHW = images_of_size(images, transform, (bottom - top, right - left), "box is a place")
        images_NCHW = part_NCHW.new_zeros(len(part_NCHW), part_NCHW.shape[1], height, width)
        images_NCHW[..., top:bottom, left:right] = part_NCHW
        masks_NHW = torch.ones(len(images_NCHW), height, width, dtype=torch.bool)
        masks_NHW[:, top:bottom, left:right] = False
        return images_NCHW, masks_NHW
    images_NCHW = images_of_size(images, transform, (height, width), EDITED if size is None else "size asks for images")
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


def images_of_any_size(images: Any, transform: ImageTransform) -> list[torch.Tensor]:
    """Images as float32 (N, C, H, W) in [-1, 1], with the channels of the transform, which are not resized. PIL images are separate, with N = 1.

    Raises InputError for images that cannot be read, and for anything but images.
    """
    own = transform.without_derivation
    if isinstance(images, torch.Tensor):
        size = images.shape[-2:] if images.ndim == 4 else own.sides
        return [torch.cat(list(as_batches(images, dataclasses.replace(own, image_size=[*size]), len(images))))]
    if not isinstance(images, Image.Image | FloatImage) and (not isinstance(images, list | tuple) or not images):
        list(as_batches(images, own, 1))  # raises the error that says what is allowed
    tensors: list[torch.Tensor] = []
    for number, image in enumerate([images] if isinstance(images, Image.Image | FloatImage) else images):
        sides = own.sides
        if isinstance(image, Image.Image | FloatImage):
            try:
                image = read_image(image, channels=own.channels, value_range=own.value_range)
            except UnreadableImage as error:
                raise InputError(f"image {number} cannot be read: {error}.") from None
            sides = image.size[::-1]
        tensors += as_batches([image], dataclasses.replace(own, image_size=[*sides]), 1)
    return tensors


def same_sizes(images: list[torch.Tensor]) -> list[torch.Tensor]:
    """The images (N, C, H, W). Raises InputError unless all have the same height and width."""
    sizes = list(dict.fromkeys((image.shape[2], image.shape[3]) for image in images))
    if len(sizes) > 1:
        raise InputError(f"the images have different sizes, such as {sizes[0][0]} x {sizes[0][1]} and {sizes[1][0]} x {sizes[1][1]} pixels (height x "
                         "width), so their ids do not fit into one tensor. Encode them one by one.")
    return images


def tokens_of(tokenizer: Tokenizer, images_NCHW: torch.Tensor) -> torch.Tensor:
    """The tokens (N, T) of all grids of the tokenizer, on the CPU. Images of another size than the training images are encoded in tiles."""
    if images_NCHW.shape[2:] != tokenizer.transform.sides:
        batch_size = tokenizer_batch_size(tokenizer.transform.image_size)
        return tokenizer.join_tokens(encode_tiled(tokenizer, images_NCHW, batch_size=batch_size))
    batches = images_NCHW.split(tokenizer_batch_size(tokenizer.transform.image_size))
    return torch.cat(map_batches(batches, tokenizer.device, lambda batch: tokenizer.join_tokens(tokenizer.encode(batch)).cpu()))
