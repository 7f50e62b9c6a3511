"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training").

Strengths are those of the paper's code. Each image gets draws of its own, from torch's global generator on the images' device:
the trainer reseeds it for each step. Augmentations come in the order color, translation, cutout, however they are listed.

- `augment_images`: draws for each image of a batch. Real and fake images concatenated into one batch are augmented by the same rules with
  independent draws, which is what a discriminator's step and a generator's step want.
- `augment_alike`: the i-th images of two batches share their draws. This is for comparing them place by place, as feature matching does.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Augmentation = Callable[[torch.Tensor], torch.Tensor]

TRANSLATION_SHARE = 0.125
"""Largest shift, as a share of the side."""
CUTOUT_SHARE = 0.5
"""Side of the square that is cut out, as a share of the side."""


def augment_images(images_BCHW: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Augmented images (B, C, H, W) of the same dtype, differentiable; the images themselves where no names are given.

    Args:
        images_BCHW: images in [-1, 1]; what moves in from outside and what is cut out is 0, a middle grey.
        names: any of color, translation, cutout.
    """
    for augmentation in _draw(images_BCHW, names):
        images_BCHW = augmentation(images_BCHW)
    return images_BCHW


def augment_alike(first_BCHW: torch.Tensor, second_BCHW: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both batches (B, C, H, W) augmented, the i-th image of the one with the same draws as the i-th of the other."""
    assert first_BCHW.shape == second_BCHW.shape
    for augmentation in _draw(first_BCHW, names):
        first_BCHW, second_BCHW = augmentation(first_BCHW), augmentation(second_BCHW)
    return first_BCHW, second_BCHW


def _draw(images_BCHW: torch.Tensor, names: Sequence[str]) -> list[Augmentation]:
    """The augmentations with their draws made, for batches of this size."""
    return [draw(images_BCHW) for name, draw in AUGMENTATIONS.items() if name in names]


def _color(images_BCHW: torch.Tensor) -> Augmentation:
    """Brightness +-0.5, saturation x 0..2 around the mean of the channels, contrast x 0.5..1.5 around the image's mean."""
    draws = torch.rand(3, len(images_BCHW), 1, 1, 1, device=images_BCHW.device)
    brightness, saturation, contrast = draws[0] - 0.5, draws[1] * 2, draws[2] + 0.5

    def apply(x_BCHW: torch.Tensor) -> torch.Tensor:
        x = x_BCHW.float() + brightness
        if x.shape[1] > 1:  # a grey image is its own mean over the channels
            grey_B1HW = x.mean(1, keepdim=True)
            x = (x - grey_B1HW) * saturation + grey_B1HW
        mean_B111 = x.mean((1, 2, 3), keepdim=True)
        return ((x - mean_B111) * contrast + mean_B111).to(x_BCHW.dtype)

    return apply


def _integers(low_included: int, high_excluded: int, images_BCHW: torch.Tensor) -> torch.Tensor:
    """One integer (B, 1) for each image."""
    return torch.randint(low_included, high_excluded, (len(images_BCHW), 1), device=images_BCHW.device)


def _translation(images_BCHW: torch.Tensor) -> Augmentation:
    """Shifts by whole pixels, at most an eighth of the side up or down and left or right."""
    height, width = images_BCHW.shape[2:]
    most_y, most_x = (int(side * TRANSLATION_SHARE + 0.5) for side in (height, width))
    rows_BH = _integers(0, 2 * most_y + 1, images_BCHW) + torch.arange(height, device=images_BCHW.device)
    columns_BW = _integers(0, 2 * most_x + 1, images_BCHW) + torch.arange(width, device=images_BCHW.device)
    batch_B11 = torch.arange(len(images_BCHW), device=images_BCHW.device)[:, None, None]

    def apply(x_BCHW: torch.Tensor) -> torch.Tensor:
        padded_BHWC = F.pad(x_BCHW, (most_x, most_x, most_y, most_y)).permute(0, 2, 3, 1)
        # Every place is read at most once, so the backward adds no two numbers in an order that a GPU could choose.
        return padded_BHWC[batch_B11, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)

    return apply


def _cutout(images_BCHW: torch.Tensor) -> Augmentation:
    """A square of half the side, anywhere, also partly outside, is set to 0."""
    height, width = images_BCHW.shape[2:]
    inside = []
    for side in (height, width):
        cut = int(side * CUTOUT_SHARE + 0.5)
        start_B1 = _integers(0, side + (1 - cut % 2), images_BCHW) - cut // 2
        place = torch.arange(side, device=images_BCHW.device)
        inside.append((place >= start_B1) & (place < start_B1 + cut))
    kept_B1HW = ~(inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return lambda x_BCHW: x_BCHW * kept_B1HW.to(x_BCHW.dtype)


AUGMENTATIONS = {"color": _color, "translation": _translation, "cutout": _cutout}
