"""Makes the bytes of image files for tests."""

import io
import struct
import zlib

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The file that Pillow writes for an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, for headers, depths and chunks that Pillow does not write. Each row starts with its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                                         for kind, body in parts)


def png_row(depth: int, colour: int, row: bytes, *chunks: tuple[bytes, bytes], width: int = 2) -> bytes:
    """A PNG of one row, written by hand."""
    return png(width, 1, depth, colour, b"\0" + row, *chunks)


def exif_bomb(size: int, entries: int) -> bytes:
    """A TIFF directory in which every entry refers to all of its bytes."""
    records = b"".join(struct.pack("<HHII", tag, 7, size - 8, 8) for tag in range(1000, 1000 + entries))
    return (b"II*\0" + struct.pack("<IH", 8, entries) + records).ljust(size, b"\0")


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
