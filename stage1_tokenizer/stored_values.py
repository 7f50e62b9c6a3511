"""What the header of an image file says about its numbers and Pillow passes over: white levels, inverted scales, transparent colours, alpha.

Pillow's tables of modes (PngImagePlugin, TiffImagePlugin, TgaImagePlugin, PpmImagePlugin) are what these rules complete. Colour profiles,
gamma and HDR transfer functions (ICC, gAMA, cHRM, cICP) are not applied: numbers are taken as they are, which for nearly all files is sRGB.
CMYK in JPEG is read by Adobe's convention, as Pillow does.
"""

import io
import os
from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin

# PNG files of image editors carry profiles and workflows of several megabytes, which Pillow refuses together with their pixels.
# There is still a limit: a file with a chunk that would unpack to more is refused, and Pillow's own for all texts together stays.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 2**24)

# Pillow copies the bytes that each EXIF entry points to, and thousands of entries may point to the same ones: 1 MB of EXIF can take 4 GB,
# for a JPEG as soon as it is opened. The orientation is in the first directory, near the start.
MAX_EXIF_BYTES = 2**16  # what a JPEG segment holds
_load_exif = Image.Exif.load
Image.Exif.load = lambda exif, data: _load_exif(exif, data[:MAX_EXIF_BYTES])

_PHOTOMETRIC, _BITS, _COMPRESSION, _SAMPLE_FORMAT, _INK_SET, _DOT_RANGE = 262, 258, 259, 339, 332, 336
_WHITE_IS_ZERO, _YCBCR, _UNCOMPRESSED, _SIGNED = 0, 6, 1, 2
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
_TGA_NO_ALPHA, _TGA_PREMULTIPLIED = (0, 1, 2), 4


class UnreadableImage(ValueError):
    """An image that cannot be used; the message is the reason in words, without the name of the file."""


def honour_header(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The function to call with the image once it is loaded, which gives it with its header honoured.

    Call this before the pixels are loaded, and before anything is decoded. Raises UnreadableImage where the header says that
    the numbers have no known black and white.
    """
    read_header = {"PNG": _png, "TIFF": _tiff, "TGA": _tga, "PPM": _ppm}.get(image.format)
    return (read_header(image) if read_header is not None else None) or (lambda loaded: loaded)


def _png(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    transparent = image.info.get("transparency")
    if not image.tile or not isinstance(transparent, int | tuple) or image.mode not in ("L", "RGB"):
        return None  # without a transparent colour, with a palette, of 16 bits grey (see images.py), or loaded before
    raw_mode = image.tile[0][3]
    if raw_mode == "RGB;16B":
        low_bytes = _low_bytes(image)
        return lambda loaded: _with_alpha(loaded, np.asarray(loaded) * np.uint16(256) + low_bytes != np.array(transparent))

    # Samples of 2 and 4 bits are loaded as 8 bits, the transparent one is not; bits beyond the depth mean nothing.
    levels = {"L;2": 3, "L;4": 15}.get(raw_mode, 255)
    as_loaded = tuple((value & levels) * (255 // levels) for value in np.atleast_1d(transparent).tolist())

    def honour(loaded: Image.Image) -> Image.Image:
        loaded.info["transparency"] = as_loaded if loaded.mode == "RGB" else as_loaded[0]
        return loaded

    return honour


def _low_bytes(image: Image.Image) -> np.ndarray:
    """The lower bytes (H, W, 3) of a PNG of 16 bits a sample, from the same file decoded as if the bytes of a sample were swapped."""
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    with Image.open(io.BytesIO(content), formats=("PNG",)) as swapped:
        swapped.tile = [(*tile[:3], "RGB;16L") for tile in swapped.tile]
        return np.asarray(swapped).astype(np.uint16)


def _with_alpha(image: Image.Image, differs_HWC: np.ndarray) -> Image.Image:
    """The image with the pixels transparent that do not differ in any channel."""
    image = image.convert("RGB")
    image.info.pop("transparency", None)
    image.putalpha(Image.fromarray(np.where(differs_HWC.any(axis=2), 255, 0).astype(np.uint8)))
    return image


def _tiff(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    tags = image.tag_v2
    photometric, bits = tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO), max(tags.get(_BITS, (1,)))
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()) and bits < 32:  # as signed 32 bits Pillow writes values of 16 bits: see images.py
        raise UnreadableImage("a TIFF of signed numbers; their black and white levels are not known")
    if photometric == _YCBCR and tags.get(_COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED and image.mode == "RGB":
        raise UnreadableImage("a TIFF of uncompressed YCbCr, which Pillow does not convert")
    if image.mode == "CMYK" and (tags.get(_INK_SET, 1) != 1 or tags.get(_DOT_RANGE, (0, 2**bits - 1))[:2] != (0, 2**bits - 1)):
        raise UnreadableImage("a TIFF of other inks than CMYK, or of CMYK with a range of its own (tag InkSet or DotRange)")
    is_inverted = photometric == _WHITE_IS_ZERO
    if image.mode == "F" and is_inverted:
        return lambda loaded: Image.fromarray(1 - np.asarray(loaded))
    if image.mode.startswith("I;16") and (is_inverted or bits < 16):
        white = 2**bits - 1

        def honour(loaded: Image.Image) -> Image.Image:
            values = np.asarray(loaded).astype(np.float64)
            return Image.fromarray(np.round((white - values if is_inverted else values) * (65535 / white)).astype(np.int32))

        return honour
    return None  # Pillow's table has the others


def _tga(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    if image.mode not in ("RGBA", "LA") or not image.tile:
        return None
    descriptor, attributes = _tga_alpha(image)

    def honour(loaded: Image.Image) -> Image.Image:
        alpha = loaded.getchannel("A")
        # Many writers declare no bits of alpha and mean it all the same; where all of it is zero they do not.
        if attributes in _TGA_NO_ALPHA or (descriptor == 0 and attributes is None and alpha.getextrema() == (0, 0)):
            return loaded.convert("RGB" if loaded.mode == "RGBA" else "L")
        if attributes == _TGA_PREMULTIPLIED:
            return Image.frombytes("RGBa", loaded.size, loaded.convert("RGBA").tobytes()).convert("RGBA")
        return loaded

    return honour


def _tga_alpha(image: Image.Image) -> tuple[int, int | None]:
    """Bits of alpha that the descriptor declares, and the attributes type of the extension area if there is one."""
    file, position = image.fp, image.fp.tell()
    try:
        file.seek(17)
        declared, attributes = file.read(1)[0] & 0x0F, None
        if file.seek(0, os.SEEK_END) >= 18 + 26:
            file.seek(-26, os.SEEK_END)
            footer = file.read(26)
            extension = int.from_bytes(footer[:4], "little")
            if footer.endswith(_TGA_FOOTER) and extension:
                file.seek(extension + 494)
                attributes = next(iter(file.read(1)), None)
        return declared, attributes
    finally:
        file.seek(position)


def _ppm(image: Image.Image) -> None:
    if image.info.get("scale", 1.0) != 1:
        raise UnreadableImage(f"floating-point pixels in a scale of {image.info['scale']:g}; their white level is not known")
