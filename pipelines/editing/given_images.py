"""The images that an edit keeps or draws again, as tensors with exactly the values of the given pixels."""

import dataclasses
from typing import Any

import torch
from PIL import Image

from pipelines.decoded_images import map_batches, tokenizer_batch_size
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import ImageTransform, as_batches
from stage1_tokenizer.image_files.read_images import read_image
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from stage1_tokenizer.tiles.tiled_images import encode_tiled
from stage1_tokenizer.tokenizer_protocol import Tokenizer
from vqmosaic.errors import InputError


def images_of_size(images: Any, transform: ImageTransform, sides: tuple[int, int], where: str) -> torch.Tensor:
    """Images as float32 (N, C, H, W) in [-1, 1] on the CPU, with the channels of the transform. They are not resized.

    Args:
        images: a PIL image, a list of them, or a tensor (N, C, H, W) in [-1, 1].
        sides: the height and width that they must have.
        where: what needs this size, for the message, such as "this pipeline edits images".

    Raises:
        InputError: an image has another size or cannot be read.
    """
    own = dataclasses.replace(transform.without_derivation, image_size=sides)
    if isinstance(images, Image.Image | FloatImage):
        images = [images]
    if isinstance(images, (list, tuple)) and all(isinstance(image, Image.Image | FloatImage) for image in images):
        images = [checked_image(number, image, own, where) for number, image in enumerate(images)]
    return torch.cat(list(as_batches(images, own, tokenizer_batch_size(sides)))).cpu()


def images_of_any_size(images: Any, transform: ImageTransform) -> list[torch.Tensor]:
    """Images as float32 (N, C, H, W) in [-1, 1], with the channels of the transform, which are not resized. PIL images are separate, with N = 1.

    Raises InputError for images that cannot be read, and for anything but images.
    """
    own = transform.without_derivation
    if isinstance(images, torch.Tensor):
        size = images.shape[-2:] if images.ndim == 4 else own.sides
        return [torch.cat(list(as_batches(images, dataclasses.replace(own, image_size=[*size]), len(images))))]
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


def checked_image(number: int, image: Image.Image | FloatImage, transform: ImageTransform, where: str) -> Image.Image | FloatImage:
    """The upright image with the channels of the transform. Raises InputError unless it has its size."""
    try:
        upright = read_image(image, channels=transform.channels, value_range=transform.value_range)
    except UnreadableImage as error:
        raise InputError(f"image {number} cannot be read: {error}.") from None
    (width, height), (expected_height, expected_width) = upright.size, transform.sides
    if (height, width) != transform.sides:
        raise InputError(f"image {number} is {width} x {height} pixels (width x height), but {where} of {expected_width} x {expected_height}. Resize "
                         f"or crop it first, such as with image.resize(({expected_width}, {expected_height})).")
    return upright


def tokens_of(tokenizer: Tokenizer, images_NCHW: torch.Tensor) -> torch.Tensor:
    """The tokens (N, T) of all grids of the tokenizer, on the CPU. Images of another size than the training images are encoded in tiles."""
    if images_NCHW.shape[2:] != tokenizer.transform.sides:
        batch_size = tokenizer_batch_size(tokenizer.transform.image_size)
        return tokenizer.join_tokens(encode_tiled(tokenizer, images_NCHW, batch_size=batch_size))
    batches = images_NCHW.split(tokenizer_batch_size(tokenizer.transform.image_size))
    return torch.cat(map_batches(batches, tokenizer.device, lambda batch: tokenizer.join_tokens(tokenizer.encode(batch)).cpu()))
