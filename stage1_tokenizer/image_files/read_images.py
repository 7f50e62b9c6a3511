"""Reads image files as upright images: 8-bit PIL images, or float images with data.value_range. All parts of the system read images this way."""

import contextlib
import functools
import io
import os
import stat
import struct
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeGuard, cast, overload

import numpy as np
from PIL import Image, UnidentifiedImageError

from stage1_tokenizer.image_files.channels import PILLOW_MODES
from stage1_tokenizer.image_files.decoders import separate_handle
from stage1_tokenizer.image_files.float_images import FloatImage, float_image
from stage1_tokenizer.image_files.stored_values import UnreadableImage, header_correction, keep_extra_channel
from vqmosaic.files.permissions import permission_denied
from vqmosaic.recipes.recipe_sections import DataConfig

MAX_PIXELS = DataConfig.max_pixels

# Formats that Pillow decodes itself. Other formats are refused: EPS, for example, would start an interpreter on a file that may be hostile.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
_ORIENTATION_TAG = 0x0112
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 322, 323
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}

ImageInput = str | os.PathLike | bytes | io.IOBase | Image.Image | FloatImage
"""What read_image accepts."""


@overload
def read_image(file: ImageInput, *, channels: int = 3, value_range: None = None, max_pixels: int = MAX_PIXELS,
               before_decoding: Callable[[Image.Image], object] | None = None, formats: Sequence[str] | None = None) -> Image.Image:
    """Without value_range: an 8-bit PIL image."""


@overload
def read_image(file: ImageInput, *, channels: int = 3, value_range: Sequence[float] | None, max_pixels: int = MAX_PIXELS,
               before_decoding: Callable[[Image.Image], object] | None = None,
               formats: Sequence[str] | None = None) -> Image.Image | FloatImage:
    """With a value_range, a FloatImage."""


def read_image(file: ImageInput, *, channels: int = 3, value_range: Sequence[float] | None = None, max_pixels: int = MAX_PIXELS,
               before_decoding: Callable[[Image.Image], object] | None = None,
               formats: Sequence[str] | None = None) -> Image.Image | FloatImage:
    """The upright 8-bit image in mode L (channels=1), LA (2), RGB (3) or RGBA (4). With value_range, the FloatImage with that many channels.

    Applies the EXIF rotation, divides 16-bit values by 257, and converts palettes, CMYK and 1-bit images. With 1 or 3 channels, composites
    transparency on white. With 2 or 4, keeps alpha, which is opaque for images without it; a second or fourth channel of unspecified meaning in a
    TIFF counts as alpha. (Pillow drops that channel, so it is opaque in a PIL image that was loaded before.) Colours become grey by their luma, and
    grey is repeated as red, green and blue.
    With value_range [low, high], values are read at their full depth, clipped to the range, and mapped to [-1, 1] (float_images.py).
    Uses the scale, white level and transparent colour from the header (stored_values.py). Reads the first frame of an animation. The limit
    max_pixels is checked on the header, before anything is decoded. Pillow has its own limit, about 179 million pixels
    (PIL.Image.MAX_IMAGE_PIXELS), which max_pixels cannot raise.
    before_decoding is called with the opened file. It may raise UnreadableImage, or set up the decoder with PIL's `draft`.
    formats limits the Pillow formats that are opened. By default, all formats that are allowed in a data set are opened.
    For a PIL image, before_decoding and formats are ignored. An image that already has the mode and no metadata, such as a result of this
    function, is returned unchanged, without a check of max_pixels.

    Raises UnreadableImage with the reason.
    """
    mode = PILLOW_MODES[channels]
    if isinstance(file, FloatImage):
        if value_range is None or tuple(value_range) != file.value_range or len(file.bands) != channels:
            raise UnreadableImage(f"it was read with {len(file.bands)} channels and data.value_range {list(file.value_range)}, not with "
                                  f"{channels} channels and {None if value_range is None else list(value_range)}")
        return file
    if value_range is None and _is_converted(file, mode):
        return file

    def convert(image: Image.Image) -> Image.Image | FloatImage:
        return _convert(image, mode, max_pixels) if value_range is None else _convert_to_floats(image, channels, value_range, max_pixels)

    try:
        if isinstance(file, Image.Image):
            return convert(separate_handle(file))
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
            return convert(image)
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


def describe_path(given: Any) -> str:
    """A sentence about how to open a path that was given in place of a PIL image, after a space. Empty for anything else."""
    if isinstance(given, (list, tuple)) and given:
        given = given[0]
    return f" To use a file, open it first: PIL.Image.open({os.fspath(given)!r})." if isinstance(given, str | os.PathLike) else ""


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
    _check_size(image, max_pixels)
    if mode in ("LA", "RGBA"):
        image = keep_extra_channel(image)
    apply_header = header_correction(image)  # before `load`, because it may read the file and set up the decoder
    image.load()
    orientation = _orientation(image)  # read after the pixels: a PNG may have EXIF at its end, and Pillow rotates TIFF itself
    image = _to_8_bits(apply_header(image))
    image = _with_alpha(image, mode) if mode in ("LA", "RGBA") else _composite_on_white(image).convert(mode)
    if orientation in _TRANSPOSE_BY_ORIENTATION:
        image = image.transpose(_TRANSPOSE_BY_ORIENTATION[orientation])
    image.info = {}  # it has the EXIF data of the original, so reading the image again would rotate it twice
    return image


def _convert_to_floats(image: Image.Image, channels: int, value_range: Sequence[float], max_pixels: int) -> FloatImage:
    """The upright FloatImage. Checks the limit on pixels before decoding."""
    _check_size(image, max_pixels)
    if channels in (2, 4):
        image = keep_extra_channel(image)
    converted = float_image(image, channels, value_range)
    orientation = _orientation(image)
    if orientation not in _TRANSPOSE_BY_ORIENTATION:
        return converted
    return FloatImage(tuple(band.transpose(_TRANSPOSE_BY_ORIENTATION[orientation]) for band in converted.bands), converted.value_range)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Raise UnreadableImage if an opened image has more pixels than max_pixels, or none."""
    width, height = stored_size(image)
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}")
    if not width * height:
        raise UnreadableImage(f"the image has no pixels: {width} x {height}")


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


def _with_alpha(image: Image.Image, mode: str) -> Image.Image:
    """An 8-bit image in mode LA or RGBA. Images without transparency become opaque."""
    if image.mode == mode:
        return image.copy()  # the caller changes it
    if image.mode == "La":  # Pillow cannot convert premultiplied grey directly to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        return image.convert("RGBA").convert(mode)
    return image.convert("L" if mode == "LA" else "RGB").convert(mode)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
