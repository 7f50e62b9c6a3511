"""Reads images at their full depth, for data.value_range: 8-bit, 16-bit and 32-bit integers, and floats.

Pillow keeps 8 bits of images with several channels of 16 bits. For the low bytes, PNG and TIFF files are decoded a second time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from stage1_tokenizer.image_files.decoders import LOW_BYTES, low_bytes, raw_mode, set_raw_mode
from stage1_tokenizer.image_files.stored_values import UnreadableImage, check_has_all_bits, header_correction

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601), as in Pillow."""
_PLANES_TAG, _SAMPLE_FORMAT_TAG, _BITS_TAG, _UNSIGNED = 284, 339, 258, 1
_BLOCK_VALUES = 2**16
"""Values are scaled in blocks of rows with about this many values, to save memory: in float64, each value takes eight bytes."""


@dataclass(frozen=True)
class FloatImage:
    """An upright image as float32 values in [-1, 1], one PIL image of mode F for each channel."""

    bands: tuple[Image.Image, ...]
    value_range: tuple[float, float]
    """The stored values that became -1 and 1."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.bands[0].size

    @property
    def mode(self) -> str:
        """A name of the format of the pixels."""
        return f"{len(self.bands)} float channels"

    def tobytes(self) -> bytes:
        """The values, channel by channel."""
        return b"".join(band.tobytes() for band in self.bands)

    def resize(self, size: tuple[int, int], resampling: Image.Resampling, box: tuple[float, float, float, float]) -> np.ndarray:
        """A box of the image at another (width, height), as float32 (H, W, C), clipped to [-1, 1]. Each channel is resized separately."""
        return np.stack([np.asarray(band.resize(size, resampling, box=box)) for band in self.bands], axis=-1).clip(-1, 1)


def float_image(image: Image.Image, channels: int, value_range: Sequence[float]) -> FloatImage:
    """The values of an opened image, with the range mapped to [-1, 1]. Values outside are clipped. Does not apply the EXIF rotation.

    Images without alpha get an opaque alpha channel, whose value is the end of the range.

    Raises UnreadableImage for images whose stored values are unknown: palettes, CMYK, transparent colours, inverted scales and premultiplied
    alpha; for transparent images if there is no channel for alpha; for images that Pillow reads with 8 bits if the range exceeds 255; and for NaN.
    """
    low, high = value_range
    colours, alpha, most = _stored_bands(image)
    if most == 255 and high > 255:
        raise UnreadableImage(f"Pillow reads it with 8 bits per value, at most 255, but data.value_range ends at {high:g}")
    if alpha is not None and channels in (1, 3) and alpha.min() < most:
        raise UnreadableImage(f"transparent pixels, which data.value_range does not composite; set data.channels to {channels + 1} to keep alpha")
    if channels < 3:
        bands = [_scaled_band(colours, low, high)]
    elif len(colours) == 1:
        bands = [_scaled_band(colours, low, high)] * 3
    else:
        bands = [_scaled_band([band], low, high) for band in colours]
    if channels in (2, 4):
        bands.append(Image.new("F", bands[0].size, 1) if alpha is None else _scaled_band([alpha], low, high))
    return FloatImage(tuple(bands), (low, high))


def _scaled_band(bands: Sequence[np.ndarray], low: float, high: float) -> Image.Image:
    """One band, or the grey of red, green and blue, with the range mapped to [-1, 1]."""
    height, width = bands[0].shape
    scaled, rows = np.empty((height, width), np.float32), max(1, _BLOCK_VALUES // width)
    for start in range(0, height, rows):
        blocks = [band[start:start + rows].astype(np.float64) for band in bands]
        weighted = (weight * block for weight, block in zip(LUMA if len(blocks) == 3 else [1.0], blocks, strict=True))
        values = sum(weighted, np.zeros(blocks[0].shape))
        if np.isnan(values).any():
            raise UnreadableImage("pixels that are not numbers (NaN)")
        scaled[start:start + rows] = ((values.clip(low, high) - low) * (2 / (high - low)) - 1).clip(-1, 1)
    return Image.fromarray(scaled)


def _has_deep_bands(image: Image.Image) -> bool:
    """Whether an image is opened, but not loaded, and has several bands of 16 bits."""
    has_bands, is_opened = image.mode in ("RGB", "RGBA", "LA", "RGBX"), bool(getattr(image, "tile", None))
    return has_bands and is_opened and ";16" in raw_mode(cast(ImageFile.ImageFile, image))


def _stored_bands(image: Image.Image) -> tuple[list[np.ndarray], np.ndarray | None, float]:
    """(1 or 3 colour bands (H, W), alpha or None, the largest value that Pillow can read). The last is infinite for more than 16 bits."""
    apply_header = header_correction(image, stored_values=True)
    if image.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV") or "transparency" in image.info:
        kind = "a transparent colour" if "transparency" in image.info else {"P": "a palette", "PA": "a palette"}.get(image.mode, image.mode)
        raise UnreadableImage(f"{kind}, which data.value_range does not support: the values in the file are not those of channels")
    tile = getattr(image, "tile", None)  # empty for an image that is already loaded
    raw = raw_mode(cast(ImageFile.ImageFile, image)) if tile else ""
    if raw.startswith("RGBa") or image.mode in ("RGBa", "La"):
        raise UnreadableImage("premultiplied alpha, which data.value_range does not support")
    if _has_deep_bands(image):
        bands = _bands_of_16_bits(cast(ImageFile.ImageFile, image), raw)
        return (bands[:-1], bands[-1], 65535) if len(bands) in (2, 4) else (bands, None, 65535)
    is_unsigned_32 = isinstance(image, TiffImagePlugin.TiffImageFile) and (
        image.mode == "I" and image.tag_v2.get(_SAMPLE_FORMAT_TAG, (_UNSIGNED,))[0] == _UNSIGNED and max(image.tag_v2.get(_BITS_TAG, (1,))) == 32)
    image.load()
    image = apply_header(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if is_unsigned_32 and values.min() < 0:
            raise UnreadableImage("32-bit pixels of 2**31 or more, which Pillow reads as negative values")
        return [values], None, 65535 if image.mode.startswith("I;16") else math.inf
    if image.mode not in ("1", "L", "LA", "RGB", "RGBX", "RGBA"):
        raise UnreadableImage(f"pixels of mode {image.mode}, which data.value_range does not support")
    converted = image.convert({"1": "L", "RGBX": "RGB"}.get(image.mode, image.mode))
    bands = [np.asarray(band) for band in converted.split()]
    return (bands[:-1], bands[-1], 255) if len(bands) in (2, 4) else (bands, None, 255)


def _bands_of_16_bits(image: ImageFile.ImageFile, raw: str) -> list[np.ndarray]:
    """The bands (H, W) of an opened PNG or TIFF with two to four bands of 16 bits. Reads the file a second time for the low bytes.

    Afterwards, `image` may hold other pixels.
    """
    check_has_all_bits(image)
    if image.format not in ("PNG", "TIFF") or raw[-4:] not in LOW_BYTES:
        raise UnreadableImage(f"{image.format} pixels of {raw}, of which Pillow keeps 8 bits")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PLANES_TAG, 1) != 1:
        raise UnreadableImage("a TIFF with separate planes of 16 bits, of which Pillow keeps 8 bits")
    if raw == "LA;16B":  # Pillow has no mode for the low bytes, but RGBA takes the same four bytes of each pixel
        set_raw_mode(image, "RGBA")
        grey_high, grey_low, alpha_high, alpha_low = (np.asarray(band).astype(np.uint16) for band in image.split())
        return [grey_high * 256 + grey_low, alpha_high * 256 + alpha_low]
    low = low_bytes(image)
    return [np.asarray(high_band).astype(np.uint16) * 256 + np.asarray(low_band)
            for high_band, low_band in zip(image.split(), low.split(), strict=True)]
