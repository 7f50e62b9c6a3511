"""Reading images as upright 8-bit pixels, the image transform, views, augmentation, and batches."""

import dataclasses
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from stage1_tokenizer.data.augmentation import augment, random_view
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage, as_batches, read_image, to_pil, to_tensor, to_uint8
from stage1_tokenizer.image_files.views import CENTER_VIEW, View, named_views, training_views
from tests.image_bytes import encoded, png
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig, TokensConfig
from vqmosaic.seeding import generator

UPRIGHT = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
STORED_AS = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


def values_of(image: Image.Image) -> list[int]:
    return np.asarray(image).reshape(-1).tolist()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "memory"])
def test_exif_orientation_is_applied(orientation, kind):
    stored = UPRIGHT.transpose(STORED_AS[orientation]) if STORED_AS[orientation] is not None else UPRIGHT.copy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "memory":
        stored.info["exif"] = exif.tobytes()
        assert ImageOps.exif_transpose(stored).tobytes() == UPRIGHT.tobytes()
        read = read_image(stored)
    else:
        read = read_image(encoded(stored, kind, exif=exif))
    assert read.size == UPRIGHT.size and read.tobytes() == UPRIGHT.tobytes()
    assert read_image(read) is read, "the orientation is applied only once"


def test_alpha_is_composited_on_white():
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (255, 0, 0, 128))
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        read = read_image(encoded(half, kind, **options))
        assert read.mode == "RGB" and read.getpixel((0, 0)) == (255, 255, 255) and read.getpixel((1, 0)) == (255, 127, 127)
    assert read_image(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(Image.new("LA", (1, 1), (0, 255)), channels=1).getpixel((0, 0)) == 0
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    read = read_image(encoded(palette, "PNG", transparency=0))
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]
    read = read_image(encoded(palette, "GIF", transparency=1))
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]
    read = read_image(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", transparency=(9, 8, 7)))
    assert read.getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_values_are_scaled_and_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    expected = [0, 1, 128, 255]
    for kind in ("PNG", "TIFF"):
        assert values_of(read_image(encoded(Image.fromarray(values), kind), channels=1)) == expected
    pgm = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    assert values_of(read_image(pgm, channels=1)) == expected
    assert values_of(read_image(Image.fromarray(values.astype(np.int32)), channels=1)) == expected
    colour = png(1, 1, 16, 2, b"\0" + np.array([65535, 32896, 0], ">u2").tobytes())
    assert read_image(colour).getpixel((0, 0)) == (255, 128, 0)
    transparent = png(2, 1, 16, 0, b"\0" + np.array([257, 514], ">u2").tobytes(), (b"tRNS", struct.pack(">H", 257)))
    assert values_of(read_image(transparent, channels=1)) == [255, 2]


def test_other_modes():
    assert read_image(encoded(Image.new("CMYK", (3, 3), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    red = read_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert red[0] > 240 and max(red[1:]) < 15
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert values_of(read_image(encoded(bits), channels=1)) == [0, 255]
    assert read_image(encoded(Image.new("P", (2, 2)))).mode == "RGB"
    shades = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert values_of(read_image(encoded(shades, "TIFF"), channels=1)) == [0, 128, 255]
    for wide in (np.array([[0.0, 300.0]], np.float32), np.array([[np.nan, 0.0]], np.float32), np.array([[70000, 0]], np.int32)):
        with pytest.raises(UnreadableImage, match="white level"):
            read_image(Image.fromarray(wide))
    assert read_image(noise(4, 4), channels=1).mode == "L"


def test_first_frame_of_animations_is_read():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
        assert read_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TGA", "BMP", "GIF", "JPEG2000", "PPM", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
def test_opened_and_loaded_images_are_read_like_their_files(kind, mode, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)).convert(mode)
    if (kind, mode) in {("JPEG2000", "P"), ("PPM", "P")}:
        pytest.skip("Pillow does not write it")
    image.save(tmp_path / "image", kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = read_image(tmp_path / "image").tobytes()
    with Image.open(tmp_path / "image") as opened:
        assert read_image(opened).tobytes() == expected
    with Image.open(tmp_path / "image") as opened:
        opened.load()
        assert read_image(opened).tobytes() == expected


def test_unreadable_files_are_rejected_with_a_reason(tmp_path):
    jpeg = encoded(noise(64, 64), "JPEG")
    files = {"half.jpg": (jpeg[:len(jpeg) // 2], "truncated"), "text.png": (b"this is no image", "not an image"),
             "empty.png": (b"", "empty"), "header.png": (encoded(noise(9, 9))[:20], "corrupt"),
             "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image")}
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        for given in (tmp_path / name, str(tmp_path / name), content):
            with pytest.raises(UnreadableImage, match=message):
                read_image(given)
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize("size", range(1, 20))
def test_files_of_a_few_bytes_are_rejected(size, tmp_path):
    for content in (b"x" * size, bytes(size), b"\x89PNG\r\n\x1a\n"[:size], b"RIFF\4\0\0\0WEBP"[:size], b"II*\0\x08\0\0\0"[:size]):
        (tmp_path / "a.png").write_bytes(content)
        for file in (content, tmp_path / "a.png"):
            with pytest.raises(UnreadableImage):
                read_image(file)


def test_pixel_limit_is_checked_before_decoding():
    header_only = png(4000, 3000, 8, 2, b"")  # decoding it would raise another error
    with pytest.raises(UnreadableImage, match=r"4000 x 3000 pixels, more than data.max_pixels = 1000"):
        read_image(header_only, max_pixels=1000)
    with pytest.raises(UnreadableImage, match="pixels"):
        read_image(png(60000, 60000, 8, 2, b""))
    with pytest.raises(UnreadableImage, match="more than"):
        read_image(Image.open(io.BytesIO(header_only)), max_pixels=1000)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (1, 60_000), (2, 3), (33, 500), (31, 31), (1000, 900)])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_shape_does_not_depend_on_the_image_shape(size, channels):
    image = noise(*size, "RGB" if channels == 3 else "L")
    transform = ImageTransform(32, channels)
    for view in (CENTER_VIEW, View(crop_scale=0.05, x=0.0, y=1.0), View(crop_scale=0.37, x=1.0, y=0.3, flip=True, shift_x=3)):
        tensor = transform(image, view)
        assert tensor.shape == (channels, 32, 32) and tensor.dtype == torch.float32 and tensor.is_contiguous()
        assert tensor.min() >= -1 and tensor.max() <= 1
        assert torch.equal(tensor, transform(image, view))


def test_transform_keeps_images_of_the_right_size_and_crops_the_centre():
    image = noise(32, 32)
    assert np.array_equal(ImageTransform(32).resize(image), np.asarray(image))
    wide = noise(50, 32)
    assert np.array_equal(ImageTransform(32).resize(wide), np.asarray(wide)[:, 9:41])
    tall = noise(32, 51)
    assert np.array_equal(ImageTransform(32).resize(tall, View(y=1.0)), np.asarray(tall)[19:])
    # antialiasing turns a fine chequerboard into grey
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    assert ImageTransform(32, 1)(board).abs().max() < 0.05


def test_tensor_round_trip_keeps_values():
    pixels_BHWC = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    pixels_BHWC[0, 0, :2, 0] = 0, 255
    images_BCHW = to_tensor(pixels_BHWC)
    assert images_BCHW.shape == (2, 3, 16, 16) and images_BCHW.min() == -1 and images_BCHW.max() == 1
    assert np.array_equal(to_uint8(images_BCHW), pixels_BHWC)
    assert np.array_equal(to_uint8(images_BCHW * 10)[0, 0, :2, 0], [0, 255]), "out-of-range values are clamped, not wrapped"
    assert np.array_equal(np.stack([np.asarray(image) for image in to_pil(images_BCHW)]), pixels_BHWC)
    assert to_pil(images_BCHW[:, :1])[0].mode == "L"
    assert to_uint8(images_BCHW.to(torch.bfloat16)).dtype == np.uint8


def test_views_flip_shift_and_crop():
    image = noise(16, 16)
    transform = ImageTransform(16)
    original = np.asarray(image)
    assert np.array_equal(transform.resize(image, View(flip=True)), original[:, ::-1])
    right = transform.resize(image, View(shift_x=2))
    assert np.array_equal(right[:, 2:], original[:, :-2]) and all(np.array_equal(right[:, x], original[:, 0]) for x in (0, 1))
    up = transform.resize(image, View(shift_y=-1))
    assert np.array_equal(up[:-1], original[1:]) and np.array_equal(up[-1], original[-1])
    both = transform.resize(image, View(flip=True, shift_x=1))
    assert np.array_equal(both[:, 1:], original[:, ::-1][:, :-1])
    corner = transform.resize(noise(32, 32), View(crop_scale=0.5, x=0.0, y=1.0))
    assert np.array_equal(corner, np.asarray(noise(32, 32))[16:, :16])
    assert View(shift_x=1).to_dict() == {"crop_scale": 1.0, "x": 0.5, "y": 0.5, "flip": False, "shift_x": 1, "shift_y": 0}
    assert View(**View(flip=True).to_dict()) == View(flip=True)
    with pytest.raises(InputError, match="crop_scale"):
        View(crop_scale=0)


def test_named_views():
    assert named_views("none", 1) == [CENTER_VIEW]
    assert named_views("flip", 1) == [CENTER_VIEW, View(flip=True)]
    shifts = named_views("shifts", 2)
    assert shifts[0] == CENTER_VIEW and len(set(shifts)) == 9
    assert {(view.shift_x, view.shift_y) for view in shifts} == {(x, y) for x in (-2, 0, 2) for y in (-2, 0, 2)}
    both = named_views("flip+shifts", 1)
    assert both[0] == CENTER_VIEW and len(set(both)) == 18 and sum(view.flip for view in both) == 9
    wide = named_views("wide-shifts", 3)
    assert wide[0] == CENTER_VIEW and len(set(wide)) == 25 and {view.shift_x for view in wide} == {-6, -3, 0, 3, 6}
    assert set(named_views("flip+wide-shifts", 1)) == {*named_views("wide-shifts", 1), *(dataclasses.replace(view, flip=True)
                                                                                        for view in named_views("wide-shifts", 1))}
    with pytest.raises(InputError, match=r"flips.*allowed.*Did you mean"):
        named_views("flips", 1)


def test_ten_crop_has_corners_centre_and_mirror_images():
    image = noise(32, 32)
    pixels = np.asarray(image)
    crops = ImageTransform(16).resize_views(image, named_views("ten-crop", crop_scale=0.5))
    for number, (top, left) in enumerate([(8, 8), (0, 0), (0, 16), (16, 0), (16, 16)]):
        expected = pixels[top:top + 16, left:left + 16]
        assert np.array_equal(crops[number], expected) and np.array_equal(crops[number + 5], expected[:, ::-1])
    wide = ImageTransform(16).resize_views(noise(64, 32), named_views("ten-crop", crop_scale=0.5))
    assert np.array_equal(wide[2], np.asarray(noise(64, 32))[:16, 48:]), "the corners are those of the whole image"
    assert {view.crop_scale for view in training_views(TokensConfig(views="ten-crop"))} == {0.875}


def test_listed_views_match_their_records():
    tokens = TokensConfig(views=[{}, {"crop_scale": 0.5, "position": "bottom-left"}, {"flip": True, "shift": [1, -2]}])
    assert training_views(tokens) == [CENTER_VIEW, View(crop_scale=0.5, x=0.0, y=1.0), View(flip=True, shift_x=1, shift_y=-2)]
    assert training_views(TokensConfig(views="flip+shifts", view_shift=2)) == named_views("flip+shifts", 2)


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (25, 64)])
def test_resize_views_equals_resize_of_each_view(size):
    image, transform = noise(*size), ImageTransform(16)
    views = [*named_views("flip+shifts"), *named_views("ten-crop"), View(crop_scale=0.875, x=1.0, flip=True, shift_y=3)]
    assert np.array_equal(transform.resize_views(image, views), [transform.resize(image, view) for view in views])


def test_augmentation_is_bounded_and_equal_for_cached_images():
    data = DataConfig(source="digits", flip=True, shift=2)
    transform = ImageTransform(32)
    image = noise(40, 60)
    views = [random_view(data, generator("augment", 0, 0, index)) for index in range(200)]
    assert {view.shift_x for view in views} == {view.shift_y for view in views} == {-2, -1, 0, 1, 2}
    assert {view.flip for view in views} == {False, True} and {view.crop_scale for view in views} == {1.0}
    for index in range(5):
        from_file = augment(image, transform, data, generator("augment", 0, 0, index))
        assert np.array_equal(from_file, augment(transform.resize(image), transform, data, generator("augment", 0, 0, index)))
        assert np.array_equal(from_file, transform.resize(image, views[index]))
    cropped = DataConfig(source="digits", crop_scale=0.5)
    views = [random_view(cropped, generator("augment", 0, 0, index)) for index in range(200)]
    assert 0.5 <= min(view.crop_scale for view in views) < 0.55 and max(view.crop_scale for view in views) > 0.95
    assert not any(view.flip or view.shift_x or view.shift_y for view in views)


def test_transform_round_trip_through_a_dict():
    transform = ImageTransform(48, 1)
    assert ImageTransform.from_dict(transform.to_dict()) == transform
    for invalid in ({"image_size": 32}, {**transform.to_dict(), "resampling": "nearest"}, {**transform.to_dict(), "crop": 1}):
        with pytest.raises(InputError, match="allowed"):
            ImageTransform.from_dict(invalid)
    with pytest.raises(InputError, match="channels"):
        ImageTransform(32, 5)


def as_batch(images, transform) -> torch.Tensor:
    return torch.cat(list(as_batches(images, transform, 1)))


def test_as_batches_accepts_images_and_tensors():
    transform = ImageTransform(16)
    image = noise(20, 30, "L")
    one = as_batch(image, transform)
    assert one.shape == (1, 3, 16, 16) and torch.equal(one[0], transform(image))
    assert as_batch([image, Image.new("RGBA", (5, 5))], transform).shape == (2, 3, 16, 16)
    tensor = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    assert as_batch(tensor, transform).dtype == torch.float32
    invalid = {"shape": torch.zeros(3, 16, 16), "shape (1, 3, 8, 8)": torch.zeros(1, 3, 8, 8),
               "uint8": torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "divide by 127.5": torch.full((1, 3, 16, 16), 200.0),
               "nan": torch.full((1, 3, 16, 16), torch.nan), "a list of nothing": [], "ndarray": np.zeros((1, 3, 16, 16)), "str": ["a.png"]}
    for message, images in invalid.items():
        with pytest.raises(InputError) as error:
            as_batch(images, transform)
        assert message in str(error.value) and "allowed" in str(error.value)
    with pytest.raises(InputError, match="image 1 of images cannot be read: truncated"):
        as_batch([image, Image.open(io.BytesIO(encoded(noise(64, 64), "JPEG")[:2000]))], transform)
