"""Tiles images into one picture, with headings and titles if there are any, and writes PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stage1_tokenizer.image_files.channels import visible_pixels
from vqmosaic.errors import printable
from vqmosaic.files.durable_files import publish, removed_on_failure, temporary_sibling
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width

GAP_PIXELS = 2
TEXT_PIXELS = 12
"""Font size of headings and titles."""


def tile_images(rows: list[np.ndarray], scale: int = 1) -> Image.Image:
    """One picture with each row of images below the previous one, on white, with gaps of GAP_PIXELS between the images.

    Args:
        rows: uint8 (n, H, W, C) each. H, W and C are the same in all rows; n may differ. With 2 or 4 channels, the visible ones are shown.
        scale: each pixel of the result, gaps included, becomes scale x scale pixels.
    """
    rows = [visible_pixels(row) for row in rows]
    height, width, channels = rows[0].shape[1:]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + GAP_PIXELS) + GAP_PIXELS, columns * (width + GAP_PIXELS) + GAP_PIXELS, channels), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            top, left = GAP_PIXELS + y * (height + GAP_PIXELS), GAP_PIXELS + x * (width + GAP_PIXELS)
            canvas[top:top + height, left:left + width] = image
    picture = to_picture(canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def titled_picture(rows: Sequence[np.ndarray], headings: Sequence[Sequence[tuple[str, int]]], titles: Sequence[str], scale: int = 1) -> Image.Image:
    """One picture as from `tile_images`, with lines of text above it and a title above each row.

    Args:
        rows: uint8 (n, H, W, C) each, with the same n, H, W and C.
        headings: for each line of text, (text, number of columns that it spans) from left to right.
        titles: one for each row. If all are empty, they take no space.
        scale: as in `tile_images`. Text is not enlarged.
    """
    columns, width = len(rows[0]), (rows[0].shape[2] + GAP_PIXELS) * scale
    parts = [text_line([(text, span * width) for text, span in line]) for line in headings]
    for row, title in zip(rows, titles, strict=True):
        if any(titles):
            parts.append(text_line([(title, columns * width)]))
        parts.append(tile_images([row], scale))
    picture = Image.new(parts[-1].mode, (parts[-1].width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        picture.paste(part.convert(picture.mode), (0, top))
        top += part.height
    return picture


def text_line(texts: Sequence[tuple[str, int]]) -> Image.Image:
    """A line of black text on white: each text in a part of the given width in pixels, side by side. Longer texts are cut."""
    font, left = ImageFont.load_default(TEXT_PIXELS), 0
    line = Image.new("L", (sum(width for _, width in texts), TEXT_PIXELS + 2 * GAP_PIXELS), "white")
    for text, width in texts:
        text = printable(text).encode("latin-1", "replace").decode("latin-1")  # the default font has no other characters
        shortened = (f"{text[:end]}..." for end in range(min(len(text), width), 0, -1))
        fitting = next((each for each in (text, *shortened) if font.getlength(each) <= width - 2 * GAP_PIXELS), "")
        ImageDraw.Draw(line).text((left + GAP_PIXELS, 0), fitting, "black", font)
        left += width
    return line


def to_picture(pixels_HWC: np.ndarray) -> Image.Image:
    """A PIL image, grey or RGB, from uint8 pixels (H, W, C): the first of 2 channels; RGB composited on white if there are 4."""
    pixels_HWC = visible_pixels(pixels_HWC)
    return Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically: a failed write leaves no partial file."""
    uncompressed_bytes = picture.width * picture.height * len(picture.getbands())
    with explain_full_disk(path.parent, uncompressed_bytes), removed_on_failure(temporary_sibling(path)) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, format="PNG")
        publish(partial, path)


def viewing_scale(image_size: ImageSize, target_size: int = 64) -> int:
    """Integer factor that enlarges small images to about `target_size` pixels along their longer side."""
    return max(1, target_size // max(height_and_width(image_size)))
