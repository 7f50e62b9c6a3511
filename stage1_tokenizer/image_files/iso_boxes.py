"""Reads the boxes of JPEG 2000, AVIF and other ISO media files. Each box has a size, a four-letter type, and a content."""

import struct
from collections.abc import Iterator
from typing import BinaryIO


def iso_boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields (type, start, end) of the content of each box between two positions of a file. Moves the file position."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        content = start + 8
        if size == 1:
            size, content = struct.unpack(">Q", file.read(8))[0], start + 16
        stop = end if size == 0 else min(start + size, end)
        if stop < content:
            return
        yield kind, content, stop
        start = stop
