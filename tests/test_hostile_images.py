"""Files from others: metadata that takes gigabytes, impossible names and links. Images of the caller, which reading must not change."""

import io
import json
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.data import data_location
from stage1_tokenizer.data.check_data import check_data
from stage1_tokenizer.data.data_location import check_data_path, image_files
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import UnreadableImage, read_image
from tests.image_bytes import encoded, exif_bomb, jpeg_segment, png_row
from tests.image_folders import write_classes, write_image
from tests.test_stored_values import bmp, greys, tiff
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig

JPEG = encoded(Image.new("L", (9, 9)), "JPEG")

# --- metadata ----------------------------------------------------------------------------------------------------------------


def big_tiff_bomb(size: int, entries: int) -> bytes:
    """exif_bomb as a BigTIFF."""
    records = b"".join(struct.pack("<HHQQ", tag, 7, size - 16, 16) for tag in range(1000, 1000 + entries))
    return (b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, entries) + records).ljust(size, b"\0")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("content", [
    exif_bomb(1_000_000, 300), big_tiff_bomb(1_000_000, 300), big_tiff_bomb(100_000, 0)[:16] + b"\xff" * 8 + bytes(99_000),
    JPEG[:2] + jpeg_segment(0xE1, b"Exif\0\0" + exif_bomb(60_000, 2500)) + JPEG[2:],
    encoded(Image.new("L", (9, 9)), "PNG", exif=exif_bomb(60_000, 2500)),
], ids=["TIFF", "BigTIFF", "tag count", "JPEG", "PNG"])
def test_tags_that_share_bytes_take_little_memory(content):
    tracemalloc.start()
    try:
        read_image(content)
    except UnreadableImage:
        assert content[:2] == b"II"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3e7, f"{peak / 1e6:.0f} MB"


def test_tags_may_share_values_and_end_after_the_file():
    shared = tiff(2, [8], 1, bytes([3, 9]), more={282: [1, 2, 3], 283: [1, 2, 3]})
    first, second = (shared.index(struct.pack("<HHI", tag, 3, 3)) + 8 for tag in (282, 283))
    shared = shared[:second] + shared[first:first + 4] + shared[second + 4:]
    long_value = tiff(2, [8], 1, bytes([3, 9]), more={60_000: [1, 2, 3]})
    at = long_value.index(struct.pack("<HHI", 60_000, 3, 3))
    long_value = long_value[:at + 4] + struct.pack("<I", 2**31) + long_value[at + 8:]
    for content in (shared, long_value):
        assert np.asarray(read_image(content, channels=1)).tolist() == [[3, 9]]


# --- images of the caller ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    bmp(4, 4, greys(*range(16)), bytes([0x01, 0xEF, 0, 0])), bmp(4, 8, greys(0, 255), bytes([0, 1, 1, 0])),
    png_row(2, 0, bytes([0b01100000]), (b"tRNS", struct.pack(">H", 1))), png_row(16, 2, bytes(range(12)), (b"tRNS", bytes(range(6)))),
    png_row(8, 3, bytes([0, 1, 2]), (b"PLTE", bytes(9)), (b"tRNS", bytes([255, 0, 10])), width=3), png_row(16, 4, bytes(range(8))),
    tiff(2, [8], 3, bytes([0, 255]), more={320: [*range(256)] * 3}), tiff(1, [32], 1, struct.pack(">f", 0.5), 3, order=">", deflate=True),
    tiff(1, [16] * 4, 2, bytes(range(8)), extra=2),
], ids=["4-bit BMP", "8-bit BMP", "2-bit PNG", "RGB PNG", "palette PNG", "LA PNG", "palette TIFF", "float TIFF", "RGBA TIFF"])
def test_reading_an_image_of_the_caller_does_not_change_it(content):
    def state(image: Image.Image) -> tuple:
        return image.mode, image.tile, dict(image.info), image.palette and (image.palette.mode, image.palette.rawmode, bytes(image.palette.palette))

    image = Image.open(io.BytesIO(content))
    before = state(image)
    for channels in (1, 2, 3, 4):
        assert read_image(image, channels=channels).tobytes() == read_image(content, channels=channels).tobytes()
        try:
            expected = read_image(content, channels=channels, value_range=(0, 255)).tobytes()
        except UnreadableImage:
            with pytest.raises(UnreadableImage):
                read_image(image, channels=channels, value_range=(0, 255))
        else:
            assert read_image(image, channels=channels, value_range=(0, 255)).tobytes() == expected
        assert state(image) == before


# --- TIFF and PNG with channels that Pillow misreads -------------------------------------------------------------------------


def planes(bits: list[int], photometric: int, extra: int | None = None, more: dict | None = None) -> bytes:
    """A TIFF of one row of two pixels, with each channel in a separate plane."""
    count = len(bits)
    return tiff(2, bits, photometric, bytes(range(10, 10 + 2 * count)), extra=extra,
                more={284: [2], 273: [8 + 2 * plane for plane in range(count)], 279: [2] * count, **(more or {})})


@pytest.mark.parametrize("content", [planes([8, 8], 1, 2), planes([8, 8], 3, 2, {320: [*range(0, 65536, 256)] * 3})], ids=["grey", "palette"])
def test_alpha_in_a_separate_plane_is_not_read_as_transparent(content):
    loaded = Image.open(io.BytesIO(content))
    loaded.load()
    for channels in (1, 2, 3, 4):
        for source in (content, loaded):
            with pytest.raises(UnreadableImage, match="separate plane"):
                read_image(source, channels=channels)


def test_a_channel_of_unspecified_meaning_after_a_palette_is_alpha():
    content = tiff(2, [8, 8], 3, bytes([200, 255, 100, 0]), extra=0, more={320: [value * 257 for value in range(256)] * 3})
    assert np.asarray(read_image(content, channels=4)).tolist() == [[[200] * 3 + [255], [100] * 3 + [0]]]
    assert np.asarray(read_image(content, channels=2)).tolist() == [[[200, 255], [100, 0]]]
    assert np.asarray(read_image(content, channels=1)).tolist() == [[200, 100]]
    for separate, grey in ((planes([8, 8], 1, 0), [10, 11]), (planes([1, 1], 1, 0), [0, 0]),
                           (tiff(1, [16, 16], 1, bytes([0, 10, 0, 20]), extra=0, more={284: [2], 273: [8, 10], 279: [2, 2]}), [10])):
        assert np.asarray(read_image(separate, channels=1)).tolist() == [grey]
        with pytest.raises(UnreadableImage, match="separate plane"):
            read_image(separate, channels=2)


def test_later_frames_of_an_animated_png_with_16_bits_are_refused():
    def frame(sequence: int, data: bytes) -> list[tuple[bytes, bytes]]:
        return [(b"fcTL", struct.pack(">IIIIIHHBB", sequence, 2, 1, 0, 0, 1, 10, 0, 0)), *([(b"fdAT", data)] if data else [])]

    pixels = bytes(range(12))
    first = png_row(16, 2, pixels, (b"acTL", struct.pack(">II", 2, 0)), (b"tRNS", pixels[:6]), *frame(0, b""))
    chunks = b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                      for kind, body in frame(1, struct.pack(">I", 2) + zlib.compress(b"\0" + pixels[::-1])))
    content = first[:-12] + chunks + first[-12:]
    image = Image.open(io.BytesIO(content))
    assert image.n_frames == 2
    assert read_image(image).tobytes() == read_image(png_row(16, 2, pixels, (b"tRNS", pixels[:6]))).tobytes()
    image.seek(1)
    for arguments in ({}, {"value_range": (0, 65535)}):
        with pytest.raises(UnreadableImage, match=r"later frame of an animated PNG|a transparent colour"):
            read_image(image, **arguments)


# --- names, links and tables -------------------------------------------------------------------------------------------------


def test_folders_with_links_to_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data_location, "MAX_PATHS_TO_FOLDER", 50)
    for number in range(9):
        write_image(tmp_path / str(number) / "image.png")
        for other in range(9):
            if other != number:
                (tmp_path / str(number) / f"to-{other}").symlink_to(tmp_path / str(other))
    started = time.monotonic()
    with pytest.raises(InputError, match=r"on more than 50 paths.*Remove links"):
        open_splits(DataConfig(path=str(tmp_path)))
    assert time.monotonic() - started < 5


def test_a_folder_may_be_linked_several_times(tmp_path):
    write_classes(tmp_path, {"cat": 2})
    for number in range(5):
        (tmp_path / f"copy-{number}").symlink_to(tmp_path / "cat")
    assert len(list(image_files(tmp_path))) == 12


def test_a_home_folder_of_an_unknown_user_is_reported():
    with pytest.raises(InputError, match="~nobody-7f3a/photos"):
        check_data_path(DataConfig(path="~nobody-7f3a/photos"))


def test_deeply_nested_metadata_is_reported(tmp_path):
    write_classes(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat/000.png", "label": 1}\n' + "[" * 100_000)
    with pytest.raises(InputError, match=r"metadata\.jsonl cannot be read \(line 2: too deeply nested\)"):
        open_splits(DataConfig(path=str(tmp_path), label_column="label"))
    assert open_splits(DataConfig(path=str(tmp_path))).class_names == ["cat", "dog"]


def test_impossible_paths_in_tables_are_unreadable_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "tables").mkdir()
    stored = ["x" * 300, "y/" * 3000, "http://127.0.0.1:1/a.png", "\\\\host\\a.png", "file:///etc/hostname", "~/a.png", "", "/dev/zero"]
    datasets.Dataset.from_dict({"image": stored}).to_parquet(tmp_path / "tables" / "train.parquet")
    data = DataConfig(path=str(tmp_path / "tables"), image_column="image")
    assert open_splits(data).fingerprint and len(check_data(data, lambda line: None)) == len(stored)


def test_column_names_cannot_forge_lines(tmp_path):
    datasets = pytest.importorskip("datasets")
    content = encoded(Image.new("L", (9, 9)))
    names = ["a\n26 of 26 images are readable", "b\x1b[2J"]
    datasets.Dataset.from_dict({name: [content] * 2 for name in names}).to_parquet(tmp_path / "train.parquet")
    for fields in ({}, {"image_column": "c"}, {"image_column": names[0], "label_column": "c"}):
        with pytest.raises(InputError) as error:
            open_splits(DataConfig(path=str(tmp_path), **fields))
        assert str(error.value).isprintable() and r"\n26 of 26" in str(error.value)


def test_names_of_metadata_columns_cannot_forge_lines(tmp_path):
    write_classes(tmp_path, {"cat": 2})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"cat/00{number}.png", "a\nb": number}) + "\n" for number in range(2)))
    with pytest.raises(InputError) as error:
        open_splits(DataConfig(path=str(tmp_path), label_column="label"))
    assert str(error.value).isprintable()
