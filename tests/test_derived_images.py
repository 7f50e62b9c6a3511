"""Images that are computed from others (low resolution, edges, grey), in transforms, in training batches and in stored views."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.data.augmentation import augment
from stage1_tokenizer.data.image_batches import TrainingImages, ValidationImages
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.derived_images import area_mean, check_derived_kind, derived_image, grey, sobel_edges
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.image_files.views import View, flip_and_shift, named_views
from tests.tiny import tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.seeding import generator

LOW, EDGES, GREY = {"kind": "low_resolution", "factor": 4}, {"kind": "edges", "method": "sobel"}, {"kind": "grey"}
CANNY = {"kind": "edges", "method": "canny"}
needs_canny = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs scikit-image")
KINDS = [LOW, EDGES, GREY, pytest.param(CANNY, marks=needs_canny)]


def photo(channels: int = 3, height: int = 16, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_low_resolution_is_the_area_mean():
    pixels = photo()
    low = derived_image(pixels, LOW)
    assert low.shape == (4, 6, 3) and low.dtype == np.uint8
    for row, column in ((0, 0), (3, 5), (2, 1)):
        block = pixels[4 * row:4 * row + 4, 4 * column:4 * column + 4].reshape(-1, 3).astype(float)
        assert np.abs(block.mean(axis=0) - low[row, column]).max() <= 0.5
    assert np.array_equal(area_mean(pixels.astype(float), 1), pixels)


def test_grey_is_pillows_luma():
    pixels = photo()
    expected = np.array(Image.fromarray(pixels).convert("L")).astype(int)
    assert np.abs(derived_image(pixels, GREY)[:, :, 0].astype(int) - expected).max() <= 1
    assert np.array_equal(derived_image(photo(1), GREY), photo(1))
    with_alpha = np.concatenate([pixels, photo(1, seed=3)], axis=2)
    assert np.array_equal(derived_image(with_alpha, GREY), derived_image(pixels, GREY)), "alpha is ignored"
    assert grey(photo(2).astype(float)).shape == (16, 24)


def test_edges_are_black_without_a_gradient_and_white_at_a_full_step():
    assert not derived_image(np.full((8, 8, 3), 77, np.uint8), EDGES).any()
    step = np.zeros((8, 8))
    step[:, 4:] = 1
    edges = sobel_edges(step)
    assert np.allclose(edges[:, 3:5], 1) and not edges[:, [0, 1, 2, 5, 6, 7]].any()
    assert np.allclose(sobel_edges(step.T), edges.T)
    assert np.allclose(sobel_edges(step * 0.5), edges * 0.5), "proportional to the contrast"


@pytest.mark.parametrize("derived", KINDS, ids=lambda derived: derived["kind"])
def test_float_images_give_the_same_result_as_8_bits(derived):
    pixels = photo()
    as_floats = (pixels / 127.5 - 1).astype(np.float32)
    result = derived_image(as_floats, derived)
    assert result.dtype == np.float32 and result.min() >= -1 and result.max() <= 1
    assert np.abs((result + 1) * 127.5 - derived_image(pixels, derived)).max() <= 0.51


@pytest.mark.parametrize("derived", KINDS, ids=lambda derived: derived["kind"])
def test_flipping_commutes_with_derivation(derived):
    view = View(flip=True)
    flipped = [derived_image(flip_and_shift(photo(), view), derived), flip_and_shift(derived_image(photo(), derived), view)]
    difference = np.abs(flipped[0].astype(int) - flipped[1]).max()
    assert difference <= (1 if derived == EDGES else 0), "edges are sums of fractions, which round differently in another order"


def test_canny_needs_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"data\.conditions\[0\]\.method is 'canny', which needs the package scikit-image"):
        check_derived_kind("data.conditions[0]", CANNY)
    check_derived_kind("data.conditions[0]", EDGES)


@needs_canny
def test_canny_marks_edges():
    check_derived_kind("data.conditions[0]", CANNY)
    step = np.zeros((16, 16, 1), np.uint8)
    step[:, 8:] = 255
    edges = derived_image(step, CANNY)
    assert {*np.unique(edges)} == {0, 255} and 7 <= np.flatnonzero(edges.any(axis=(0, 2))).mean() <= 9
    assert not derived_image(np.full((16, 16, 3), 77, np.uint8), CANNY).any()


# --- transforms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("derived", KINDS, ids=lambda derived: derived["kind"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value_range", [None, [0, 200]])
def test_transform_of_a_recipe(derived, channels, value_range):
    data = DataConfig(path="photos", image_size=[16, 32], channels=channels, value_range=value_range, derived=derived)
    transform = ImageTransform.from_recipe(data)
    assert transform.base == ImageTransform.from_recipe(dataclasses.replace(data, derived=None))
    is_low = derived["kind"] == "low_resolution"
    assert transform.sides == ((4, 8) if is_low else (16, 32)) and transform.channels == (channels if is_low else 1)
    assert ImageTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    assert transform.to_dict() == data.transform_config
    image, view = Image.fromarray(photo(3, 40, 60)), View(crop_scale=0.8, x=0.2, flip=True, shift_x=2)
    expected = derived_image(transform.base.resize(image, view), derived)
    assert np.array_equal(transform.resize(image, view), expected) and transform(image, view).shape == transform.shape
    views = [view, View(), View(shift_y=-1)]
    assert np.array_equal(transform.resize_views(image, views), np.stack([transform.resize(image, each) for each in views]))


def test_transform_without_derivation_keeps_an_image_of_the_result():
    transform = ImageTransform(8, 1, derived={"kind": "edges", "method": "sobel", "channels": 3})
    drawing = photo(1, 8, 8)
    plain = transform.without_derivation
    assert plain.derived is None and np.array_equal(plain.resize(Image.fromarray(drawing[:, :, 0])), drawing)
    assert "derived" not in plain.to_dict() and plain.base is plain


@pytest.mark.parametrize("derived", [{"kind": "edgy"}, {"kind": "paired_folder", "path": "x"}, 3, {"kind": "low_resolution"}])
def test_transforms_with_other_derivations_are_refused(derived):
    with pytest.raises(InputError, match="derived"):
        ImageTransform.from_dict({"image_size": 8, "channels": 1, "resampling": "bicubic", "derived": derived})


@pytest.mark.parametrize("derived", [{"kind": "low_resolution", "factor": 2}, EDGES], ids=lambda derived: derived["kind"])
@pytest.mark.parametrize("shift", [0, 2])
def test_cached_training_images_equal_uncached_ones(derived, shift, tmp_path):
    data = tiny_recipe(tmp_path, data__shift=shift, tokenizer__channel_multipliers="[1,1]", data__derived=json.dumps(derived)).data
    source, transform = open_splits(data).train, ImageTransform.from_recipe(data)
    batches = [next(TrainingImages(source, transform, dataclasses.replace(data, cache_megabytes=megabytes), 5).batches(2, 4)).images_BCHW
               for megabytes in (512, 0)]
    assert batches[0].shape == (4, *transform.shape) and torch.equal(*batches)
    images = TrainingImages(source, transform, data, 5)
    epoch, index = images.sample(2 * 4)
    expected = augment(source.read(index), transform, data, generator("augment", 5, epoch, index))
    assert torch.equal(batches[0][0], torch.from_numpy(expected.astype(np.float32) / np.float32(127.5) - 1).movedim(-1, 0))
    held_out, _ = next(ValidationImages(open_splits(data).validation, transform, 3).batches(3))
    assert held_out.shape == (3, *transform.shape)


def test_derived_views_are_made_after_the_shift():
    """A shift by one pixel of the image is half a pixel of the low resolution, so it is not the shifted low resolution."""
    transform = ImageTransform(8, 1, derived={"kind": "low_resolution", "factor": 2})
    image = Image.fromarray(photo(1, 16, 16)[:, :, 0])
    views = named_views("shifts", 1)
    stored = transform.resize_views(image, views)
    assert len({pixels.tobytes() for pixels in stored}) == len(views)
    assert np.array_equal(stored[0], derived_image(np.asarray(image)[:, :, None], {"kind": "low_resolution", "factor": 2}))
