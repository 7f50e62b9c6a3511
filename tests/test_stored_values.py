"""What an image file says about its numbers is honoured, or the file is refused with the reason."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from stage1_tokenizer.images import UnreadableImage, read_image


def png(depth: int, colour: int, row: bytes, *chunks: tuple[bytes, bytes], width: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                                         for kind, body in parts)


def tiff(width: int, bits: list[int], photometric: int, data: bytes, sample_format: int = 1, extra: int | None = None, order: str = "<",
         deflate: bool = False, more: dict[int, list[int]] | None = None) -> bytes:
    """A TIFF of one row, written by hand for kinds that Pillow does not write."""
    data = zlib.compress(data) if deflate else data
    tags = {256: [width], 257: [1], 258: bits, 259: [8 if deflate else 1], 262: [photometric], 273: None, 277: [len(bits)], 278: [1],
            279: [len(data)], 339: [sample_format] * len(bits)} | ({338: [extra]} if extra is not None else {}) | (more or {})
    start = 8 + len(data) + len(data) % 2
    values_start, entries, values = start + 2 + 12 * len(tags) + 4, b"", b""
    for tag, numbers in sorted(tags.items()):
        numbers = [8] if numbers is None else numbers
        kind, letter = (4, "I") if tag in (273, 279) else (3, "H")
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack(f"{order}I", values_start + len(values)), values + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    magic = b"II" if order == "<" else b"MM"
    return (magic + struct.pack(f"{order}HI", 42, start) + data + bytes(len(data) % 2)
            + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values)


def tga(pixels: bytes, descriptor: int, attributes: int | None = None) -> bytes:
    """A TGA of one row with 32 bits a pixel, blue first, with an extension area that gives the attributes type."""
    content = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, len(pixels) // 4, 1, 32, descriptor) + pixels
    if attributes is None:
        return content
    return content + bytes(494) + bytes([attributes]) + struct.pack("<II", len(content), 0) + b"TRUEVISION-XFILE.\0"


def grey(content: bytes) -> list[int]:
    return np.asarray(read_image(content, channels=1)).reshape(-1).tolist()


def colours(content: bytes) -> list[list[int]]:
    return np.asarray(read_image(content)).reshape(-1, 3).tolist()


def refusal(content: bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(content)
    return str(caught.value)


# --- PNG ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "row", "transparent", "expected"), [
    (1, 0b01000000, 0, [255, 255]), (1, 0b01000000, 1, [0, 255]), (2, 0b01100000, 1, [255, 170]), (2, 0b01100000, 2, [85, 255]),
    (4, 0x5A, 5, [255, 170]), (4, 0x5A, 10, [85, 255]), (4, 0x5A, 0x105, [255, 170]),
])
def test_the_transparent_grey_of_few_bits(depth, row, transparent, expected):
    assert grey(png(depth, 0, bytes([row]), (b"tRNS", struct.pack(">H", transparent)))) == expected


def test_the_transparent_grey_of_8_and_16_bits():
    assert grey(png(8, 0, bytes([5, 9]), (b"tRNS", struct.pack(">H", 5)))) == [255, 9]
    assert grey(png(8, 0, bytes([5, 9]), (b"tRNS", struct.pack(">H", 0x105)))) == [255, 9], "only the bits of the depth count"
    assert grey(png(16, 0, struct.pack(">2H", 0x2020, 0x2021), (b"tRNS", struct.pack(">H", 0x2020)))) == [255, 32]


def test_the_transparent_colour_of_8_and_16_bits():
    eight = png(8, 2, bytes([1, 2, 3, 4, 5, 6]), (b"tRNS", struct.pack(">3H", 1, 2, 3)))
    assert colours(eight) == [[255, 255, 255], [4, 5, 6]]
    near = struct.pack(">9H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0x9ABD, 0x1334, 0x5678, 0x9ABC)
    sixteen = png(16, 2, near, (b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)), width=3)
    assert colours(sixteen) == [[255, 255, 255], [0x12, 0x56, 0x9A], [0x13, 0x56, 0x9A]], "exactly that colour, in all 16 bits"
    assert colours(png(16, 2, near, width=3))[0] == [0x12, 0x56, 0x9A]


def test_large_texts_and_profiles_cost_no_pixels(tmp_path):
    image, texts = Image.new("RGB", (3, 3), (9, 8, 7)), PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2_000_000, zip=True)
    texts.add_itxt("notes", "y" * 2_000_000, zip=True)
    image.save(tmp_path / "a.png", pnginfo=texts, icc_profile=bytes(2_000_000))
    assert read_image(tmp_path / "a.png").getpixel((1, 1)) == (9, 8, 7)
    bomb = png(8, 0, bytes(2), (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24 + 1))))
    assert "too large" in refusal(bomb)


# --- TIFF --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize(("bits", "data"), [
    (1, bytes([0b01000000])), (2, bytes([0b00110000])), (4, bytes([0x0F])), (8, bytes([0, 255])), (16, struct.pack("<2H", 0, 65535)),
])
def test_white_may_be_zero(bits, data, deflate):
    assert grey(tiff(2, [bits], 1, data, deflate=deflate)) == [0, 255]
    assert grey(tiff(2, [bits], 0, data, deflate=deflate)) == [255, 0]


@pytest.mark.parametrize("order", "<>")
def test_floating_point_white_may_be_zero(order):
    data = struct.pack(f"{order}2f", 0.0, 0.25)
    assert grey(tiff(2, [32], 1, data, 3, order=order)) == [0, 64]
    assert grey(tiff(2, [32], 0, data, 3, order=order)) == [255, 191]


def test_12_bits_have_their_own_white():
    assert grey(tiff(2, [12], 1, bytes([0xFF, 0xF8, 0x00]))) == [255, 128]


@pytest.mark.parametrize(("content", "words"), [
    (tiff(2, [8], 1, bytes(2), 2), "signed"), (tiff(2, [16], 1, bytes(4), 2), "signed"),
    (tiff(2, [32], 1, struct.pack("<2i", -1, 0), 2), "white level"), (tiff(2, [32], 1, struct.pack("<2I", 65536, 0)), "white level"),
    (tiff(2, [8, 8, 8], 6, bytes(6)), "YCbCr"),
    (tiff(2, [64], 1, bytes(16), 3), "a TIFF file of a kind that Pillow does not read"),
])
def test_numbers_without_known_levels_are_refused(content, words):
    assert words in refusal(content)


def test_pillow_writes_16_bits_as_32():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 32896, 65535]], np.int32)).save(buffer, "TIFF")
    assert grey(buffer.getvalue()) == [0, 128, 255]


def test_extra_samples_say_what_they_are():
    half_red = bytes([128, 0, 0, 128])
    assert colours(tiff(1, [8] * 4, 2, half_red, extra=0)) == [[128, 0, 0]], "a sample of unknown meaning"
    assert colours(tiff(1, [8] * 4, 2, half_red, extra=1)) == [[255, 127, 127]], "alpha that the colours are multiplied by"
    assert colours(tiff(1, [8] * 4, 2, half_red, extra=2)) == [[191, 127, 127]], "alpha that they are not multiplied by"


def test_inks():
    red = bytes([0, 255, 255, 0])
    for more in (None, {332: [1]}, {336: [0, 255]}):
        assert colours(tiff(1, [8] * 4, 5, red, more=more)) == [[255, 0, 0]]
    for more in ({332: [2]}, {336: [255, 0]}):
        assert "inks" in refusal(tiff(1, [8] * 4, 5, red, more=more))


def test_cielab_becomes_rgb():
    buffer = io.BytesIO()
    Image.new("LAB", (1, 1), (255, 128, 128)).save(buffer, "TIFF")
    assert min(colours(buffer.getvalue())[0]) > 250


# --- TGA, PPM ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("descriptor", "attributes", "alpha", "expected"), [
    (8, None, [0, 255], [[255, 255, 255], [30, 20, 10]]), (8, 3, [0, 255], [[255, 255, 255], [30, 20, 10]]),
    (0, None, [0, 255], [[255, 255, 255], [30, 20, 10]]), (0, None, [0, 0], [[30, 20, 10]] * 2), (8, None, [0, 0], [[255, 255, 255]] * 2),
    (8, 0, [0, 255], [[30, 20, 10]] * 2), (8, 1, [0, 255], [[30, 20, 10]] * 2), (8, 2, [0, 255], [[30, 20, 10]] * 2),
    (8, 4, [255, 128], [[30, 20, 10], [157, 147, 137]]),
])
def test_tga_alpha_is_what_descriptor_and_extension_say(descriptor, attributes, alpha, expected):
    pixels = b"".join(bytes([10, 20, 30, value]) for value in alpha)
    assert np.allclose(colours(tga(pixels, 0x20 | descriptor, attributes)), expected, atol=1)


def test_ppm_levels():
    assert grey(b"P5 3 1 15\n" + bytes([0, 8, 15])) == [0, 136, 255]
    assert grey(b"P5 2 1 1023\n" + struct.pack(">2H", 1023, 512)) == [255, 128]
    assert colours(b"P6 1 1 65535\n" + struct.pack(">3H", 65535, 32896, 0)) == [[255, 128, 0]]
    assert grey(b"P4 2 1\n" + bytes([0b01000000])) == [255, 0], "in a bitmap 1 is black"
    assert grey(b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.0, 1.0)) == [0, 255]
    assert "scale of 2" in refusal(b"Pf\n2 1\n-2.0\n" + struct.pack("<2f", 0.0, 1.0))


# --- colour profiles ---------------------------------------------------------------------------------------------------------


def test_numbers_are_taken_as_srgb_whatever_the_profile():
    row, gamma = bytes([10, 20, 30, 40, 50, 60]), (b"gAMA", struct.pack(">I", 100_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colours(png(8, 2, row, gamma)) == colours(png(8, 2, row)) == [[10, 20, 30], [40, 50, 60]]
