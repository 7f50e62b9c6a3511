"""Images in a colour space other than sRGB are reported. Their pixel values are not converted."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin, features

from stage1_tokenizer.data.check_data import check_data
from stage1_tokenizer.image_files.colour_spaces import other_colour_space
from stage1_tokenizer.image_files.images import read_image
from tests.image_bytes import encoded, png_row
from vqmosaic.recipes.recipe_sections import DataConfig

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
COLOURED = Image.new("RGB", (8, 8), (200, 100, 50))
ROW = bytes([10, 20, 30, 40, 50, 60])
"""Two RGB pixels."""


def linear_profile() -> bytes:
    """The sRGB profile with linear curves."""
    content = bytearray(SRGB)
    for entry in range(struct.unpack_from(">I", content, 128)[0]):
        tag, offset, _ = struct.unpack_from(">4sII", content, 132 + 12 * entry)
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            content[offset:offset + 12] = b"curv" + bytes(8)
    return bytes(content)


def colour_space_of(content: bytes) -> str | None:
    with Image.open(io.BytesIO(content)) as image:
        return other_colour_space(image)


def rgb_png(*chunks: tuple[bytes, bytes]) -> bytes:
    return png_row(8, 2, ROW, *chunks)


NEEDS_AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", pytest.param("AVIF", marks=NEEDS_AVIF)])
def test_profiles_that_change_colours_are_reported(kind):
    assert colour_space_of(encoded(COLOURED, kind)) is colour_space_of(encoded(COLOURED, kind, icc_profile=SRGB)) is None
    assert colour_space_of(encoded(COLOURED, kind, icc_profile=linear_profile())).endswith("(ICC profile)")
    assert colour_space_of(encoded(COLOURED, kind, icc_profile=b"no profile")) is None


def test_srgb_profile_of_a_grey_image_is_not_reported():
    assert colour_space_of(encoded(Image.new("L", (8, 8), 100), icc_profile=SRGB)) is None


@pytest.mark.parametrize(("chunks", "expected"), [
    ([(b"gAMA", struct.pack(">I", 45455))], None), ([(b"gAMA", struct.pack(">I", 100_000))], "gamma 1 (gAMA)"),
    ([(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000))], None),
    ([(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))], None),
    ([(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))], "custom primaries"),
    ([(b"cICP", bytes([1, 13, 0, 1]))], None), ([(b"cICP", bytes([9, 16, 0, 1]))], "BT.2020 PQ (code points)"),
    ([(b"cICP", bytes([12, 13, 0, 1])), (b"sRGB", b"\0")], "Display P3 (code points)"), ([(b"cICP", b"")], None),
])
def test_colour_space_of_png_chunks(chunks, expected):
    content = rgb_png(*chunks)
    assert colour_space_of(content) == expected
    assert np.asarray(read_image(content)).tobytes() == ROW, "the pixel values are not converted"


def test_colour_space_of_tiff_tags():
    def with_tags(**tags) -> bytes:
        directory = TiffImagePlugin.ImageFileDirectory_v2()
        for name, value in tags.items():
            directory[{"curve": 301, "white": 318, "primaries": 319}[name]] = value
        return encoded(COLOURED, "TIFF", tiffinfo=directory)

    assert colour_space_of(with_tags(curve=tuple(257 * value for value in range(256)))) == "a custom curve (TransferFunction)"
    assert colour_space_of(with_tags(curve=tuple(round(65535 * (value / 255) ** 2.2) for value in range(256)))) is None
    assert colour_space_of(with_tags(white=(0.3127, 0.329), primaries=(0.64, 0.33, 0.3, 0.6, 0.15, 0.06))) is None
    assert colour_space_of(with_tags(white=(0.3127, 0.329), primaries=(0.64, 0.33, 0.21, 0.71, 0.15, 0.06))) == "custom primaries"


@NEEDS_AVIF
def test_colour_space_of_avif_code_points():
    content = encoded(COLOURED, "AVIF")
    position = content.index(b"nclx") + 4
    assert colour_space_of(content[:position] + struct.pack(">HH", 9, 18) + content[position + 4:]) == "BT.2020 HLG (code points)"


def test_adobe_rgb_is_detected_in_exif():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    assert colour_space_of(encoded(COLOURED, "JPEG", exif=exif)) == "Adobe RGB (EXIF)"
    exif.get_ifd(0x8769)[0xA005] = {1: "R98"}
    assert colour_space_of(encoded(COLOURED, "JPEG", exif=exif)) is None


def test_check_data_counts_and_reports_colour_spaces(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(rgb_png((b"gAMA", struct.pack(">I", 100_000 if number else 45455))))
    (tmp_path / "broken.png").write_bytes(rgb_png((b"gAMA", struct.pack(">I", 100_000)))[:60])
    lines = []
    check_data(DataConfig(path=str(tmp_path)), lines.append)
    colours = [line for line in lines if line.startswith("colours")]
    assert colours[0].startswith("colours: 3 images declare a colour space other than sRGB")
    assert colours[1] in {f"colours: 3 in gamma 1 (gAMA), such as {number}.png" for number in (1, 2, 3)}
    (tmp_path / "some").mkdir()
    for number in range(2):
        (tmp_path / "some" / f"{number}.png").write_bytes(rgb_png())
    lines.clear()
    check_data(DataConfig(path=str(tmp_path / "some")), lines.append)
    assert "colours: no image declares a colour space other than sRGB" in lines
