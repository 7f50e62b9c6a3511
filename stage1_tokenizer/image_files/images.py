"""Converts images to uint8 arrays and to float32 tensors in [-1, 1]. All parts of the system use these functions, so all follow the same rules.

    read_image        any file, bytes or PIL image -> an upright 8-bit PIL image in mode L, LA, RGB or RGBA; with value_range, a FloatImage
    ImageTransform    a View of that image -> uint8 (H, W, C), or float32 with value_range -> float32 (C, H, W) in [-1, 1]
                      with `derived`, an image computed from that view, such as its edges
    to_uint8, to_pil  tensors -> uint8 arrays or PIL images
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stage1_tokenizer.image_files.channels import visible_pixels
from stage1_tokenizer.image_files.derived_images import derived_image
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.read_images import describe_path, read_image
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from stage1_tokenizer.image_files.views import CENTER_VIEW, View, flip_and_shift
from vqmosaic.errors import InputError
from vqmosaic.recipes.conditions import DERIVED_KINDS, checked_derivation
from vqmosaic.recipes.image_sizes import ImageSize, checked_image_size, height_and_width
from vqmosaic.recipes.pixel_values import checked_channels, checked_value_range
from vqmosaic.recipes.recipe_sections import DataConfig

TRANSFORM_KEYS, OPTIONAL_TRANSFORM_KEYS = ("image_size", "channels", "resampling"), ("value_range", "derived")
"""The keys of ImageTransform.to_dict, and those that it has only if they are set."""


@dataclass(frozen=True)
class ImageTransform:
    """Resizes images to one size: antialiased bicubic resize until the image covers it, and centre crop.

    Validation and the pipeline use the default view, preprocessing the views of the recipe, and training random views.
    """

    image_size: ImageSize
    """Size of the result in pixels: an integer for squares, the tuple (height, width) for rectangles. Lists are accepted."""
    channels: int = 3
    """1 for grey, 2 for grey and alpha, 3 for RGB, 4 for RGB and alpha."""
    value_range: tuple[float, float] | None = None
    """The stored values that become -1 and 1, for images that are read at their full depth. None for 8-bit images. Lists are accepted."""
    derived: Mapping[str, Any] | None = field(default=None, hash=False)
    """How the result is computed from the view of an image: kind, factor or method and, if it differs, the number of channels of the view. image_size
    and channels are those of the result. None: the result is the view itself."""

    def __post_init__(self):
        size = checked_image_size("image_size", self.image_size)
        object.__setattr__(self, "image_size", size if isinstance(size, int) else tuple(size))
        object.__setattr__(self, "channels", checked_channels("channels", self.channels))
        value_range = checked_value_range("value_range", self.value_range)
        object.__setattr__(self, "value_range", value_range and tuple(value_range))
        if self.derived is not None:
            channels = self.derived.get("channels")
            derived = checked_derivation("derived", {name: value for name, value in self.derived.items() if name != "channels"})
            object.__setattr__(self, "derived", derived if channels is None else {**derived, "channels": checked_channels("channels", channels)})

    @classmethod
    def from_recipe(cls, data: DataConfig) -> "ImageTransform":
        """The transform of a recipe. With data.derived, that of the images that are made from those of the data set."""
        return cls.from_dict(data.transform_config)

    @functools.cached_property
    def base(self) -> "ImageTransform":
        """The transform of the views from which the result is computed; this transform without `derived`."""
        if self.derived is None:
            return self
        factor = self.derived.get("factor", 1)
        return ImageTransform([side * factor for side in self.sides], self.derived.get("channels", self.channels), self.value_range)

    @functools.cached_property
    def without_derivation(self) -> "ImageTransform":
        """The transform for images that are already of the kind of the result, such as a picture of edges."""
        return replace(self, derived=None)

    def derive(self, view_HWC: np.ndarray) -> np.ndarray:
        """The result for a view of an image, as `base` returns it. Without `derived`, the view itself."""
        return view_HWC if self.derived is None else derived_image(view_HWC, self.derived)

    @functools.cached_property
    def sides(self) -> tuple[int, int]:
        """Height and width of the result in pixels."""
        return height_and_width(self.image_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the result as a tensor."""
        return (self.channels, *self.sides)

    def __call__(self, image: Image.Image | FloatImage, view: View = CENTER_VIEW) -> Tensor:
        """The image as float32 (C, H, W) in [-1, 1]."""
        return to_tensor(self.resize(image, view))

    def resize(self, image: Image.Image | FloatImage, view: View = CENTER_VIEW) -> np.ndarray:
        """The view of an image as uint8 (H, W, C): cropped and resized in one step, then flipped and shifted. Accepts any PIL image.

        With value_range, the view is float32 in [-1, 1]. Each channel is resized separately, so alpha does not change the colours.
        With `derived`, the result is computed from the view.
        """
        if self.derived is not None:
            return self.derive(self.base.resize(image, view))
        image = self._read(image)
        (height, width), box = self.sides, self._crop_box(image, view)
        if isinstance(image, FloatImage):
            resized = image.resize((width, height), Image.Resampling.BICUBIC, box)
        elif self.channels in (2, 4):  # by itself, Pillow multiplies the colours by alpha, which loses the colours of transparent pixels
            resized = np.stack([np.array(band.resize((width, height), Image.Resampling.BICUBIC, box=box)) for band in image.split()], axis=-1)
        else:
            resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC, box=box)).reshape(height, width, self.channels)
        return flip_and_shift(resized, view)

    def _read(self, image: Image.Image | FloatImage) -> Image.Image | FloatImage:
        return read_image(image, channels=self.channels, value_range=self.value_range)

    def _crop_box(self, image: Image.Image | FloatImage, view: View) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the view's crop: a box with the proportions of the result, the largest one for crop_scale 1.

        Only the box is resampled, so a strip of 1 x 100,000 pixels does not become one of 32 x 3,200,000.
        """
        (width, height), (result_height, result_width) = image.size, self.sides
        if width * result_height <= height * result_width:  # the crop has the full width of the image
            box_width, box_height = width * view.crop_scale, width * result_height / result_width * view.crop_scale
        else:
            box_width, box_height = height * result_width / result_height * view.crop_scale, height * view.crop_scale
        left, top = (width - box_width) * view.x, (height - box_height) * view.y
        if view.crop_scale == 1:  # whole pixels, so that an image that already has the right size is not blurred
            left, top = min(round(left), width - box_width), min(round(top), height - box_height)
        return left, top, min(left + box_width, width), min(top + box_height, height)

    def resize_views(self, image: Image.Image | FloatImage, views: Sequence[View]) -> np.ndarray:
        """All views of an image as (V, H, W, C), each the same as from `resize`. Views with the same crop are resized only once."""
        if self.derived is not None:
            return np.stack([self.derive(pixels_HWC) for pixels_HWC in self.base.resize_views(image, views)])
        resized: dict[View, np.ndarray] = {}
        image, pixels = self._read(image), []
        for view in views:
            crop = View(crop_scale=view.crop_scale, x=view.x, y=view.y)
            if crop not in resized:
                resized[crop] = self.resize(image, crop)
            pixels.append(flip_and_shift(resized[crop], view))
        return np.stack(pixels)

    def to_dict(self) -> dict[str, Any]:
        """The transform as a dictionary for the tokenizer's config."""
        optional: dict[str, Any] = {}  # absent where not set: fingerprints of earlier tokenizers stay the same
        if self.value_range is not None:
            optional["value_range"] = [*self.value_range]
        if self.derived is not None:
            optional["derived"] = {**self.derived}
        return {"image_size": checked_image_size("image_size", self.image_size), "channels": self.channels, "resampling": "bicubic", **optional}

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ImageTransform":
        """The inverse of to_dict. Raises InputError for unknown or missing keys and for another resampling."""
        if set(config) - {*OPTIONAL_TRANSFORM_KEYS} != {*TRANSFORM_KEYS} or config["resampling"] != "bicubic":
            raise InputError(f"transform is {config}; allowed: image_size, channels, resampling = 'bicubic', value_range and derived.")
        derived = config.get("derived")
        if derived is not None and (not isinstance(derived, Mapping) or derived.get("kind") not in DERIVED_KINDS):
            raise InputError(f"transform.derived is {derived!r}; allowed kinds: {', '.join(DERIVED_KINDS)}.")
        return cls(config["image_size"], config["channels"], config.get("value_range"), derived)

    def to_stored_values(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] as float32 in the data's own units: value_range, or 0..255 without one. Clipped, not rounded."""
        low, high = self.value_range or (0.0, 255.0)
        return (images_BCHW.float().clamp(-1, 1) + 1) * ((high - low) / 2) + low


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (..., H, W, C) as contiguous float32 (..., C, H, W) in [-1, 1]. float32 in [-1, 1] is only reordered."""
    if pixels.dtype == np.float32:
        return torch.from_numpy(np.array(np.moveaxis(pixels, -1, -3), order="C"))
    # numpy, not torch: on a busy machine, torch's threads wait 20 ms for each other, and a single thread needs only 0.3 ms.
    scaled = np.moveaxis(pixels, -1, -3).astype(np.float32, order="C")
    scaled /= np.float32(127.5)
    scaled -= np.float32(1.0)
    return torch.from_numpy(scaled)


def to_uint8(images_BCHW: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8 (B, H, W, C), clamped and rounded; the inverse of to_tensor for uint8. All channels are kept."""
    scaled = images_BCHW.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def to_pil(images_BCHW: Tensor) -> list[Image.Image]:
    """Images in [-1, 1] as 8-bit PIL images in mode RGB or L, for viewing: the first of 2 channels; RGB composited on white if there are 4."""
    return [Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels) for pixels in visible_pixels(to_uint8(images_BCHW))]


def as_batches(images: Image.Image | FloatImage | Sequence[Image.Image | FloatImage] | Tensor, transform: ImageTransform,
               batch_size: int) -> Iterator[Tensor]:
    """Yields images as float32 batches (B, C, H, W) in [-1, 1] at the transform's size, with B at most `batch_size`.

    `images` is a PIL image, a list of PIL images, or a floating-point tensor (B, C, H, W) that already has this size and range. PIL images are
    converted one batch at a time. Raises InputError for anything else. As this is a generator, nothing is checked before its first batch is
    requested, and an unreadable image is an error only in its own batch.
    """
    shape = transform.shape
    allowed = f"allowed: a PIL image, a list of PIL images, or a floating-point tensor (B, {shape[0]}, {shape[1]}, {shape[2]}) in [-1, 1]"
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1:] != shape or not len(images) or not images.is_floating_point():
            raise InputError(f"images is a {images.dtype} tensor of shape {tuple(images.shape)}; {allowed}.")
        low, high = images.min().item(), images.max().item()
        if not (low >= -1.001 and high <= 1.001):  # with a tolerance for bfloat16 rounding; in this form, nan is refused too
            raise InputError(f"images holds values from {low:g} to {high:g}; {allowed}. For values in 0..255, divide by 127.5 and subtract 1.")
        yield from (part.float() for part in images.split(batch_size))
        return
    images = [images] if isinstance(images, Image.Image | FloatImage) else images
    if not isinstance(images, Sequence) or not len(images) or not all(isinstance(image, Image.Image | FloatImage) for image in images):
        kinds = sorted({type(image).__name__ for image in images}) if isinstance(images, (list, tuple)) else None
        given = type(images).__name__ if kinds is None else f"a list of {', '.join(kinds) or 'nothing'}"
        raise InputError(f"images is {given}; {allowed}.{describe_path(images)}")
    for start in range(0, len(images), batch_size):
        pixels = []
        for index, image in enumerate(images[start:start + batch_size], start):
            try:
                pixels.append(transform.resize(image))
            except UnreadableImage as error:
                raise InputError(f"image {index} of images cannot be read: {error}.") from error
        yield to_tensor(np.stack(pixels))
