"""Limits on the metadata of image files, which Pillow reads as soon as it opens a file.

A file of 1 MB may have thousands of TIFF tags that all refer to the same bytes. Pillow copies the bytes for each tag, which takes many gigabytes of
memory. This concerns TIFF files, and the EXIF data of all formats.
"""

import os
import struct
from typing import IO

from PIL import Image, PngImagePlugin, TiffImagePlugin

MAX_EXIF_BYTES = 2**16  # the size limit of a JPEG segment; the orientation is in the first directory, near the start
MAX_TAGS = 2**16 - 1
MAX_VALUE_FACTOR, MIN_VALUE_BYTES = 4, 2**20
"""The values of all tags in a directory may take this many times the size of the file. MIN_VALUE_BYTES are always allowed."""
MAX_PNG_CHUNK_BYTES = 2**24
"""Of a decompressed chunk. Image editors write PNG files with profiles and workflows of several megabytes, which Pillow refuses by default.
Pillow's limit on all texts together still applies."""

_load_exif = Image.Exif.load
_load_directory = TiffImagePlugin.ImageFileDirectory_v2.load


def limit_metadata() -> None:
    """Apply the limits to all files that Pillow opens in this process. Later calls do nothing."""
    Image.Exif.load = _load_short_exif  # type: ignore[method-assign, assignment]  # replaced on purpose
    TiffImagePlugin.ImageFileDirectory_v2.load = _load_limited_directory  # type: ignore[method-assign, assignment]
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_PNG_CHUNK_BYTES)


def _load_short_exif(self: Image.Exif, data: bytes) -> None:
    _load_exif(self, data[:MAX_EXIF_BYTES])


def _load_limited_directory(self: TiffImagePlugin.ImageFileDirectory_v2, fp: IO[bytes]) -> None:
    """Read a TIFF directory. Raises SyntaxError, Pillow's error for invalid headers, if its tags refer to the same bytes too often."""
    start = fp.tell()
    file_size = fp.seek(0, os.SEEK_END)
    fp.seek(start)
    count, value_bytes = _stated_size(self, fp, file_size)
    fp.seek(start)
    if count > MAX_TAGS or value_bytes > max(MIN_VALUE_BYTES, MAX_VALUE_FACTOR * file_size):
        raise SyntaxError(f"a TIFF directory of {count} tags with {value_bytes} bytes of values, in a file of {file_size} bytes")
    _load_directory(self, fp)


def _stated_size(directory: TiffImagePlugin.ImageFileDirectory_v2, file: IO[bytes], file_size: int) -> tuple[int, int]:
    """(number of tags, bytes of the values outside of the directory) that a directory states, at the current position of a file.

    A value counts as no larger than the file, because reading it would end there.
    """
    order, is_big = directory._endian, directory._bigtiff
    head = file.read(8 if is_big else 2)
    if len(head) < (8 if is_big else 2):
        return 0, 0
    count = struct.unpack(order + ("Q" if is_big else "H"), head)[0]
    entry = struct.Struct(order + ("HHQ8s" if is_big else "HHL4s"))
    entries = file.read(entry.size * min(count, MAX_TAGS))
    value_bytes = 0
    for _, kind, number, _ in entry.iter_unpack(entries[:len(entries) // entry.size * entry.size]):
        size = number * directory._load_dispatch[kind][0] if kind in directory._load_dispatch else 0
        value_bytes += min(size, file_size) if size > (8 if is_big else 4) else 0
    return count, value_bytes
