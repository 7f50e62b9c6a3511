"""Detects image files that declare a colour space other than sRGB. Images are read without conversion, so check-data reports these files.

Metadata used:

- the ICC profile of any format
- the PNG chunks cICP, gAMA and cHRM (W3C PNG 3, section 4.3, defines their precedence)
- the AVIF box colr
- the TIFF tags TransferFunction, WhitePoint and PrimaryChromaticities
- the EXIF interoperability index of JPEG, which marks Adobe RGB in photos from cameras

Not used: profiles in JPEG 2000, BMP and GIF, and gamma in TGA. The numbers in cICP and colr are the code points of ITU-T H.273.
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
from PIL import Image, TiffImagePlugin

from stage1_tokenizer.image_files.decoders import stored_file
from stage1_tokenizer.image_files.iso_boxes import iso_boxes
from stage1_tokenizer.image_files.stored_values import png_chunk

_CLOSE_LEVELS = 4.0
"""A profile is close to sRGB if it changes the colours of a test image by less than this many of 255 levels on average."""
_TEST_LEVELS = (0, 32, 64, 96, 128, 160, 192, 224, 255)
"""Levels of each channel in the test image, which has all combinations."""
_INTEROPERABILITY_TAG, _INDEX_TAG = 0xA005, 1
"""EXIF tags of the interoperability directory, and of the index in it."""
_ADOBE_RGB_INDEX = "R03"
_BITS_PER_SAMPLE, _TRANSFER_FUNCTION, _WHITE_POINT, _PRIMARY_CHROMATICITIES = 258, 301, 318, 319
"""TIFF tags."""
_SRGB_GAMMA = 1 / 2.2
_SRGB_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""x and y of the white point and the red, green and blue primaries."""
_TOLERANCE = 0.03
"""Differences from sRGB in gamma, transfer curve and chromaticities that still count as close."""
_CLOSE_PRIMARIES, _CLOSE_TRANSFERS = {1, 2, 5, 6}, {1, 2, 4, 6, 13, 14, 15}
"""Code points of primaries and transfer functions that are close to sRGB, or unspecified (2)."""
_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_TRANSFERS = {8: "linear", 16: "PQ", 18: "HLG"}
"""Names of other code points, for messages."""


def other_colour_space(image: Image.Image) -> str | None:
    """The name of the colour space other than sRGB that an image declares; None if it is close to sRGB or not declared.

    `image` must be opened, but not loaded yet, because this reads from its file.
    """
    with contextlib.suppress(Exception):  # broken metadata can raise any error, and is ignored
        code_points, profile = _code_points(image), image.info.get("icc_profile")
        if code_points is not None and (image.format == "PNG" or not profile):  # in AVIF the profile takes precedence
            return _space_from_code_points(*code_points)
        if profile:
            return _space_from_profile(bytes(profile))
        if image.format == "PNG" and "srgb" not in image.info:
            return _space_from_gamma(image.info.get("gamma"), image.info.get("chromaticity"))
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            return _space_from_tags(image.tag_v2)
        if image.format in ("JPEG", "MPO") and image.getexif().get_ifd(_INTEROPERABILITY_TAG).get(_INDEX_TAG) == _ADOBE_RGB_INDEX:
            return "Adobe RGB (EXIF)"
    return None


def _code_points(image: Image.Image) -> tuple[int, int] | None:
    """The code points of the primaries and of the transfer function in a PNG or AVIF; None if the file has none."""
    if image.format == "PNG":
        chunk = png_chunk(image, b"cICP")
        return (chunk[0], chunk[1]) if len(chunk) >= 2 else None
    if image.format != "AVIF":
        return None
    with stored_file(image) as file:
        start, end = 0, file.seek(0, io.SEEK_END)
        # The box colr is in ipco, in iprp, in meta. The content of meta begins with a version and flags of 4 bytes.
        for parent, header_bytes in ((b"meta", 4), (b"iprp", 0), (b"ipco", 0)):
            start, end = next((first + header_bytes, last) for kind, first, last in iso_boxes(file, start, end) if kind == parent)
        for kind, first, _ in iso_boxes(file, start, end):
            if kind == b"colr":
                file.seek(first)
                content = file.read(8)
                if content.startswith(b"nclx"):  # this colr box has code points; another one may have the ICC profile
                    return struct.unpack(">4xHH", content)
    return None


def _space_from_code_points(primaries: int, transfer: int) -> str | None:
    """The name of a colour space given by its code points; None if it is close to sRGB or unspecified."""
    if primaries in _CLOSE_PRIMARIES and transfer in _CLOSE_TRANSFERS:
        return None
    names = [] if primaries in _CLOSE_PRIMARIES else [_PRIMARIES.get(primaries, f"primaries {primaries}")]
    names += [] if transfer in _CLOSE_TRANSFERS else [_TRANSFERS.get(transfer, f"transfer function {transfer}")]
    return f"{' '.join(names)} (code points)"


@functools.lru_cache(maxsize=16)
def _space_from_profile(content: bytes) -> str | None:
    """The name of an ICC profile; None if converting a test image from it to sRGB hardly changes the colours."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    name = " ".join((profile.profile.profile_description or "without a name").split())
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space.strip())
    if mode is None:  # such as Lab
        return f"{name} (ICC profile)"
    colours = np.array(list(itertools.product(_TEST_LEVELS, repeat=Image.getmodebands(mode))), np.uint8)
    test_image = Image.frombytes(mode, (len(colours), 1), colours.tobytes())
    converted = ImageCms.profileToProfile(test_image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB",
                                          renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC)
    difference = np.abs(np.asarray(converted).astype(int) - np.asarray(test_image.convert("RGB")).astype(int))
    return f"{name} (ICC profile)" if difference.mean() >= _CLOSE_LEVELS else None


def _space_from_tags(tags: Mapping[int, Any]) -> str | None:
    """A description of TIFF tags that declare a curve or chromaticities other than those of sRGB; None if there are none."""
    levels = 2 ** tags.get(_BITS_PER_SAMPLE, (1,))[0]
    curve = np.array(tags.get(_TRANSFER_FUNCTION, ()), float)[:levels] / 65535  # three channels have three curves; this is the first
    srgb_curve = np.linspace(0, 1, len(curve)) ** (1 / _SRGB_GAMMA)
    if len(curve) > 1 and np.abs(curve - srgb_curve).mean() > _TOLERANCE:
        return "a custom curve (TransferFunction)"
    if _WHITE_POINT in tags and _PRIMARY_CHROMATICITIES in tags:
        return _space_from_chromaticities(tuple(map(float, (*tags[_WHITE_POINT], *tags[_PRIMARY_CHROMATICITIES]))))
    return None


def _space_from_gamma(gamma: float | None, chromaticities: tuple[float, ...] | None) -> str | None:
    """A description of the PNG chunks gAMA and cHRM if they differ from sRGB; None if they are close or missing."""
    if gamma and abs(gamma - _SRGB_GAMMA) > _TOLERANCE:
        return f"gamma {gamma:g} (gAMA)"
    return _space_from_chromaticities(chromaticities) if chromaticities else None


def _space_from_chromaticities(chromaticities: tuple[float, ...]) -> str | None:
    """A description of a white point and primaries that differ from those of sRGB; None if they are close."""
    is_close = all(math.isclose(value, srgb, abs_tol=_TOLERANCE) for value, srgb in zip(chromaticities, _SRGB_CHROMATICITIES, strict=True))
    return None if is_close else "custom primaries"
