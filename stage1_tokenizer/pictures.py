"""Pictures of many images at once."""

from pathlib import Path

import numpy as np
from PIL import Image

from vqmosaic.files.durable_files import publish, removed_on_failure, temporary_sibling
from vqmosaic.files.full_disks import naming_full_disks

GAP = 2


def image_grid(rows: list[np.ndarray], scale: int = 1) -> Image.Image:
    """One picture of rows of equally large images: each row is uint8 (n, H, W, C), each pixel becomes scale x scale."""
    height, width, channels = rows[0].shape[1:]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            top, left = GAP + y * (height + GAP), GAP + x * (width + GAP)
            canvas[top:top + height, left:left + width] = image
    picture = to_picture(canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def to_picture(pixels_HWC: np.ndarray) -> Image.Image:
    """A PIL image, grey or RGB, of uint8 pixels (H, W, C)."""
    return Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    about = picture.width * picture.height * len(picture.getbands())  # as large as it is without compression
    with naming_full_disks(path.parent, about), removed_on_failure(temporary_sibling(path)) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, format="PNG")
        publish(partial, path)


def viewing_scale(image_size: int, wanted: int = 64) -> int:
    """The whole factor that brings small images to about `wanted` pixels."""
    return max(1, wanted // image_size)
