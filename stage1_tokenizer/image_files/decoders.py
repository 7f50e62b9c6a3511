"""Opened image files: their bytes, a second handle of them, and the raw mode in which Pillow's decoder unpacks the pixels."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import IO, cast

from PIL import Image, ImageFile

LOW_BYTES = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
"""The suffix of a raw mode that unpacks the high bytes -> of the one that unpacks the low bytes."""

_CHANGED_FORMATS = ("PNG", "TIFF", "BMP", "DIB")
"""Formats for which stored_values.py and float_images.py set up the decoder, the palette or the transparent colour of the handle."""


@contextlib.contextmanager
def stored_file(image: Image.Image) -> Iterator[IO[bytes]]:
    """The file of an opened image. Restores the file position at the end."""
    file = cast(ImageFile.ImageFile, image).fp
    assert file is not None, "the file is closed"
    position = file.tell()
    try:
        yield file
    finally:
        file.seek(position)


def reopened(image: Image.Image) -> ImageFile.ImageFile:
    """A new handle of an opened file, at the same page. Changes to the new handle leave `image` unchanged."""
    with stored_file(image) as file:
        file.seek(0)
        content = file.read()
    copy = Image.open(io.BytesIO(content), formats=(cast(str, image.format),))
    if image.tell():
        copy.seek(image.tell())
    return copy


def separate_handle(image: Image.Image) -> Image.Image:
    """A new handle of a file that is opened but not loaded, if reading its format changes the handle. Other images are returned unchanged."""
    return reopened(image) if getattr(image, "tile", None) and image.format in _CHANGED_FORMATS else image


def raw_mode(image: ImageFile.ImageFile) -> str:
    """The raw mode in which the decoder unpacks the pixels: its only argument or the first one. "" for decoders without a raw mode, as in GIF."""
    arguments = image.tile[0].args
    assert arguments is not None
    first = arguments if isinstance(arguments, str) else arguments[0]
    return first if isinstance(first, str) else ""


def set_raw_mode(image: ImageFile.ImageFile, raw_mode: str) -> None:
    """Make the decoder unpack the pixels in another raw mode than Pillow chose."""
    image.tile = [tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *(tile.args or ())[1:])) for tile in image.tile]


def low_bytes(image: ImageFile.ImageFile) -> ImageFile.ImageFile:
    """An 8-bit image of the low bytes of an opened file of 16 bits per value. Decodes the file again as if the bytes of each value were swapped."""
    low, stored = reopened(image), raw_mode(image)
    low._mode = image.mode  # keep_extra_channel may have changed it
    set_raw_mode(low, stored[:-4] + LOW_BYTES[stored[-4:]])
    return low
