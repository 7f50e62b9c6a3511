"""Training augmentation: draws a random View of an image, always with the same number of random draws."""

import numpy as np
from PIL import Image

from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.image_files.views import View, flip_and_shift
from vqmosaic.recipes.recipe_sections import DataConfig


def is_augmented(data: DataConfig) -> bool:
    """Whether the recipe turns on any augmentation."""
    return data.crop_scale < 1 or data.flip or data.shift > 0


def random_view(data: DataConfig, rng: np.random.Generator) -> View:
    """A random view within the bounds of the recipe.

    There are always six draws, so turning on one option does not change the draws of the others. With data.crop_scale = 1, the crop is always
    the centre crop, so resized images can be cached.
    """
    scale, x, y, flip, shift_x, shift_y = rng.random(6).tolist()
    crops = data.crop_scale < 1
    return View(crop_scale=1 - scale * (1 - data.crop_scale), x=x if crops else 0.5, y=y if crops else 0.5, flip=data.flip and flip < 0.5,
                shift_x=int(shift_x * (2 * data.shift + 1)) - data.shift, shift_y=int(shift_y * (2 * data.shift + 1)) - data.shift)


def augment(image: Image.Image | FloatImage | np.ndarray, transform: ImageTransform, data: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """A random view of the image (H, W, C), as uint8, or as float32 with data.value_range.

    `image` is an image from a source. With data.crop_scale = 1 it may also be the array from transform.base.resize, which gives the same result.
    """
    view = random_view(data, rng)
    if isinstance(image, np.ndarray):
        assert data.crop_scale == 1, "random crops need the original image, not the resized one"
        return transform.derive(flip_and_shift(image, view))
    return transform.resize(image, view)
