"""Training augmentation: a random View of an image, drawn in a fixed order and applied by the code that applies all views."""

import numpy as np
from PIL import Image

from stage1_tokenizer.image_files.images import ImageTransform, View, flip_and_shift
from vqmosaic.recipes.recipe_sections import DataConfig


def is_augmented(data: DataConfig) -> bool:
    """Whether training sees anything but the identity view."""
    return data.crop_scale < 1 or data.flip or data.shift > 0


def random_view(data: DataConfig, rng: np.random.Generator) -> View:
    """A view drawn within the bounds of the recipe; the same six draws whatever is turned on, so options do not disturb each other.

    With data.crop_scale = 1 the crop stays in the centre: nothing is cropped at random, and resized images can be kept.
    """
    scale, x, y, flip, shift_x, shift_y = rng.random(6).tolist()
    crops = data.crop_scale < 1
    return View(crop_scale=1 - scale * (1 - data.crop_scale), x=x if crops else 0.5, y=y if crops else 0.5, flip=data.flip and flip < 0.5,
                shift_x=int(shift_x * (2 * data.shift + 1)) - data.shift, shift_y=int(shift_y * (2 * data.shift + 1)) - data.shift)


def augment(image: Image.Image | np.ndarray, transform: ImageTransform, data: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """The image as uint8 (H, W, C) through a random view.

    `image` is a PIL image, or, only while data.crop_scale is 1, the uint8 array that transform.resize made of it: both give the same.
    """
    view = random_view(data, rng)
    if isinstance(image, np.ndarray):
        assert data.crop_scale == 1, "a resized image has lost what a random crop would look at"
        return flip_and_shift(image, view)
    return transform.resize(image, view)
