"""Resized images in memory, each decoded once, when it is first wanted: a short run pays for what it sees."""

from collections.abc import Sequence

import numpy as np

from stage1_tokenizer.data.image_sources import ImageSource
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage


def megabytes(count: int, transform: ImageTransform) -> float:
    """Memory that so many resized images take."""
    return count * transform.image_size ** 2 * transform.channels / 2 ** 20


class ResizedImages:
    """The images of a source as transform.resize gives them, kept from the first look on, and the reasons of unreadable ones."""

    def __init__(self, source: ImageSource, transform: ImageTransform):
        self._source, self._transform = source, transform
        self._pixels: dict[int, np.ndarray] = {}
        self._reasons: dict[int, str] = {}

    def prepare(self, indices: Sequence[int]) -> None:
        """Decode those that are not here yet, several at a time."""
        missing = [index for index in dict.fromkeys(indices) if index not in self._pixels and index not in self._reasons]
        for index, decoded in zip(missing, map_in_threads(self._decode, missing), strict=True):
            if isinstance(decoded, str):
                self._reasons[index] = decoded
            else:
                self._pixels[index] = decoded

    def read(self, index: int) -> np.ndarray:
        """uint8 (H, W, C); raises UnreadableImage."""
        self.prepare([index])
        if index in self._reasons:
            raise UnreadableImage(self._reasons[index])
        return self._pixels[index]

    def _decode(self, index: int) -> np.ndarray | str:
        try:
            return self._transform.resize(self._source.read(index))
        except UnreadableImage as error:
            return str(error)  # the error itself would keep the frames it passed through, and their images, alive
