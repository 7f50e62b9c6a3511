"""Reads the header of a JPEG 2000 file: bit depths, colour space, palette and the roles of the channels (ITU-T T.800, annex I).

Pillow reads little of this. It uses channels in stored order, and treats 255 as white at every bit depth.
"""

import struct
from dataclasses import dataclass, field
from typing import IO

from stage1_tokenizer.image_files.iso_boxes import iso_boxes

_CODESTREAM_START = b"\xff\x4f\xff\x51"


@dataclass
class Jpeg2000Header:
    """Fields of the colr, pclr, cmap and cdef boxes, and of the SIZ marker segment."""

    depths: list[int] = field(default_factory=list)
    """Bits of each component."""
    colour_space: int | None = None
    """EnumCS of the first colr box; None if the box holds a profile, or if there is no such box."""
    has_palette: bool = False
    palette_columns: list[int] = field(default_factory=list)
    """The palette's column for each channel, in the order of the channels."""
    channels: dict[int, tuple[int, int]] | None = None
    """(type, association) by channel; None if the file does not define them."""


def read_jpeg2000_header(file: IO[bytes]) -> Jpeg2000Header:
    """The header of an opened file. Restores the file position. Raises struct.error for a truncated header."""
    position, header = file.tell(), Jpeg2000Header()
    try:
        file.seek(0)
        if file.read(4) == _CODESTREAM_START:
            header.depths = _depths(file)
            return header
        for kind, start, end in iso_boxes(file, 0, file.seek(0, 2)):
            file.seek(start)
            if kind == b"jp2c":
                if file.read(4) == _CODESTREAM_START:
                    header.depths = _depths(file)
                break
            if kind == b"jp2h":
                colr_was_read = False
                for inner, inner_start, inner_end in iso_boxes(file, start, end):
                    file.seek(inner_start)
                    body = file.read(inner_end - inner_start)
                    if inner == b"colr" and not colr_was_read:
                        colr_was_read = True
                        header.colour_space = struct.unpack(">I", body[3:7])[0] if body[0] == 1 else None
                    else:
                        _read_box(header, inner, body)
        return header
    finally:
        file.seek(position)


def _read_box(header: Jpeg2000Header, kind: bytes, body: bytes) -> None:
    if kind == b"pclr":
        header.has_palette = True
    elif kind == b"cmap":
        header.palette_columns = [column for _, _, column in struct.iter_unpack(">HBB", body)]
    elif kind == b"cdef":
        header.channels = {channel: (role, association) for channel, role, association in struct.iter_unpack(">HHH", body[2:])}


def _depths(file: IO[bytes]) -> list[int]:
    """Bits of each component, from the SIZ marker segment at the current file position."""
    components = struct.unpack(">36xH", file.read(38))[0]
    return [(size & 0x7F) + 1 for size, _, _ in struct.iter_unpack(">BBB", file.read(3 * components))]
