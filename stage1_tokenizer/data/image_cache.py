"""A cache of resized images in memory. Each image is decoded when it is first requested, so a short run decodes only what it uses."""

import math
from collections.abc import Sequence

import numpy as np

from stage1_tokenizer.data.image_sources import ImageSource
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage


def resized_megabytes(count: int, transform: ImageTransform) -> float:
    """Size in MiB of `count` resized images: 1 byte per value, or 4 with value_range."""
    return count * math.prod(transform.shape) * (1 if transform.value_range is None else 4) / 2 ** 20


class ResizedImages:
    """The images of a source, resized by transform.resize and cached at their first request.

    For an unreadable image, the cache keeps the reason, so no file is read twice.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform):
        self._source, self._transform = source, transform
        self._pixels: dict[int, np.ndarray] = {}
        self._unreadable_reasons: dict[int, str] = {}

    def prepare(self, indices: Sequence[int]) -> None:
        """Decode the images that are not in the cache yet, in several threads."""
        unique = dict.fromkeys(indices)
        missing = [index for index in unique if index not in self._pixels and index not in self._unreadable_reasons]
        for index, pixels_or_reason in zip(missing, map_in_threads(self._decode, missing), strict=True):
            if isinstance(pixels_or_reason, str):
                self._unreadable_reasons[index] = pixels_or_reason
            else:
                self._pixels[index] = pixels_or_reason

    def read(self, index: int) -> np.ndarray:
        """The resized image (H, W, C), see ImageTransform.resize. Raises UnreadableImage if it cannot be decoded."""
        self.prepare([index])
        if index in self._unreadable_reasons:
            raise UnreadableImage(self._unreadable_reasons[index])
        return self._pixels[index]

    def _decode(self, index: int) -> np.ndarray | str:
        """The resized image, or the reason why it is unreadable."""
        try:
            return self._transform.resize(self._source.read(index))
        except UnreadableImage as error:
            return str(error)  # not the error: its traceback would keep the images in its stack frames in memory
