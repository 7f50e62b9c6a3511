"""data.channels from 1 to 4, and data.value_range: reading at full depth, the transform, unreadable files, and pictures for people."""

import contextlib
import hashlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from pipelines.image_folders.png_files import is_whole_png, png_header
from stage1_tokenizer.adversarial.differentiable_augmentation import augment_images
from stage1_tokenizer.data.folder_source import open_folder
from stage1_tokenizer.image_files.channels import colour_channels, visible_pixels
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage, as_batches, read_image, to_pil, to_tensor, to_uint8
from stage1_tokenizer.image_files.views import CENTER_VIEW, View
from stage1_tokenizer.pictures import save_picture, tile_images, to_picture
from tests.image_bytes import encoded, png
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig

WHOLE_RANGE = (0, 65535)
PNG_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}
"""The colour type of a PNG with this number of channels."""


def random_values(channels: int, dtype: str = "u2", seed: int = 0) -> np.ndarray:
    """Random values (5, 7, channels) of an integer type, over its whole range."""
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max, (5, 7, channels), dtype=dtype, endpoint=True)


def deep_png(values_HWC: np.ndarray) -> bytes:
    """A PNG with 16 bits per value."""
    height, width, channels = values_HWC.shape
    return png(width, height, 16, PNG_COLOURS[channels], b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC))


def tiff(values_HWC: np.ndarray, *, extra: int | None = None, kind: int = 1, photometric: int | None = None, planes: int = 1,
         compressed: bool = False, first: bytes = b"") -> bytes:
    """A TIFF written by hand, in the byte order of the array.

    Args:
        extra: the meaning of the last channel (tag ExtraSamples): 0 unspecified, 1 premultiplied alpha, 2 alpha.
        kind: 1 for unsigned values, 2 for signed, 3 for floats (tag SampleFormat).
        first: the first page, a TIFF with the same byte order and tags. The image becomes its second page.
    """
    order = ">" if values_HWC.dtype.byteorder == ">" else "<"
    height, width, channels = values_HWC.shape
    parts = [values_HWC] if planes == 1 else np.moveaxis(values_HWC, -1, 0)
    pixels = [zlib.compress(part.tobytes()) if compressed else part.tobytes() for part in parts]
    tags = {256: [width], 257: [height], 258: [8 * values_HWC.itemsize] * channels, 259: [8 if compressed else 1],
            262: [(2 if channels > 2 else 1) if photometric is None else photometric], 273: [0] * len(pixels), 277: [channels], 278: [height],
            279: [*map(len, pixels)], 284: [planes], **({} if extra is None else {338: [extra]}), 339: [kind] * channels}
    start = len(first) + 8 + 2 + 12 * len(tags) + 4
    long_values = sum(4 * len(values) for values in tags.values() if len(values) > 1)
    tags[273] = [start + long_values + len(b"".join(pixels[:number])) for number in range(len(pixels))]
    entries, stored = b"", b""
    for tag, values in tags.items():
        content = struct.pack(f"{order}{len(values)}I", *values)
        entries += struct.pack(f"{order}HHI", tag, 4, len(values))
        entries += content if len(values) == 1 else struct.pack(f"{order}I", start + len(stored))
        stored += content if len(values) > 1 else b""
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    next_page = len(header) + len(entries)
    before = first and first[:next_page] + struct.pack(f"{order}I", len(first) + 8) + first[next_page + 4:]
    return before + header + entries + bytes(4) + stored + b"".join(pixels)


def stored_values(image: FloatImage, low: float, high: float) -> np.ndarray:
    """The values (H, W, C) of an image in the units of the file."""
    return (np.stack([np.asarray(band, np.float64) for band in image.bands], axis=-1) + 1) / 2 * (high - low) + low


# --- channels ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(2, "LA"), (4, "RGBA")])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "memory"])
def test_alpha_and_hidden_colours_are_kept(channels, mode, kind):
    pixels = random_values(4, "u1")
    pixels[0, :, 3] = 0
    image = Image.fromarray(pixels) if mode == "RGBA" else Image.merge("LA", [Image.fromarray(pixels[..., channel]) for channel in (0, 3)])
    read = read_image(image if kind == "memory" else encoded(image, kind), channels=channels)
    assert read.mode == mode and np.array_equal(np.asarray(read), np.asarray(image))
    assert read_image(read, channels=channels) is read
    resized = ImageTransform((5, 7), channels).resize(read)
    assert np.array_equal(resized, np.asarray(image)), "colours are not multiplied by alpha"


@pytest.mark.parametrize(("given", "pixel", "expected"), [
    ("L", 50, {2: (50, 255), 4: (50, 50, 50, 255)}),
    ("LA", (50, 7), {2: (50, 7), 4: (50, 50, 50, 7)}),
    ("La", (7, 7), {2: (255, 7), 4: (255, 255, 255, 7)}),
    ("RGB", (255, 0, 0), {2: (76, 255), 4: (255, 0, 0, 255)}),
    ("RGBA", (255, 0, 0, 7), {2: (76, 7), 4: (255, 0, 0, 7)}),
    ("CMYK", (0, 255, 255, 0), {2: (76, 255), 4: (255, 0, 0, 255)}),
    ("1", 255, {2: (255, 255), 4: (255, 255, 255, 255)}),
])
def test_images_with_fewer_or_more_channels(given, pixel, expected):
    for channels, values in expected.items():
        assert read_image(Image.new(given, (3, 2), pixel), channels=channels).getpixel((1, 1)) == values


def test_other_transparency_becomes_alpha():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    for file in (encoded(palette, transparency=0), encoded(palette.convert("RGB"), transparency=(10, 20, 30))):
        read = read_image(file, channels=4)
        assert [read.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30, 0), (200, 100, 50, 255)]
    deep = Image.fromarray(np.array([[257, 514]], np.uint16))
    assert np.asarray(read_image(encoded(deep, transparency=257), channels=2)).tolist() == [[[1, 0], [2, 255]]]


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("kind", ["u1", "<u2", ">u2"])
def test_the_fourth_channel_of_a_tiff_is_kept(kind, planes, monkeypatch):
    """Of unspecified meaning, such as the near infrared of a satellite image. Pillow drops it."""
    values = random_values(4, kind.strip("<>")).astype(kind)
    expected = values if kind == "u1" else values // 256
    for compressed in (False, True):
        opened = Image.open(io.BytesIO(tiff(values, extra=0, compressed=compressed, planes=planes)))
        if kind == "u1":
            read = read_image(opened, channels=4, value_range=(0, 255))
            assert np.abs(stored_values(read, 0, 255) - values).max() < 0.01
        assert np.array_equal(np.asarray(read_image(opened, channels=4)), expected)
        assert np.array_equal(np.asarray(read_image(opened, channels=3)), expected[..., :3]) and opened.mode == "RGB"
        opened.load()
        assert np.array_equal(np.asarray(read_image(opened, channels=4)), np.insert(expected[..., :3], 3, 255, -1)), "it was loaded"
    monkeypatch.setattr(TiffImagePlugin, "READ_LIBTIFF", False)
    with pytest.raises(UnreadableImage, match=r"separate plane|Pillow does not read") if planes == 2 else contextlib.nullcontext():
        assert np.array_equal(np.asarray(read_image(tiff(values, extra=0, planes=planes), channels=4)), expected)


def test_pictures_for_people_are_grey_or_rgb(tmp_path):
    images = torch.rand(3, 4, 8, 8) * 2 - 1
    pixels = to_uint8(images)
    on_white = np.stack([np.asarray(read_image(Image.fromarray(each))) for each in pixels])
    assert np.abs(visible_pixels(pixels).astype(int) - on_white).max() <= 1, "alpha is composited as in images that are read with 3 channels"
    assert [np.array_equal(np.asarray(image), shown) for image, shown in zip(to_pil(images), visible_pixels(pixels), strict=True)] == [True] * 3
    assert all(np.array_equal(np.asarray(image), each[..., 0]) for image, each in zip(to_pil(images[:, :2]), pixels, strict=True))
    for channels, mode in ((1, "L"), (2, "L"), (3, "RGB"), (4, "RGB")):
        assert tile_images([pixels[..., :channels], pixels[:2, ..., :channels]]).mode == mode
        save_picture(to_picture(pixels[0, ..., :channels]), tmp_path / f"{channels}.png")
        assert is_whole_png(tmp_path / f"{channels}.png", png_header(8, channels))


def test_networks_for_three_channels_do_not_see_alpha():
    images = torch.arange(4.0).view(1, 4, 1, 1)
    assert [colour_channels(images[:, :channels]).flatten().tolist() for channels in (1, 2, 3, 4)] == [[0], [0], [0, 1, 2], [0, 1, 2]]
    noise = torch.rand(2, 4, 8, 8)
    assert torch.equal(augment_images(noise, ["color"])[:, 3], noise[:, 3])
    assert not torch.equal(augment_images(noise, ["color"])[:, :3], noise[:, :3])


# --- value_range ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_files_of_16_bits_are_read_exactly(channels):
    values = random_values(channels)
    read = read_image(deep_png(values), channels=channels, value_range=WHOLE_RANGE)
    assert np.abs(stored_values(read, *WHOLE_RANGE) - values).max() < 0.01
    if channels == 1:
        in_memory = read_image(Image.fromarray(values[..., 0]), channels=1, value_range=WHOLE_RANGE)
        assert in_memory.tobytes() == read.tobytes()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_tiff_files_are_read_exactly(order, compressed):
    cases = [("u1", 1, 1, None), ("u2", 1, 1, None), ("u2", 1, 3, None), ("u2", 1, 4, 2), ("u2", 1, 4, 0), ("i2", 2, 1, None)]
    for dtype, kind, channels, extra in cases:
        limits, values = np.iinfo(dtype), random_values(channels, dtype)
        file = tiff(values.astype(order + dtype), kind=kind, extra=extra, compressed=compressed)
        read = read_image(file, channels=channels, value_range=(limits.min, limits.max))
        assert np.abs(stored_values(read, limits.min, limits.max) - values).max() < 0.01, (dtype, channels, extra)
    depths = np.random.default_rng(0).normal(size=(5, 7, 1)).astype(np.float32)
    read = read_image(tiff(depths.astype(f"{order}f4"), kind=3, compressed=compressed), channels=1, value_range=(-10, 10))
    assert np.abs(stored_values(read, -10, 10) - depths).max() < 1e-5


def test_the_range_becomes_minus_one_and_one_and_values_outside_are_clipped():
    values = np.array([[-5000, -1000, -300, 400, 3000]], np.int16)[..., None]
    read = read_image(tiff(values, kind=2), channels=1, value_range=(-1000, 400))
    assert np.allclose(np.asarray(read.bands[0]), [[-1, -1, 0, 1, 1]])
    infinite = np.array([[-np.inf, 0, np.inf]], np.float32)[..., None]
    assert np.asarray(read_image(tiff(infinite, kind=3), channels=1, value_range=(-1, 1)).bands[0]).tolist() == [[-1, 0, 1]]


def test_12_bits_are_not_scaled():
    rows = bytes([0x12, 0x3A, 0xBC])  # two values of 12 bits
    file = bytearray(tiff(np.zeros((1, 2, 1), "<u2")))
    entry = 8 + 2 + 12 * 2  # BitsPerSample
    file[entry + 8:entry + 12] = struct.pack("<I", 12)
    file[-4:] = rows + b"\0"
    read = read_image(bytes(file), channels=1, value_range=(0, 4095))
    assert np.allclose(stored_values(read, 0, 4095), [[[0x123], [0xABC]]], atol=1e-3)


@pytest.mark.parametrize(("file", "expected"), [
    (png(1, 1, 4, 0, b"\0\x50"), 5 * 17), (b"P5 1 1 15\n\5", 5 * 17), (b"P5 1 1 4095\n\1\2", 0x102 * 65535 / 4095),
    (b"Pf 1 1 -1.0\n\0\0\x20\x41", 10)])
def test_values_that_are_scaled(file, expected):
    high = 255 if expected < 255 else 65535
    assert stored_values(read_image(file, channels=1, value_range=(0, high)), 0, high).item() == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG", "JPEG2000", "GIF", "BMP", "DIB", "TGA", "WEBP", "AVIF"])
def test_grey_files_of_all_formats(kind):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    read = read_image(encoded(Image.fromarray(values), kind), channels=1, value_range=(0, 255))
    assert np.abs(stored_values(read, 0, 255)[..., 0] - values).max() < (12 if kind in ("JPEG", "WEBP", "AVIF") else 0.01)


@pytest.mark.parametrize("extra", [None, 0])
def test_the_page_that_is_selected_is_read(extra):
    channels = 3 if extra is None else 4
    first, second = (random_values(channels, seed=seed).astype("<u2") for seed in (0, 1))
    opened = Image.open(io.BytesIO(tiff(second, extra=extra, first=tiff(first, extra=extra))))
    for page, values in ((1, second), (0, first)):
        opened.seek(page)
        assert np.abs(stored_values(read_image(opened, channels=channels, value_range=WHOLE_RANGE), *WHOLE_RANGE) - values).max() < 0.01
        assert np.array_equal(np.asarray(read_image(opened, channels=channels)), values // 256)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_reading_takes_little_memory(mode):
    image = Image.new(mode, (1000, 1000))
    tracemalloc.start()
    read_image(image, channels=1, value_range=(0, 255))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 14 * 1000 * 1000, "bytes, of which float32 values take 4 for each pixel, and the bands and their copies at most 6"


def test_images_that_differ_in_their_low_bytes_stay_different():
    values = random_values(3) & 0xFF00
    for file in (deep_png, tiff):
        for channels in (1, 3):
            transform = ImageTransform((5, 7), channels, WHOLE_RANGE)
            first, second = (transform(read_image(file(each), channels=channels, value_range=WHOLE_RANGE)) for each in (values, values + 1))
            assert ((second - first) > 0).all() and torch.allclose(second - first, torch.tensor(2 / 65535), atol=1e-6)
            as_before = [ImageTransform((5, 7), channels)(read_image(file(each), channels=channels)) for each in (values, values + 1)]
            assert torch.equal(*as_before)


def test_resizing_keeps_the_depth_and_follows_the_8_bit_transform():
    pixels = np.random.default_rng(3).integers(80, 176, (40, 60), dtype=np.uint8)  # neither transform clips
    views = [CENTER_VIEW, View(crop_scale=0.6, x=0.1, y=0.9, flip=True, shift_x=1)]
    plain, deep = ImageTransform((16, 24), 1), ImageTransform((16, 24), 1, WHOLE_RANGE)
    resized = deep.resize_views(Image.fromarray(pixels.astype(np.uint16) * 257), views)
    assert resized.dtype == np.float32 and resized.shape == (2, 16, 24, 1) and resized.flags["C_CONTIGUOUS"]
    assert np.abs(resized).max() <= 1 and len(np.unique(resized[0])) > 300, "more values than 8 bits have"
    assert np.abs(resized - np.moveaxis(to_tensor(plain.resize_views(Image.fromarray(pixels), views)).numpy(), 1, -1)).max() <= 1.01 / 127.5
    tensor = to_tensor(resized)
    assert tensor.shape == (2, 1, 16, 24) and tensor.is_contiguous() and np.array_equal(tensor.numpy()[:, 0], resized[..., 0])
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.fromarray(pixels.astype(np.uint16) * 257)
    read = read_image(encoded(image, "TIFF", exif=turned), channels=1, value_range=WHOLE_RANGE)
    assert read.size == (40, 60) and np.allclose(stored_values(read, *WHOLE_RANGE)[..., 0], np.rot90(np.asarray(image), -1), atol=0.01)


def test_missing_and_additional_channels():
    grey, colours = random_values(1), random_values(3)
    assert np.allclose(stored_values(read_image(deep_png(grey), channels=4, value_range=(0, 5e4)), 0, 5e4)[..., 3], 5e4), "opaque alpha is high"
    repeated = stored_values(read_image(deep_png(grey), channels=3, value_range=WHOLE_RANGE), *WHOLE_RANGE)
    assert np.allclose(repeated, grey, atol=0.01)
    luma = stored_values(read_image(deep_png(colours), channels=2, value_range=WHOLE_RANGE), *WHOLE_RANGE)
    assert np.allclose(luma[..., 0], colours @ [0.299, 0.587, 0.114], atol=0.01) and np.allclose(luma[..., 1], 65535)
    opaque = np.concatenate([colours, np.full_like(grey, 65535)], axis=-1)
    assert np.allclose(stored_values(read_image(deep_png(opaque), channels=3, value_range=WHOLE_RANGE), *WHOLE_RANGE), colours, atol=0.01)
    assert len(read_image(encoded(Image.new("RGB", (3, 3))), channels=1, value_range=(0, 255)).bands) == 1, "8-bit files have stored values too"


@pytest.mark.parametrize(("file", "channels", "value_range", "reason"), [
    (encoded(Image.new("RGB", (3, 3))), 3, WHOLE_RANGE, "^Pillow reads it with 8 bits per value, at most 255, but data.value_range ends at 65535"),
    (b"P6 1 1 65535\n" + bytes(6), 3, WHOLE_RANGE, "^Pillow reads it with 8 bits"),
    (Image.fromarray(random_values(3, "u1")), 3, WHOLE_RANGE, "^Pillow reads it with 8 bits"),
    (encoded(Image.new("P", (3, 3))), 3, (0, 255), "a palette"),
    (encoded(Image.new("CMYK", (3, 3)), "TIFF"), 4, (0, 255), "CMYK"),
    (encoded(Image.new("L", (3, 3)), transparency=0), 2, (0, 255), "a transparent colour"),
    (deep_png(random_values(4)), 3, WHOLE_RANGE, "transparent pixels.*set data.channels to 4"),
    (deep_png(random_values(2)), 1, WHOLE_RANGE, "transparent pixels.*set data.channels to 2"),
    (tiff(random_values(1).astype("<u2"), photometric=0), 1, WHOLE_RANGE, "inverted scale"),
    (tiff(random_values(4).astype("<u2"), extra=1), 4, WHOLE_RANGE, "premultiplied alpha"),
    (tiff(random_values(3).astype("<u2"), planes=2), 3, WHOLE_RANGE, "separate planes"),
    (tiff(random_values(1, "i1"), kind=2), 1, (-128, 127), "signed"),
    (tiff(np.full((2, 2, 1), 2**31, "<u4")), 1, (0, 2**32), "2\\*\\*31"),
    (tiff(np.full((2, 2, 1), np.nan, "<f4"), kind=3), 1, (0, 1), "NaN"),
    (deep_png(random_values(1))[:-30], 1, WHOLE_RANGE, "truncated"),
])
def test_files_whose_values_are_unknown_are_unreadable(file, channels, value_range, reason):
    with pytest.raises(UnreadableImage, match=reason):
        read_image(file, channels=channels, value_range=value_range)


@pytest.mark.parametrize(("kind", "channels"), [*(("PNG", channels) for channels in (1, 2, 3, 4)), ("TIFF", 1), ("TIFF", 3), ("TIFF", 4)])
def test_an_opened_image_can_be_read_again(kind, channels):
    values = random_values(channels)
    file = deep_png(values) if kind == "PNG" else tiff(values.astype("<u2"))
    opened = Image.open(io.BytesIO(file))
    first, second = (read_image(opened, channels=channels, value_range=WHOLE_RANGE) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert opened.tobytes() == Image.open(io.BytesIO(file)).tobytes(), "its own pixels did not change"


def test_images_read_for_another_transform_are_refused():
    read = read_image(deep_png(random_values(1)), channels=1, value_range=WHOLE_RANGE)
    for transform in (ImageTransform(16, 1), ImageTransform(16, 3, WHOLE_RANGE), ImageTransform(16, 1, (0, 100))):
        with pytest.raises(UnreadableImage, match=r"it was read with 1 channels and data\.value_range"):
            transform(read)
    assert next(as_batches([read, Image.fromarray(np.zeros((4, 4), np.uint16))], ImageTransform(16, 1, WHOLE_RANGE), 2)).shape == (2, 1, 16, 16)
    with pytest.raises(InputError, match="8 bits per value"):
        next(as_batches(Image.new("L", (4, 4)), ImageTransform(16, 1, WHOLE_RANGE), 2))


def test_values_return_to_the_units_of_the_data():
    transform = ImageTransform(16, 1, (-1000, 400))
    assert transform.to_stored_values(torch.tensor([-2.0, -1, 0, 1, 2])).tolist() == [-1000, -1000, -300, 400, 400]
    assert ImageTransform(16).to_stored_values(torch.tensor([-1.0, 1])).tolist() == [0, 255]


def test_a_folder_gives_float_images_and_the_same_identity(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(deep_png(random_values(1, seed=number)))
    source = open_folder(DataConfig(source="folder", path=str(tmp_path), channels=1, value_range=[0, 65535])).train
    assert isinstance(source.read(0), FloatImage)
    assert source.identity == open_folder(DataConfig(source="folder", path=str(tmp_path), channels=1)).train.identity


def test_a_float_image_survives_a_pipe():
    import pickle

    read = read_image(io.BytesIO(deep_png(random_values(2))), channels=2, value_range=WHOLE_RANGE)
    # Worker processes pickle images to send them. This pickle is made here, so loading it is safe.
    assert pickle.loads(pickle.dumps(read)).tobytes() == read.tobytes()


def test_8_bit_images_are_read_and_resized_as_in_version_0_2():
    """The digest was computed by the version before data.value_range, from lossless files."""
    rng, digest = np.random.default_rng(7), hashlib.sha256()
    images = [Image.fromarray(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)), Image.fromarray(rng.integers(0, 256, (40, 52, 4), dtype=np.uint8)),
              Image.fromarray(rng.integers(0, 65536, (33, 21), dtype=np.uint16)), Image.fromarray(rng.random((33, 21), dtype=np.float32))]
    for image in images:
        for channels in (1, 3):
            read = read_image(encoded(image, "TIFF"), channels=channels)
            tensor = ImageTransform(16, channels)(read)
            for content in (read.tobytes(), tensor.numpy().tobytes(), to_uint8(tensor[None]).tobytes(), to_pil(tensor[None])[0].tobytes()):
                digest.update(content)
    assert digest.hexdigest() == "2997de803ec70731147be982b80f50e0532c561492e003ba60299f0b8da96462"
