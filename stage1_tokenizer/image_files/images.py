"""Converts images to uint8 arrays and to float32 tensors in [-1, 1]. All parts of the system use these functions, so all follow the same rules.

    read_image        any file, bytes or PIL image -> an upright 8-bit PIL image in mode RGB or L
    ImageTransform    a View of that image -> uint8 (H, W, C) -> float32 (C, H, W) in [-1, 1]
    to_uint8, to_pil  tensors -> uint8 arrays or PIL images
"""

import contextlib
import functools
import io
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeGuard, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stage1_tokenizer.image_files.stored_values import UnreadableImage, header_correction
from stage1_tokenizer.image_files.views import CENTER_VIEW, View, flip_and_shift
from vqmosaic.errors import InputError
from vqmosaic.files.permissions import permission_denied
from vqmosaic.recipes.image_sizes import ImageSize, checked_image_size, height_and_width
from vqmosaic.recipes.recipe_sections import DataConfig

MAX_PIXELS = DataConfig.max_pixels

# Formats that Pillow decodes itself. Other formats are refused: EPS, for example, would start an interpreter on a file that may be hostile.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
_ORIENTATION_TAG = 0x0112
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 322, 323
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}

TRANSFORM_KEYS = ("image_size", "channels", "resampling")
"""The keys of ImageTransform.to_dict."""


def read_image(file: str | os.PathLike | bytes | io.IOBase | Image.Image, *, channels: int = 3, max_pixels: int = MAX_PIXELS,
               before_decoding: Callable[[Image.Image], object] | None = None, formats: Sequence[str] | None = None) -> Image.Image:
    """The upright 8-bit image in mode RGB (channels=3) or L (channels=1).

    Applies the EXIF rotation, composites transparency on white, divides 16-bit values by 257, and converts palettes, CMYK and 1-bit images.
    Uses the scale, white level and transparent colour from the header (stored_values.py). Reads the first frame of an animation. The limit
    max_pixels is checked on the header, before anything is decoded. Pillow has its own limit, about 179 million pixels
    (PIL.Image.MAX_IMAGE_PIXELS), which max_pixels cannot raise.
    before_decoding is called with the opened file. It may raise UnreadableImage, or set up the decoder with PIL's `draft`.
    formats limits the Pillow formats that are opened. By default, all formats that are allowed in a data set are opened.
    For a PIL image, before_decoding and formats are ignored. An image that already has the mode and no metadata, such as a result of this
    function, is returned unchanged, without a check of max_pixels.

    Raises UnreadableImage with the reason.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    if _is_converted(file, mode):
        return file
    try:
        if isinstance(file, Image.Image):
            return _convert(file, mode, max_pixels)
        if isinstance(file, (bytes, bytearray, memoryview)):
            if not len(file):
                raise UnreadableImage("the file is empty")
            file = io.BytesIO(file)
        elif not isinstance(file, io.IOBase):
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("not a regular file: a folder, pipe, socket or device")
            if not status.st_size:
                raise UnreadableImage("the file is empty")
        opened = cast("str | os.PathLike[str] | IO[bytes]", file)  # typeshed does not declare io.IOBase to be IO[bytes]
        with Image.open(opened, formats=_formats() if formats is None else [name for name in _formats() if name in formats]) as image:
            if before_decoding:
                before_decoding(image)
            return _convert(image, mode, max_pixels)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        assert not isinstance(file, (bytes, Image.Image))  # Pillow raises this error when it opens a file or a stream
        raise UnreadableImage(_reason_unidentified(file, formats)) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"too many pixels for Pillow: {error}") from None
    except Exception as error:  # decoders raise errors of any type for corrupt bytes, and none of them may end a run
        if isinstance(error, PermissionError) and isinstance(file, str | os.PathLike):
            raise UnreadableImage(str(permission_denied(file))) from None
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(f"truncated, corrupt or not accessible: {detail}") from error


def _reason_unidentified(file: str | os.PathLike | io.IOBase, formats: Sequence[str] | None) -> str:
    with contextlib.suppress(OSError, struct.error):  # some of Pillow's format tests do not check that there are enough bytes
        with open(file, "rb") if not isinstance(file, io.IOBase) else contextlib.nullcontext(file) as stream:
            stream.seek(0)
            prefix = stream.read(16)
        for name in _formats():
            accepts = Image.OPEN[name][1]
            if accepts is not None and accepts(prefix) is True:  # some format tests return a message instead of False
                if formats is not None and name not in formats:
                    return f"it is {name}, but only {', '.join(sorted(formats))} are accepted here"
                return f"a {name} file of a kind that Pillow does not read, or its header is corrupt"
    return "not an image of a known format, or its header is corrupt"


def _is_converted(image: Any, mode: str) -> TypeGuard[Image.Image]:
    """Whether an object is a PIL image in `mode`, not bound to a file, and without metadata such as an EXIF rotation."""
    return type(image) is Image.Image and image.mode == mode and not image.info


def _convert(image: Image.Image, mode: str, max_pixels: int) -> Image.Image:
    """The upright 8-bit image in `mode`. Checks the limit on pixels before decoding."""
    width, height = stored_size(image)
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}")
    if not width * height:
        raise UnreadableImage(f"the image has no pixels: {width} x {height}")
    apply_header = header_correction(image)  # before `load`, because it may read the file and set up the decoder
    image.load()
    orientation = _orientation(image)  # read after the pixels: a PNG may have EXIF at its end, and Pillow rotates TIFF itself
    image = _composite_on_white(_to_8_bits(apply_header(image))).convert(mode)
    if orientation in _TRANSPOSE_BY_ORIENTATION:
        image = image.transpose(_TRANSPOSE_BY_ORIENTATION[orientation])
    image.info = {}  # it has the EXIF data of the original, so reading the image again would rotate it twice
    return image


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels of what the decoder of an opened file must hold in memory: the image, or a TIFF tile that is larger.

    For an image without pixels, the size of the image.
    """
    tags = getattr(image, "tag_v2", {})  # only TIFF files have tags
    tile_sides = [tags.get(tag) for tag in (_TILE_WIDTH_TAG, _TILE_LENGTH_TAG)]
    if not image.width * image.height:
        return image.width, image.height
    # files without tiles do not have the tags, and in some corrupt files they are not integers
    width, height = (max(side, tile) if isinstance(tile, int) else side for side, tile in zip(image.size, tile_sides, strict=True))
    return width, height


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata can raise any error, while the pixels may be intact
        return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """An image of 16 or 32 bits per value, converted to 8 bits. Other images are returned unchanged."""
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # in this form, nan is refused too
            raise UnreadableImage("floating-point pixels outside [0, 1]; their white level is unknown")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage("32-bit pixels outside 0..65535; their white level is unknown")
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _composite_on_white(image: Image.Image) -> Image.Image:
    """An image with transparency, composited on white. Other images are returned unchanged."""
    if not image.has_transparency_data:
        return image
    if image.mode == "La":  # Pillow cannot convert premultiplied grey directly to RGBA
        image = image.convert("LA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@dataclass(frozen=True)
class ImageTransform:
    """Resizes images to one size: antialiased bicubic resize until the image covers it, and centre crop.

    Validation and the pipeline use the default view, preprocessing the views of the recipe, and training random views.
    """

    image_size: ImageSize
    """Size of the result in pixels: an integer for squares, the tuple (height, width) for rectangles. Lists are accepted."""
    channels: int = 3
    """3 for RGB, 1 for grey."""

    def __post_init__(self):
        size = checked_image_size("image_size", self.image_size)
        object.__setattr__(self, "image_size", size if isinstance(size, int) else tuple(size))
        if self.channels not in (1, 3):
            raise InputError(f"channels is {self.channels}; allowed: 1 (grey) or 3 (RGB).")

    @functools.cached_property
    def sides(self) -> tuple[int, int]:
        """Height and width of the result in pixels."""
        return height_and_width(self.image_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the result as a tensor."""
        return (self.channels, *self.sides)

    def __call__(self, image: Image.Image, view: View = CENTER_VIEW) -> Tensor:
        """The image as float32 (C, H, W) in [-1, 1]."""
        return to_tensor(self.resize(image, view))

    def resize(self, image: Image.Image, view: View = CENTER_VIEW) -> np.ndarray:
        """The view of an image as uint8 (H, W, C): cropped and resized in one step, then flipped and shifted. Accepts any PIL image."""
        image = read_image(image, channels=self.channels)
        height, width = self.sides
        resized = image.resize((width, height), Image.Resampling.BICUBIC, box=self._crop_box(image, view))
        return flip_and_shift(np.array(resized).reshape(height, width, self.channels), view)

    def _crop_box(self, image: Image.Image, view: View) -> tuple[float, float, float, float]:
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

    def resize_views(self, image: Image.Image, views: Sequence[View]) -> np.ndarray:
        """All views of an image as uint8 (V, H, W, C), each the same as from `resize`. Views with the same crop are resized only once."""
        image, resized, pixels = read_image(image, channels=self.channels), {}, []
        for view in views:
            crop = View(crop_scale=view.crop_scale, x=view.x, y=view.y)
            if crop not in resized:
                resized[crop] = self.resize(image, crop)
            pixels.append(flip_and_shift(resized[crop], view))
        return np.stack(pixels)

    def to_dict(self) -> dict[str, Any]:
        """The transform as a dictionary for the tokenizer's config."""
        return {"image_size": checked_image_size("image_size", self.image_size), "channels": self.channels, "resampling": "bicubic"}

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ImageTransform":
        """The inverse of to_dict. Raises InputError for unknown or missing keys and for another resampling."""
        if set(config) != {*TRANSFORM_KEYS} or config["resampling"] != "bicubic":
            raise InputError(f"transform is {config}; allowed: image_size, channels and resampling = 'bicubic'.")
        return cls(config["image_size"], config["channels"])


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (..., H, W, C) as contiguous float32 (..., C, H, W) in [-1, 1]."""
    # numpy, not torch: on a busy machine, torch's threads wait 20 ms for each other, and a single thread needs only 0.3 ms.
    scaled = np.moveaxis(pixels, -1, -3).astype(np.float32, order="C")
    scaled /= np.float32(127.5)
    scaled -= np.float32(1.0)
    return torch.from_numpy(scaled)


def to_uint8(images_BCHW: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8 (B, H, W, C), clamped and rounded; the inverse of to_tensor."""
    scaled = images_BCHW.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def to_pil(images_BCHW: Tensor) -> list[Image.Image]:
    """Images in [-1, 1] as PIL images in mode RGB or L."""
    return [Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels) for pixels in to_uint8(images_BCHW)]


def as_batches(images: Image.Image | Sequence[Image.Image] | Tensor, transform: ImageTransform, batch_size: int) -> Iterator[Tensor]:
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
    images = [images] if isinstance(images, Image.Image) else images
    if not isinstance(images, Sequence) or not len(images) or not all(isinstance(image, Image.Image) for image in images):
        kinds = sorted({type(image).__name__ for image in images}) if isinstance(images, (list, tuple)) else None
        given = type(images).__name__ if kinds is None else f"a list of {', '.join(kinds) or 'nothing'}"
        raise InputError(f"images is {given}; {allowed}.")
    for start in range(0, len(images), batch_size):
        pixels = []
        for index, image in enumerate(images[start:start + batch_size], start):
            try:
                pixels.append(transform.resize(image))
            except UnreadableImage as error:
                raise InputError(f"image {index} of images cannot be read: {error}.") from error
        yield to_tensor(np.stack(pixels))
