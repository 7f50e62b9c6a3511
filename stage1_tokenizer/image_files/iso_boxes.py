"""Reads the boxes of JPEG 2000, AVIF and other ISO media files. Each box has a size, a four-letter type, and a content."""

import struct
from collections.abc import Iterator
from typing import IO


def iso_boxes(file: IO[bytes], start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields (type, start, end) for each box between two positions of a file, where start and end are those of its content. Moves the file position.

    A box that extends beyond `end` is clipped there. Stops without an error at a box whose size is smaller than its header. Raises struct.error if
    the file ends within the header of a box.
    """
    while start + 8 <= end:
        file.seek(start)
        size, box_type = struct.unpack(">I4s", file.read(8))
        content_start = start + 8
        if size == 1:  # the size follows the type, as 64 bits
            size, content_start = struct.unpack(">Q", file.read(8))[0], start + 16
        box_end = end if size == 0 else min(start + size, end)  # size 0: the last box, which extends to the end
        if box_end < content_start:
            return
        yield box_type, content_start, box_end
        start = box_end
