"""Pixel values are read as image files define them, or the file is rejected with a reason."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from stage1_tokenizer.image_files.images import UnreadableImage, read_image
from tests.image_bytes import encoded, png_row


def tiff(width: int, bits: list[int], photometric: int, data: bytes, sample_format: int = 1, extra: int | None = None, order: str = "<",
         deflate: bool = False, more: dict[int, list[int]] | None = None) -> bytes:
    """A TIFF of one row, for variants that Pillow does not write."""
    data = zlib.compress(data) if deflate else data
    tags = {256: [width], 257: [1], 258: bits, 259: [8 if deflate else 1], 262: [photometric], 273: None, 277: [len(bits)], 278: [1],
            279: [len(data)], 339: [sample_format] * len(bits)} | ({338: [extra]} if extra is not None else {})
    tags |= more or {}
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
    """A TGA of one row with 32-bit BGRA pixels. `attributes` adds an extension area with this attributes type."""
    content = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, len(pixels) // 4, 1, 32, descriptor) + pixels
    if attributes is None:
        return content
    return content + bytes(494) + bytes([attributes]) + struct.pack("<II", len(content), 0) + b"TRUEVISION-XFILE.\0"


def grey(content: bytes) -> list[int]:
    return np.asarray(read_image(content, channels=1)).reshape(-1).tolist()


def colours(content: bytes) -> list[list[int]]:
    return np.asarray(read_image(content)).reshape(-1, 3).tolist()


def rejection_message(content: bytes) -> str:
    with pytest.raises(UnreadableImage) as error:
        read_image(content)
    return str(error.value)


# --- PNG ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "row", "transparent", "expected"), [
    (1, 0b01000000, 0, [255, 255]), (1, 0b01000000, 1, [0, 255]), (1, 0b01000000, 2, [255, 255]),
    (2, 0b01100000, 1, [255, 170]), (2, 0b01100000, 2, [85, 255]),
    (4, 0x5A, 5, [255, 170]), (4, 0x5A, 10, [85, 255]), (4, 0x5A, 0x105, [255, 170]),
])
def test_png_transparent_grey_of_less_than_8_bits(depth, row, transparent, expected):
    assert grey(png_row(depth, 0, bytes([row]), (b"tRNS", struct.pack(">H", transparent)))) == expected


def test_png_transparent_grey_of_8_and_16_bits():
    assert grey(png_row(8, 0, bytes([5, 9]), (b"tRNS", struct.pack(">H", 5)))) == [255, 9]
    assert grey(png_row(8, 0, bytes([5, 9]), (b"tRNS", struct.pack(">H", 0x105)))) == [255, 9], "only bits within the depth are compared"
    assert grey(png_row(16, 0, struct.pack(">2H", 0x2020, 0x2021), (b"tRNS", struct.pack(">H", 0x2020)))) == [255, 32]


def test_png_palette_alpha_may_contain_any_byte():
    table = (b"PLTE", bytes(9))
    assert grey(png_row(8, 3, bytes([0, 1, 2]), table, (b"tRNS", bytes([255, 0, 10])), width=3)) == [0, 255, 245], "byte 10 is a line feed"
    assert grey(png_row(8, 3, bytes([0, 1, 2]), table, (b"tRNS", bytes([255, 0])), width=3)) == [0, 255, 0]


def test_png_transparent_colour_of_8_and_16_bits():
    eight = png_row(8, 2, bytes([1, 2, 3, 4, 5, 6]), (b"tRNS", struct.pack(">3H", 1, 2, 3)))
    assert colours(eight) == [[255, 255, 255], [4, 5, 6]]
    near = struct.pack(">9H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0x9ABD, 0x1334, 0x5678, 0x9ABC)
    sixteen = png_row(16, 2, near, (b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)), width=3)
    assert colours(sixteen) == [[255, 255, 255], [0x12, 0x56, 0x9A], [0x13, 0x56, 0x9A]], "all 16 bits must match"
    assert colours(png_row(16, 2, near, width=3))[0] == [0x12, 0x56, 0x9A]


def test_large_png_metadata_does_not_prevent_reading(tmp_path):
    image, texts = Image.new("RGB", (3, 3), (9, 8, 7)), PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2_000_000, zip=True)
    texts.add_itxt("notes", "y" * 2_000_000, zip=True)
    image.save(tmp_path / "a.png", pnginfo=texts, icc_profile=bytes(2_000_000))
    assert read_image(tmp_path / "a.png").getpixel((1, 1)) == (9, 8, 7)
    bomb = png_row(8, 0, bytes(2), (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24 + 1))))
    assert "too large" in rejection_message(bomb)


# --- TIFF --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize(("bits", "data"), [
    (1, bytes([0b01000000])), (2, bytes([0b00110000])), (4, bytes([0x0F])), (8, bytes([0, 255])), (16, struct.pack("<2H", 0, 65535)),
])
def test_tiff_black_is_zero_and_white_is_zero(bits, data, deflate):
    assert grey(tiff(2, [bits], 1, data, deflate=deflate)) == [0, 255]
    assert grey(tiff(2, [bits], 0, data, deflate=deflate)) == [255, 0]


@pytest.mark.parametrize("order", "<>")
def test_floating_point_tiff_black_is_zero_and_white_is_zero(order):
    data = struct.pack(f"{order}2f", 0.0, 0.25)
    assert grey(tiff(2, [32], 1, data, 3, order=order)) == [0, 64]
    assert grey(tiff(2, [32], 0, data, 3, order=order)) == [255, 191]


def test_12_bit_tiff_values_are_scaled():
    assert grey(tiff(2, [12], 1, bytes([0xFF, 0xF8, 0x00]))) == [255, 128]


@pytest.mark.parametrize(("content", "message"), [
    (tiff(2, [8], 1, bytes(2), 2), "signed"), (tiff(2, [16], 1, bytes(4), 2), "signed"),
    (tiff(2, [32], 1, struct.pack("<2i", -1, 0), 2), "white level"), (tiff(2, [32], 1, struct.pack("<2I", 65536, 0)), "white level"),
    (tiff(2, [64], 1, bytes(16), 3), "a TIFF file of a kind that Pillow does not read"),
])
def test_tiff_values_without_a_known_range_are_rejected(content, message):
    assert message in rejection_message(content)


def test_32_bit_tiff_with_16_bit_values_is_scaled():
    assert grey(encoded(Image.fromarray(np.array([[0, 32896, 65535]], np.int32)), "TIFF")) == [0, 128, 255]


def test_tiff_extra_samples():
    half_red = bytes([128, 0, 0, 128])
    assert colours(tiff(1, [8] * 4, 2, half_red, extra=0)) == [[128, 0, 0]], "unspecified data"
    assert colours(tiff(1, [8] * 4, 2, half_red, extra=1)) == [[255, 127, 127]], "associated alpha"
    assert colours(tiff(1, [8] * 4, 2, half_red, extra=2)) == [[191, 127, 127]], "unassociated alpha"


def test_tiff_ink_sets():
    red = bytes([0, 255, 255, 0])
    for more in (None, {332: [1]}, {336: [0, 255]}):
        assert colours(tiff(1, [8] * 4, 5, red, more=more)) == [[255, 0, 0]]
    for more in ({332: [2]}, {336: [255, 0]}):
        assert "inks" in rejection_message(tiff(1, [8] * 4, 5, red, more=more))


def test_tiff_cielab_is_converted_to_rgb():
    assert min(colours(encoded(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF"))[0]) > 250


def test_tiff_colour_maps_of_8_and_16_bits():
    ramp = [*range(256)] * 3
    assert grey(tiff(2, [8], 3, bytes([0, 200]), more={320: ramp})) == [0, 200]
    assert grey(tiff(2, [8], 3, bytes([0, 200]), more={320: [257 * value for value in ramp]})) == [0, 200]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflate", [False, True])
def test_32_bit_tiff_in_both_byte_orders(order, deflate):
    assert grey(tiff(2, [32], 1, struct.pack(f"{order}2f", 0.25, 1.0), 3, order=order, deflate=deflate)) == [64, 255]
    assert grey(tiff(2, [32], 1, struct.pack(f"{order}2i", 32896, 65535), 2, order=order, deflate=deflate)) == [128, 255]


@pytest.mark.parametrize("order", "<>")
def test_planar_16_bit_tiff(order):
    planes = struct.pack(f"{order}6H", 0x1234, 0xFFFF, 0x5678, 0x8080, 0x9ABC, 0)
    assert colours(tiff(2, [16] * 3, 2, planes, order=order, more={284: [2], 273: [8, 12, 16], 279: [4, 4, 4]})) \
        == [[0x12, 0x56, 0x9A], [255, 128, 0]]


def test_uncompressed_tiff_ycbcr_is_converted_to_rgb():
    assert colours(tiff(2, [8] * 3, 6, bytes([255, 128, 128, 76, 85, 255]), more={530: [1, 1]})) == [[255, 255, 255], [254, 0, 0]]


def test_missing_tiff_strips_are_rejected():
    present = {257: [2], 278: [1]}
    assert grey(tiff(2, [8], 1, bytes([9, 8, 7, 6]), more=present | {273: [8, 10], 279: [2, 2]})) == [9, 8, 7, 6]
    for missing in ({273: [8], 279: [2]}, {273: [8, 0], 279: [2, 0]}):
        assert "truncated" in rejection_message(tiff(2, [8], 1, bytes([9, 8, 7, 6]), more=present | missing))


def test_custom_tiff_reference_black_white_is_rejected():
    def with_levels(*numbers):
        content = tiff(1, [8] * 3, 2, bytes([16, 16, 16]), more={532: [0]})
        position = content.index(struct.pack("<HHI", 532, 3, 1))
        body = b"".join(struct.pack("<II", number, 1) for number in numbers)
        return content[:position] + struct.pack("<HHII", 532, 5, 6, len(content)) + content[position + 12:] + body

    assert colours(with_levels(0, 255, 0, 255, 0, 255)) == colours(with_levels(0, 255, 128, 255, 128, 255)) == [[16, 16, 16]]
    assert "ReferenceBlackWhite" in rejection_message(with_levels(16, 235, 16, 235, 16, 235))


def test_tiff_previews_are_rejected():
    previewed = {254: [1]}
    assert grey(tiff(1, [8], 1, bytes([7]), more=previewed)) == [7], "the only image in the file"
    assert "preview" in rejection_message(tiff(1, [8], 1, bytes([7]), more=previewed | {330: [8]}))
    assert grey(tiff(1, [8], 1, bytes([7]), more={254: [2], 330: [8]})) == [7], "one page of many"
    buffer = io.BytesIO()
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory[254] = 1
    Image.new("L", (2, 2)).save(buffer, "TIFF", tiffinfo=directory, save_all=True, append_images=[Image.new("L", (9, 9))])
    assert "preview" in rejection_message(buffer.getvalue())


def test_duplicate_tiff_tags_are_rejected():
    # Pillow checks the last tile size against the pixel limit, but libtiff allocates memory for the first.
    image = {257: [2], 322: [4096], 323: [4096], 324: [8], 325: [4]}
    content = tiff(2, [8], 1, bytes(4), more=image)
    position = content.index(struct.pack("<HHI", 323, 3, 1))
    assert "tag 322 more than once" in rejection_message(content[:position] + struct.pack("<HHIHH", 322, 3, 1, 16, 0) + content[position + 12:])


# --- TGA, PPM ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("descriptor", "attributes", "alpha", "expected"), [
    (8, None, [0, 255], [[255, 255, 255], [30, 20, 10]]), (8, 3, [0, 255], [[255, 255, 255], [30, 20, 10]]),
    (0, None, [0, 255], [[255, 255, 255], [30, 20, 10]]), (0, None, [0, 0], [[30, 20, 10]] * 2), (8, None, [0, 0], [[255, 255, 255]] * 2),
    (8, 0, [0, 255], [[30, 20, 10]] * 2), (8, 1, [0, 255], [[30, 20, 10]] * 2), (8, 2, [0, 255], [[30, 20, 10]] * 2),
    (8, 4, [255, 128], [[30, 20, 10], [157, 147, 137]]),
])
def test_tga_alpha_follows_descriptor_and_extension(descriptor, attributes, alpha, expected):
    pixels = b"".join(bytes([10, 20, 30, value]) for value in alpha)
    assert np.allclose(colours(tga(pixels, 0x20 | descriptor, attributes)), expected, atol=1)


@pytest.mark.parametrize("descriptor", [0x20, 0x21])
@pytest.mark.parametrize("bit", [0, 0x8000])
def test_alpha_bit_of_16_bit_tga_is_ignored(descriptor, bit):
    pixels = struct.pack("<2H", bit | 0x7C00, bit | 0x001F)
    assert colours(struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 2, 1, 16, descriptor) + pixels) == [[255, 0, 0], [0, 0, 255]]
    table = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 16, 0, 0, 2, 1, 8, descriptor) + pixels + bytes([1, 0])
    assert colours(table) == [[0, 0, 255], [255, 0, 0]]


def test_interleaved_tga_rows_are_rejected():
    assert "interleaved" in rejection_message(struct.pack("<BBBHHBHHHHBB", 0, 0, 3, 0, 0, 0, 0, 0, 2, 2, 8, 0x60) + bytes(4))


def test_ppm_values_are_scaled():
    assert grey(b"P5 3 1 15\n" + bytes([0, 8, 15])) == [0, 136, 255]
    assert grey(b"P5 2 1 1023\n" + struct.pack(">2H", 1023, 512)) == [255, 128]
    assert colours(b"P6 1 1 65535\n" + struct.pack(">3H", 65535, 32896, 0)) == [[255, 128, 0]]
    assert grey(b"P4 2 1\n" + bytes([0b01000000])) == [255, 0], "in a bitmap 1 is black"
    assert grey(b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.0, 1.0)) == [0, 255]
    assert "scale of 2" in rejection_message(b"Pf\n2 1\n-2.0\n" + struct.pack("<2f", 0.0, 1.0))


# --- BMP, GIF ----------------------------------------------------------------------------------------------------------------


def bmp(width: int, bits: int, palette: bytes, data: bytes, compression: int = 0, masks: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40 + len(masks), width, 1, 1, bits, compression, len(data), 2835, 2835, len(palette) // 4, 0) + masks
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + palette + data


def greys(*values: int) -> bytes:
    return b"".join(bytes([value, value, value, 0]) for value in values)


@pytest.mark.parametrize(("bits", "data", "compression"), [
    (1, bytes([0b01100000, 0, 0, 0]), 0), (4, bytes([0x01, 0x10, 0, 0]), 0), (8, bytes([0, 1, 1, 0]), 0), (8, bytes([1, 0, 2, 1, 1, 0, 0, 1]), 1),
])
def test_bmp_depth_does_not_depend_on_the_palette(bits, data, compression):
    assert grey(bmp(4, bits, greys(0, 255), data, compression)) == [0, 255, 255, 0]
    assert grey(bmp(4, bits, greys(255, 0), data, compression)) == [255, 0, 0, 255]
    if bits > 1:
        assert grey(bmp(4, bits, greys(*range(2 ** min(bits, 5))), data, compression)) == [0, 1, 1, 0]


def test_bmp_alpha_of_zeros_is_ignored():
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    assert colours(bmp(2, 32, b"", bytes([1, 2, 3, 0, 4, 5, 6, 0]), 3, masks)) == [[3, 2, 1], [6, 5, 4]]
    assert colours(bmp(2, 32, b"", bytes([1, 2, 3, 0, 4, 5, 6, 255]), 3, masks)) == [[255, 255, 255], [6, 5, 4]]


def test_absolute_runs_of_4_bit_bmp_are_read_or_rejected():
    codes = bytes([0, 4, 0x01, 0x10, 0, 5, 0x01, 0x10, 0x10, 0, 0, 1])
    try:
        assert grey(bmp(9, 4, greys(9, 200), codes, 2)) == [9, 200, 200, 9, 9, 200, 200, 9, 200]
    except UnreadableImage as error:
        assert "this version of Pillow misreads" in str(error)
    assert grey(bmp(4, 4, greys(9, 200), bytes([0, 4, 0x01, 0x10, 0, 1]), 2)) == [9, 200, 200, 9]


def gif(background: int, has_table: bool = True, transparent: int | None = None) -> bytes:
    """A GIF of three pixels. Its frame covers the middle pixel with the second colour of a table."""
    table = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    control = b"" if transparent is None else bytes([0x21, 0xF9, 4, 1, 0, 0, transparent, 0])
    frame = b"," + struct.pack("<HHHHB", 1, 0, 1, 1, 0 if has_table else 0x81) + (b"" if has_table else table)
    screen = struct.pack("<HHBBB", 3, 1, 0x81 if has_table else 0, background, 0)
    return b"GIF89a" + screen + (table if has_table else b"") + control + frame + bytes([2, 2, 0b01001100, 0b1, 0]) + b";"


def test_gif_background_is_visible_outside_the_frame():
    green, white = [0, 255, 0], [255, 255, 255]
    assert colours(gif(0)) == [[255, 0, 0], green, [255, 0, 0]]
    assert colours(gif(2)) == [[0, 0, 255], green, [0, 0, 255]]
    assert colours(gif(2, has_table=False)) == colours(gif(2, transparent=0)) == [white, green, white]


# --- JPEG 2000 ---------------------------------------------------------------------------------------------------------------


def jp2(image: Image.Image, *boxes: tuple[bytes, bytes], space: int | None = None) -> bytes:
    """The image as JPEG 2000, with these header boxes instead of Pillow's own channel definition."""
    content = encoded(image, "JPEG2000")
    start = content.index(b"jp2h") - 4
    end = start + struct.unpack(">I", content[start:start + 4])[0]
    header = content[start + 8:end]
    if b"cdef" in header:
        header = header[:header.index(b"cdef") - 4]
    if space is not None:
        position = header.index(b"colr") + 7
        header = header[:position] + struct.pack(">I", space) + header[position + 4:]
    header += b"".join(struct.pack(">I", 8 + len(body)) + kind + body for kind, body in boxes)
    return content[:start] + struct.pack(">I", 8 + len(header)) + b"jp2h" + header + content[end:]


def channels(*entries: tuple[int, int, int]) -> tuple[bytes, bytes]:
    return b"cdef", struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHH", *entry) for entry in entries)


RGB_CHANNELS = [(0, 0, 1), (1, 0, 2), (2, 0, 3)]


@pytest.mark.parametrize(("definition", "expected"), [
    ([*RGB_CHANNELS, (3, 1, 0)], [132, 137, 142]), ([*RGB_CHANNELS, (3, 2, 0)], [137, 147, 157]), ([*RGB_CHANNELS, (3, 65535, 65535)], [10, 20, 30]),
    ([(0, 0, 3), (1, 0, 2), (2, 0, 1), (3, 1, 0)], [142, 137, 132]), (None, [132, 137, 142]),
])
def test_jpeg2000_channels_follow_their_definition(definition, expected):
    content = jp2(Image.new("RGBA", (8, 8), (10, 20, 30, 128)), *([channels(*definition)] if definition else []))
    assert np.allclose(colours(content)[0], expected, atol=1)


def test_jpeg2000_alpha_may_come_first():
    content = jp2(Image.new("RGBA", (8, 8), (128, 10, 20, 30)), channels((0, 1, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3)))
    assert np.allclose(colours(content)[0], [132, 137, 142], atol=1)
    content = jp2(Image.new("LA", (8, 8), (128, 10)), channels((0, 1, 0), (1, 0, 1)))
    assert np.allclose(grey(content)[0], 132, atol=1)
    assert "cdef" in rejection_message(jp2(Image.new("RGB", (8, 8)), channels((0, 0, 1), (1, 1, 0), (2, 65535, 0))))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_jpeg2000_values_are_scaled_by_depth(mode, depth):
    # Pillow writes 8 bits only. With another depth in the header, a uniform colour decodes to the middle of that depth plus the same offset.
    content = bytearray(jp2(Image.new(mode, (8, 8), 127 if mode == "L" else (127, 127, 127))))
    sizes = content.index(b"\xff\x4f\xff\x51") + 4 + 38
    for component in range(len(mode)):
        content[sizes + 3 * component] = depth - 1
    middle = 2**(depth - 1) - 1
    assert colours(bytes(content))[0] == [middle * 255 // (2**depth - 1)] * 3


def test_jpeg2000_files_that_pillow_misreads_are_rejected():
    content = bytearray(jp2(Image.new("RGB", (8, 8))))
    content[content.index(b"\xff\x4f\xff\x51") + 4 + 38] = 11
    assert "more than 8 bits" in rejection_message(bytes(content))
    assert "EnumCS 14" in rejection_message(jp2(Image.new("RGB", (8, 8)), space=14))
    palette = (b"pclr", struct.pack(">HB", 2, 3) + bytes([7, 7, 7, 0, 0, 0, 255, 0, 0]))
    columns = [(b"cmap", b"".join(struct.pack(">HBB", 0, 1, column) for column in order)) for order in ((0, 1, 2), (2, 1, 0))]
    assert colours(jp2(Image.new("L", (8, 8), 1), palette, columns[0], space=16))[0] == [255, 0, 0]
    assert "palette" in rejection_message(jp2(Image.new("L", (8, 8), 1), palette, columns[1], space=16))
    assert rejection_message(jp2(Image.new("L", (8, 8), 1), palette, columns[0], space=17)), "Pillow leaves out the palette, or cannot decode it"


# --- colour profiles ---------------------------------------------------------------------------------------------------------


def test_colour_profiles_do_not_change_values():
    row, gamma = bytes([10, 20, 30, 40, 50, 60]), (b"gAMA", struct.pack(">I", 100_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colours(png_row(8, 2, row, gamma)) == colours(png_row(8, 2, row)) == [[10, 20, 30], [40, 50, 60]]
