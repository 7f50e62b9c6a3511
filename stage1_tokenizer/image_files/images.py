"""Images from anywhere to uint8 arrays and float32 tensors in [-1, 1], by one set of rules for every part of the system.

    read_image        any file, bytes or PIL image -> an upright 8-bit PIL image in mode RGB or L
    ImageTransform    that image, seen through a View -> uint8 (H, W, C) -> float32 (C, H, W) in [-1, 1]
    to_uint8, to_pil  the way back
"""

import contextlib
import functools
import io
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stage1_tokenizer.image_files.stored_values import UnreadableImage, honour_header
from vqmosaic.errors import InputError, check_name
from vqmosaic.files.permissions import permission_denied
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.recipe_sections import DataConfig, TokensConfig
from vqmosaic.recipes.view_lists import POSITIONS, VIEW_SETS

MAX_PIXELS = DataConfig.max_pixels

# Formats that Pillow decodes by itself. Others stay shut: EPS, for one, would start an interpreter on what may be a hostile file.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
_ORIENTATION_TAG = 0x0112
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 322, 323
_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


TRANSFORM_FIELDS = ("image_size", "channels", "resampling")
"""Fields that ImageTransform.to_dict writes."""


def read_image(file: str | os.PathLike | bytes | io.IOBase | Image.Image, *, channels: int = 3, max_pixels: int = MAX_PIXELS,
               before_decoding: Callable[[Image.Image], object] | None = None, formats: Sequence[str] | None = None) -> Image.Image:
    """The image upright and in 8 bits, in mode RGB (channels=3) or L (channels=1).

    EXIF rotation is applied, transparency is laid on white, 16-bit values are divided by 257, palettes, CMYK and 1-bit are
    converted; scales, white levels and transparent colours are those that the file states (stored_values.py). Of an animation the
    first frame is taken. The pixel limit is checked on the header, before anything is decoded.
    Pillow has a limit of its own, about 179 million pixels (PIL.Image.MAX_IMAGE_PIXELS), that max_pixels cannot raise.
    before_decoding is called with the opened file. It may raise UnreadableImage, or set up the decoder with PIL's `draft`.
    formats limits the Pillow formats that are opened; by default, these are all formats that a data set may hold.

    Raises UnreadableImage with the reason. What this function returned passes through it unchanged.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    if _is_plain(file, mode):
        return file
    try:
        if isinstance(file, Image.Image):
            return _plain(file, mode, max_pixels)
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
        with Image.open(file, formats=_formats() if formats is None else [name for name in _formats() if name in formats]) as image:
            if before_decoding:
                before_decoding(image)
            return _plain(image, mode, max_pixels)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(_why_unidentified(file, formats)) from None
    except PermissionError:
        raise UnreadableImage(str(permission_denied(file))) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"too many pixels for Pillow: {error}") from None
    except Exception as error:  # decoders meet corrupt bytes with errors of any type; none of them may end a run
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(f"truncated, corrupt or not accessible: {detail}") from error


def _why_unidentified(file: str | os.PathLike | io.IOBase, formats: Sequence[str] | None) -> str:
    with contextlib.suppress(OSError, struct.error):  # some of Pillow's format tests do not check that there are enough bytes
        with open(file, "rb") if not isinstance(file, io.IOBase) else contextlib.nullcontext(file) as stream:
            stream.seek(0)
            prefix = stream.read(16)
        for name in _formats():
            accepts = Image.OPEN[name][1]
            if accepts is not None and accepts(prefix) is True:
                if formats is not None and name not in formats:
                    return f"it is {name}, but only {', '.join(sorted(formats))} are accepted here"
                return f"a {name} file of a kind that Pillow does not read, or its header is corrupt"
    return "not an image of a known format, or its header is corrupt"


def _is_plain(image: Any, mode: str) -> bool:
    # a PIL image in memory, not one bound to a file, without metadata that could ask for a rotation
    return type(image) is Image.Image and image.mode == mode and not image.info


def _plain(image: Image.Image, mode: str, max_pixels: int) -> Image.Image:
    width, height = stored_size(image)
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}")
    if not width * height:
        raise UnreadableImage(f"it has no pixels: {width} x {height}")
    honour = honour_header(image)
    image.load()
    orientation = _orientation(image)  # read after the pixels: a PNG may carry EXIF at its end, and TIFF is turned by Pillow itself
    image = _flattened(_eight_bit(honour(image))).convert(mode)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    image.info = {}  # it holds the EXIF of the original, by which a second reader would turn the image again
    return image


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that the decoder of an opened file works with: those of the image, or of a TIFF's tile where that is larger."""
    tags = getattr(image, "tag_v2", {})
    sizes = zip(image.size, (tags.get(_TILE_WIDTH_TAG, 0), tags.get(_TILE_LENGTH_TAG, 0)), strict=True)
    return tuple(max(side, tile if isinstance(tile, int) and image.width * image.height else 0) for side, tile in sizes)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata raises anything, and says nothing about the pixels
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image with 8-bit values where they were 16 or 32 bits wide; others pass."""
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # also false for nan
            raise UnreadableImage("floating-point pixels outside [0, 1]; their white level is not known")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage("32-bit pixels outside 0..65535; their white level is not known")
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _flattened(image: Image.Image) -> Image.Image:
    """The image on a white ground where it has transparency; others pass."""
    if not image.has_transparency_data:
        return image
    if image.mode == "La":  # premultiplied grey knows no direct way to RGBA
        image = image.convert("LA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to look at an image: which square of it, mirrored or not, moved or not."""

    crop_scale: float = 1.0
    """Side of the square crop relative to the short side of the image."""
    x: float = 0.5
    """Where the crop lies from left (0) to right (1), as a share of the room that is left."""
    y: float = 0.5
    """Where the crop lies from top (0) to bottom (1), as a share of the room that is left."""
    flip: bool = False
    """Mirror left and right."""
    shift_x: int = 0
    """Pixels of the final image by which it is moved to the right, after the flip; edges are repeated."""
    shift_y: int = 0
    """Pixels of the final image by which it is moved down; edges are repeated."""

    def __post_init__(self):
        if not (0 < self.crop_scale <= 1 and 0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise InputError(f"{self}: crop_scale must be above 0 and at most 1, x and y at least 0 and at most 1.")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)


IDENTITY = View()


def training_views(tokens: TokensConfig) -> list[View]:
    """The views of each training image that a recipe stores, in stored order: those of a named set, or those that it lists."""
    if isinstance(tokens.views, str):
        return named_views(tokens.views, tokens.view_shift, tokens.view_crop_scale)
    views = []
    for record in tokens.views:
        (x, y), (shift_x, shift_y) = POSITIONS[record["position"]], record["shift"]
        views.append(View(crop_scale=record["crop_scale"], x=x, y=y, flip=record["flip"], shift_x=shift_x, shift_y=shift_y))
    return views


def named_views(name: str, shift: int = 1, crop_scale: float = TokensConfig.view_crop_scale) -> list[View]:
    """The views of a named set (VIEW_SETS). All sets but ten-crop begin with the identity.

    shifts are the identity and its eight neighbours at `shift` pixels. wide-shifts are the 25 views that are up to two such steps away in each
    direction. With the prefix flip+, the mirror images of all these views follow.
    ten-crop are the centre and the four corners at `crop_scale` and then their mirror images (Krizhevsky et al. 2012; stored as
    tokens: LlamaGen, Sun et al. 2024).
    """
    check_name("tokens.views", name, VIEW_SETS)
    if name == "ten-crop":
        places = [POSITIONS[place] for place in ("center", "top-left", "top-right", "bottom-left", "bottom-right")]
        return [View(crop_scale=crop_scale, x=x, y=y, flip=flip) for flip in (False, True) for x, y in places]
    steps = [step * shift for step in ((0, -1, 1, -2, 2) if "wide" in name else (0, -1, 1) if "shifts" in name else (0,))]
    flips = (False, True) if "flip" in name else (False,)
    return [View(flip=flip, shift_x=shift_x, shift_y=shift_y) for flip in flips for shift_y in steps for shift_x in steps]


def flip_and_shift(pixels_HWC: np.ndarray, view: View) -> np.ndarray:
    """The uint8 image (H, W, C) mirrored and moved as the view says; its crop is not looked at."""
    height, width = pixels_HWC.shape[:2]
    if view.flip:
        pixels_HWC = pixels_HWC[:, ::-1]
    if view.shift_y:
        pixels_HWC = pixels_HWC.take(_shifted(height, view.shift_y), axis=0)
    if view.shift_x:
        pixels_HWC = pixels_HWC.take(_shifted(width, view.shift_x), axis=1)
    return np.ascontiguousarray(pixels_HWC)


@functools.lru_cache(maxsize=256)
def _shifted(size: int, shift: int) -> np.ndarray:
    """Positions to read from so that a row moves by `shift` and its edge is repeated."""
    return np.clip(np.arange(size) - shift, 0, size - 1)


@dataclass(frozen=True)
class ImageTransform:
    """The one way in which images are brought to one size: antialiased bicubic resize of the short side, centre crop.

    Validation, preprocessing and the pipeline use it as it is; training uses it with a random View.
    """

    image_size: int
    """Height and width of the result in pixels."""
    channels: int = 3
    """3 for RGB, 1 for grey."""

    def __post_init__(self):
        if as_integer("image_size", self.image_size) < 1 or self.channels not in (1, 3):
            raise InputError(f"image_size is {self.image_size} and channels is {self.channels}; "
                             "allowed: at least 1 pixel, and 1 (grey) or 3 (RGB) channels.")

    def __call__(self, image: Image.Image, view: View = IDENTITY) -> Tensor:
        """The image as float32 (C, H, W) in [-1, 1]."""
        return to_tensor(self.resize(image, view))

    def resize(self, image: Image.Image, view: View = IDENTITY) -> np.ndarray:
        """The image as uint8 (H, W, C), resized and cropped in one go, then mirrored and moved; any PIL image is accepted."""
        image = read_image(image, channels=self.channels)
        width, height = image.size
        side = min(width, height) * view.crop_scale
        left, top = (width - side) * view.x, (height - side) * view.y
        if view.crop_scale == 1:  # whole pixels, so that an image that has the right size already is not blurred
            left, top = round(left), round(top)
        # Only the box is resampled: a strip of 1 x 100,000 pixels never becomes one of 32 x 3,200,000.
        box = (left, top, min(left + side, width), min(top + side, height))
        resized = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box)
        return flip_and_shift(np.array(resized).reshape(self.image_size, self.image_size, self.channels), view)

    def resize_views(self, image: Image.Image, views: Sequence[View]) -> np.ndarray:
        """The image in all of the views as uint8 (V, H, W, C), each as `resize` gives it; views of the same crop are resized once."""
        image, resized, pixels = read_image(image, channels=self.channels), {}, []
        for view in views:
            crop = View(crop_scale=view.crop_scale, x=view.x, y=view.y)
            if crop not in resized:
                resized[crop] = self.resize(image, crop)
            pixels.append(flip_and_shift(resized[crop], view))
        return np.stack(pixels)

    def to_dict(self) -> dict[str, Any]:
        """The transform as it stands in a tokenizer's config."""
        return {"image_size": self.image_size, "channels": self.channels, "resampling": "bicubic"}

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ImageTransform":
        """The transform that to_dict described; raises InputError for anything it does not know."""
        if set(config) != {*TRANSFORM_FIELDS} or config["resampling"] != "bicubic":
            raise InputError(f"transform is {config}; allowed: image_size, channels and resampling = 'bicubic'.")
        return cls(config["image_size"], config["channels"])


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (..., H, W, C) as contiguous float32 (..., C, H, W) in [-1, 1]."""
    # In numpy: on a busy machine torch's threads wait 20 ms for each other over what takes one of them 0.3 ms.
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


def as_batches(images: Image.Image | Sequence[Image.Image] | Tensor, transform: ImageTransform, size: int) -> Iterator[Tensor]:
    """Yields the given images as float32 (B, C, H, W) in [-1, 1] at the transform's size, at most `size` of them at a time.

    `images` is one PIL image, a list of them, or a floating-point tensor (B, C, H, W) that already has this size and range. PIL images are
    converted one batch at a time. Raises InputError for anything else.
    """
    shape = (transform.channels, transform.image_size, transform.image_size)
    allowed = f"allowed: a PIL image, a list of PIL images, or a floating-point tensor (B, {shape[0]}, {shape[1]}, {shape[2]}) in [-1, 1]"
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1:] != shape or not len(images) or not images.is_floating_point():
            raise InputError(f"images is a {images.dtype} tensor of shape {tuple(images.shape)}; {allowed}.")
        low, high = images.min().item(), images.max().item()
        if not (low >= -1.001 and high <= 1.001):  # room for the rounding of bfloat16; also false for nan
            raise InputError(f"images holds values from {low:g} to {high:g}; {allowed}. From 0..255, divide by 127.5 and subtract 1.")
        yield from (part.float() for part in images.split(size))
        return
    images = [images] if isinstance(images, Image.Image) else images
    if not isinstance(images, Sequence) or not len(images) or not all(isinstance(image, Image.Image) for image in images):
        kinds = sorted({type(image).__name__ for image in images}) if isinstance(images, (list, tuple)) else None
        given = type(images).__name__ if kinds is None else f"a list of {', '.join(kinds) or 'nothing'}"
        raise InputError(f"images is {given}; {allowed}.")
    for start in range(0, len(images), size):
        pixels = []
        for index, image in enumerate(images[start:start + size], start):
            try:
                pixels.append(transform.resize(image))
            except UnreadableImage as error:
                raise InputError(f"image {index} of images cannot be read: {error}.") from error
        yield to_tensor(np.stack(pixels))
