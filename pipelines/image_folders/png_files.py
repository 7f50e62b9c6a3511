"""A quick check of PNG files that an earlier call wrote. Loads no torch."""

import struct
import zlib
from pathlib import Path

from vqmosaic.files.permissions import naming_denied_permissions

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB = 0, 2
"""Colour types in a PNG header."""


def png_header(size: int, channels: int) -> bytes:
    """The header of a square PNG with `size` pixels a side: 8 bits, grey (1 channel) or RGB, not interlaced."""
    return struct.pack(">IIBBBBB", size, size, 8, GREY if channels == 1 else RGB, 0, 0, 0)


@naming_denied_permissions()
def is_whole_png(path: Path, header: bytes | None = None) -> bool:
    """Whether a file is a complete PNG with correct chunk checksums, and with this header if one is given. Does not decode the pixels."""
    if not path.is_file():
        return False
    content, position = path.read_bytes(), len(SIGNATURE)
    if not content.startswith(SIGNATURE) or (header is not None and content[16:29] != header):
        return False
    while position + 12 <= len(content):  # length, kind, data, checksum of kind and data
        kind, end = content[position + 4:position + 8], position + 12 + int.from_bytes(content[position:position + 4])
        if end > len(content) or zlib.crc32(content[position + 4:end - 4]) != int.from_bytes(content[end - 4:end]):
            return False
        if kind == b"IEND":
            return True
        position = end
    return False
