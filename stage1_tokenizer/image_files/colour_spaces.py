"""Detects image files that declare a colour space other than sRGB. Images are read without conversion, so check-data reports these files.

Metadata used: the ICC profile of any format; the PNG chunks cICP, gAMA and cHRM (W3C PNG 3, section 4.3, defines their precedence); the AVIF box
colr (ITU-T H.273 defines its codes); the TIFF tags TransferFunction, WhitePoint and PrimaryChromaticities; and the interoperability index of
JPEG, which marks Adobe RGB in photos from cameras. Not used: profiles in JPEG 2000, BMP and GIF, and gamma in TGA.
"""

import contextlib
import functools
import io
import itertools
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from stage1_tokenizer.image_files.iso_boxes import iso_boxes
from stage1_tokenizer.image_files.stored_values import png_chunk

_CLOSE_LEVELS = 4.0
"""A profile is close to sRGB if it changes the colours of a test image by less than this many of 255 levels on average."""
_TEST_LEVELS = (0, 32, 64, 96, 128, 160, 192, 224, 255)
_INTEROPERABILITY, _INDEX, _ADOBE_RGB = 0xA005, 1, "R03"
_BITS, _TRANSFER_FUNCTION, _WHITE_POINT, _PRIMARY_CHROMATICITIES = 258, 301, 318, 319
_SRGB_GAMMA, _SRGB_CHROMATICITIES, _TOLERANCE = 1 / 2.2, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06), 0.03
_CLOSE_PRIMARIES, _CLOSE_TRANSFERS = {1, 2, 5, 6}, {1, 2, 4, 6, 13, 14, 15}
_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_TRANSFERS = {8: "linear", 16: "PQ", 18: "HLG"}


def other_colour_space(image: Image.Image) -> str | None:
    """The name of the colour space that an opened file declares; None if it is close to sRGB or not declared. Call this before loading the pixels."""
    with contextlib.suppress(Exception):  # broken metadata can raise any error, and is ignored
        codes, profile = _code_points(image), image.info.get("icc_profile")
        if codes is not None and (image.format == "PNG" or not profile):  # in AVIF the profile takes precedence
            return _space_from_codes(*codes)
        if profile:
            return _space_from_profile(bytes(profile))
        if image.format == "PNG" and "srgb" not in image.info:
            return _space_from_gamma(image.info.get("gamma"), image.info.get("chromaticity"))
        if image.format == "TIFF":
            return _space_from_tags(image.tag_v2)
        if image.format in ("JPEG", "MPO") and image.getexif().get_ifd(_INTEROPERABILITY).get(_INDEX) == _ADOBE_RGB:
            return "Adobe RGB (EXIF)"
    return None


def _code_points(image: Image.Image) -> tuple[int, int] | None:
    """The codes of the primaries and the transfer function in a PNG or AVIF; None if the file has none."""
    if image.format == "PNG":
        chunk = png_chunk(image, b"cICP")
        return (chunk[0], chunk[1]) if len(chunk) >= 2 else None
    if image.format != "AVIF":
        return None
    file, position = image.fp, image.fp.tell()
    try:
        start, end = 0, file.seek(0, io.SEEK_END)
        for wanted, header_bytes in ((b"meta", 4), (b"iprp", 0), (b"ipco", 0)):  # the content of meta begins with a version
            start, end = next((first + header_bytes, last) for kind, first, last in iso_boxes(file, start, end) if kind == wanted)
        for kind, first, _ in iso_boxes(file, start, end):
            if kind == b"colr":
                file.seek(first)
                if (body := file.read(8)).startswith(b"nclx"):
                    return struct.unpack(">4xHH", body)
        return None
    finally:
        file.seek(position)


def _space_from_codes(primaries: int, transfer: int) -> str | None:
    if primaries in _CLOSE_PRIMARIES and transfer in _CLOSE_TRANSFERS:
        return None
    names = [] if primaries in _CLOSE_PRIMARIES else [_PRIMARIES.get(primaries, f"primaries {primaries}")]
    names += [] if transfer in _CLOSE_TRANSFERS else [_TRANSFERS.get(transfer, f"transfer function {transfer}")]
    return f"{' '.join(names)} (code points)"


@functools.lru_cache(maxsize=16)
def _space_from_profile(content: bytes) -> str | None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    name = " ".join((profile.profile.profile_description or "without a name").split())
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space.strip())
    if mode is None:
        return f"{name} (ICC profile)"
    colours = np.array(list(itertools.product(_TEST_LEVELS, repeat=Image.getmodebands(mode))), np.uint8)
    test_image = Image.frombytes(mode, (len(colours), 1), colours.tobytes())
    converted = ImageCms.profileToProfile(test_image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB",
                                          renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC)
    difference = np.abs(np.asarray(converted).astype(int) - np.asarray(test_image.convert("RGB")).astype(int))
    return f"{name} (ICC profile)" if difference.mean() >= _CLOSE_LEVELS else None


def _space_from_tags(tags: Mapping[int, Any]) -> str | None:
    curve = np.array(tags.get(_TRANSFER_FUNCTION, ()), float)[:2 ** tags.get(_BITS, (1,))[0]] / 65535
    if len(curve) > 1 and np.abs(curve - np.linspace(0, 1, len(curve)) ** (1 / _SRGB_GAMMA)).mean() > _TOLERANCE:
        return "a custom curve (TransferFunction)"
    if _WHITE_POINT in tags and _PRIMARY_CHROMATICITIES in tags:
        return _space_from_chromaticities(tuple(map(float, (*tags[_WHITE_POINT], *tags[_PRIMARY_CHROMATICITIES]))))
    return None


def _space_from_gamma(gamma: float | None, chromaticities: tuple[float, ...] | None) -> str | None:
    if gamma and abs(gamma - _SRGB_GAMMA) > _TOLERANCE:
        return f"gamma {gamma:g} (gAMA)"
    return _space_from_chromaticities(chromaticities) if chromaticities else None


def _space_from_chromaticities(chromaticities: tuple[float, ...]) -> str | None:
    """A description of a white point and primaries that differ from those of sRGB; None if they are close."""
    is_close = all(math.isclose(value, srgb, abs_tol=_TOLERANCE) for value, srgb in zip(chromaticities, _SRGB_CHROMATICITIES, strict=True))
    return None if is_close else "custom primaries"
