"""A cache of resized images in memory. Each image is decoded when it is first requested, so a short run decodes only what it uses."""

from collections.abc import Sequence

import numpy as np

from stage1_tokenizer.data.image_sources import ImageSource
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage


def resized_megabytes(count: int, transform: ImageTransform) -> float:
    """Memory in MiB for `count` resized images."""
    return count * transform.image_size ** 2 * transform.channels / 2 ** 20


class ResizedImages:
    """The images of a source after transform.resize, cached at the first request. Unreadable images are cached with their reasons."""

    def __init__(self, source: ImageSource, transform: ImageTransform):
        self._source, self._transform = source, transform
        self._pixels: dict[int, np.ndarray] = {}
        self._reasons: dict[int, str] = {}

    def prepare(self, indices: Sequence[int]) -> None:
        """Decode the images that are not in the cache yet, in several threads."""
        missing = [index for index in dict.fromkeys(indices) if index not in self._pixels and index not in self._reasons]
        for index, decoded in zip(missing, map_in_threads(self._decode, missing), strict=True):
            if isinstance(decoded, str):
                self._reasons[index] = decoded
            else:
                self._pixels[index] = decoded

    def read(self, index: int) -> np.ndarray:
        """The resized image as uint8 (H, W, C). Raises UnreadableImage."""
        self.prepare([index])
        if index in self._reasons:
            raise UnreadableImage(self._reasons[index])
        return self._pixels[index]

    def _decode(self, index: int) -> np.ndarray | str:
        try:
            return self._transform.resize(self._source.read(index))
        except UnreadableImage as error:
            return str(error)  # the error itself would keep the stack frames of its traceback, and their images, alive
