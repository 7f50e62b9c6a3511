"""Writes folders of images for tests, and lists what an image source reads from them."""

from pathlib import Path

import numpy as np
from PIL import Image

from stage1_tokenizer.data.image_sources import ImageSource


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (9, 8)) -> None:
    """Write an image of random pixels with this (width, height), and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    """Write a sub-folder of images for each class, and return the folder. Names of the same length get the same images."""
    for name, count in counts.items():
        for number in range(count):
            write_image(folder / name / f"{number:03}.png", seed=len(name) * 1000 + number)
    return folder


def names(source: ImageSource) -> list[str]:
    """The name of each image."""
    return [source.source_name(index) for index in range(len(source))]


def contents(source: ImageSource) -> dict[str, tuple[int | None, bytes]]:
    """Name -> label and pixels of each image."""
    return {source.source_name(index): (source.label(index), source.read(index).tobytes()) for index in range(len(source))}
