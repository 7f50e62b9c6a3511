"""Checks PNG files for completeness without decoding them. Needs no torch."""

import struct
import zlib
from pathlib import Path

from vqmosaic.files.permissions import explain_permission_errors
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, WITH_ALPHA = 0, 2, 4
"""Colour types of a PNG header. WITH_ALPHA is added to the others."""


def png_header(image_size: ImageSize, channels: int, keep_alpha: bool = False) -> bytes:
    """The IHDR data of a PNG of this size: 8 bits per channel, not interlaced, grey (images with 1 or 2 channels) or RGB.

    With `keep_alpha`, images with 2 or 4 channels have alpha.
    """
    height, width = height_and_width(image_size)
    colour_type = (GREY if channels <= 2 else RGB) + (WITH_ALPHA if keep_alpha and channels in (2, 4) else 0)
    return struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)


@explain_permission_errors()
def is_whole_png(path: Path, header: bytes | None = None) -> bool:
    """Whether a file is a complete PNG with correct chunk checksums and, if given, this header. Does not decode the pixels."""
    return path.is_file() and is_whole_png_content(path.read_bytes(), header)


def is_whole_png_content(content: bytes, header: bytes | None = None) -> bool:
    """Whether bytes are a complete PNG. See `is_whole_png`."""
    position = len(SIGNATURE)
    if not content.startswith(SIGNATURE) or (header is not None and content[16:29] != header):
        return False
    while position + 12 <= len(content):  # chunk: length, type, data, checksum of type and data
        chunk_type, end = content[position + 4:position + 8], position + 12 + int.from_bytes(content[position:position + 4])
        if end > len(content) or zlib.crc32(content[position + 4:end - 4]) != int.from_bytes(content[end - 4:end]):
            return False
        if chunk_type == b"IEND":
            return True
        position = end
    return False
