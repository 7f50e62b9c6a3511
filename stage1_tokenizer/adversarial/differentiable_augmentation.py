"""Differentiable augmentation of discriminator inputs (Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training").

Strengths follow the paper's code. Parameters are drawn independently for each image from torch's global generator on the images' device, which
the trainer reseeds at each step. The order is always color, translation, cutout.

- `augment_images`: augments one batch. Real and fake images concatenated into one batch get independent draws, as the discriminator step and
  the generator step require.
- `augment_pair`: the i-th images of two batches share their draws, so that feature matching compares corresponding positions.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from stage1_tokenizer.image_files.channels import colour_channels

Augmentation = Callable[[torch.Tensor], torch.Tensor]

TRANSLATION_SHARE = 0.125
"""Largest shift as a fraction of the image side."""
CUTOUT_SHARE = 0.5
"""Height and width of the cut-out rectangle as fractions of those of the image."""


def augment_images(images_BCHW: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Augment images (B, C, H, W) differentiably, keeping their dtype. Returns them unchanged if names is empty.

    Args:
        images_BCHW: images in [-1, 1]. Pixels shifted in from outside and cut-out pixels are 0 (middle grey).
        names: any of color, translation, cutout.
    """
    for augmentation in _draw_augmentations(images_BCHW, names):
        images_BCHW = augmentation(images_BCHW)
    return images_BCHW


def augment_pair(first_BCHW: torch.Tensor, second_BCHW: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment two batches (B, C, H, W). The i-th images of both share their draws."""
    assert first_BCHW.shape == second_BCHW.shape
    for augmentation in _draw_augmentations(first_BCHW, names):
        first_BCHW, second_BCHW = augmentation(first_BCHW), augmentation(second_BCHW)
    return first_BCHW, second_BCHW


def _draw_augmentations(images_BCHW: torch.Tensor, names: Sequence[str]) -> list[Augmentation]:
    """The named augmentations with their parameters drawn, for batches of this size."""
    return [draw(images_BCHW) for name, draw in AUGMENTATIONS.items() if name in names]


def _color(images_BCHW: torch.Tensor) -> Augmentation:
    """Brightness +-0.5, saturation x 0..2 around the channel mean, contrast x 0.5..1.5 around the image mean. Alpha does not change."""
    draws = torch.rand(3, len(images_BCHW), 1, 1, 1, device=images_BCHW.device)
    brightness, saturation, contrast = draws[0] - 0.5, draws[1] * 2, draws[2] + 0.5

    def apply(x_BCHW: torch.Tensor) -> torch.Tensor:
        x = colour_channels(x_BCHW).float() + brightness
        if x.shape[1] > 1:  # saturation does not change a grey image
            grey_B1HW = x.mean(1, keepdim=True)
            x = (x - grey_B1HW) * saturation + grey_B1HW
        mean_B111 = x.mean((1, 2, 3), keepdim=True)
        x = ((x - mean_B111) * contrast + mean_B111).to(x_BCHW.dtype)
        return x if x.shape == x_BCHW.shape else torch.cat([x, x_BCHW[:, x.shape[1]:]], 1)

    return apply


def _random_integers(low: int, high: int, images_BCHW: torch.Tensor) -> torch.Tensor:
    """One random integer (B, 1) in [low, high) for each image."""
    return torch.randint(low, high, (len(images_BCHW), 1), device=images_BCHW.device)


def _translation(images_BCHW: torch.Tensor) -> Augmentation:
    """Random shifts by whole pixels, at most an eighth of the side in each direction."""
    height, width = images_BCHW.shape[2:]
    max_shift_y, max_shift_x = (int(side * TRANSLATION_SHARE + 0.5) for side in (height, width))
    rows_BH = _random_integers(0, 2 * max_shift_y + 1, images_BCHW) + torch.arange(height, device=images_BCHW.device)
    columns_BW = _random_integers(0, 2 * max_shift_x + 1, images_BCHW) + torch.arange(width, device=images_BCHW.device)
    batch_B11 = torch.arange(len(images_BCHW), device=images_BCHW.device)[:, None, None]

    def apply(x_BCHW: torch.Tensor) -> torch.Tensor:
        padded_BHWC = F.pad(x_BCHW, (max_shift_x, max_shift_x, max_shift_y, max_shift_y)).permute(0, 2, 3, 1)
        # Each position is read at most once, so the backward has no atomic additions and is deterministic on GPUs.
        return padded_BHWC[batch_B11, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)

    return apply


def _cutout(images_BCHW: torch.Tensor) -> Augmentation:
    """Set a random rectangle of half the height and half the width of the image to 0. It may lie partly outside the image."""
    height, width = images_BCHW.shape[2:]
    inside = []
    for side in (height, width):
        size = int(side * CUTOUT_SHARE + 0.5)
        start_B1 = _random_integers(0, side + (1 - size % 2), images_BCHW) - size // 2
        positions = torch.arange(side, device=images_BCHW.device)
        inside.append((positions >= start_B1) & (positions < start_B1 + size))
    kept_B1HW = ~(inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return lambda x_BCHW: x_BCHW * kept_B1HW.to(x_BCHW.dtype)


AUGMENTATIONS = {"color": _color, "translation": _translation, "cutout": _cutout}
