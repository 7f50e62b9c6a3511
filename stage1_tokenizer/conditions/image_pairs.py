"""Paired images: for each image of a folder, the image with the same relative path, without the suffix, in another folder.

    photos/cat/001.jpg     maps/cat/001.png
"""

import copy
import dataclasses
import os
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from PIL import Image

from stage1_tokenizer.conditions.condition_checks import check_pairs_folder
from stage1_tokenizer.data.data_location import image_files
from stage1_tokenizer.data.folder_source import FolderSource
from stage1_tokenizer.data.image_sources import ImageSource, ImageSplits
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from vqmosaic.errors import InputError, printable
from vqmosaic.files.permissions import permission_denied
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted, is_or_are


def name_without_suffix(name: str) -> str:
    """The relative path of an image without its suffix, by which pairs are found.

    Some systems store an accent as a character of its own. Composed and decomposed characters (Unicode NFC and NFD) are the same here.
    """
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


class OtherProportions(UnreadableImage):
    """A paired image has other proportions than its image, so the same crop would not show the same part of both."""


class ImagePairs:
    """The paired images of one split. Images without a pair have none at their index."""

    def __init__(self, source: ImageSource, derivation: Mapping[str, Any], data: DataConfig):
        """`derivation` is that of a condition (ConditionConfig.derivation): path and, if they are given, channels and value_range."""
        path = derivation["path"]
        by_name = find_pairs(path, data)
        self.path, self._images = path, source
        self._names = [by_name.get(name_without_suffix(source.source_name(index))) for index in range(len(source))]
        self._data = dataclasses.replace(data, source="folder", path=path, channels=derivation.get("channels", data.channels),
                                         value_range=derivation.get("value_range"), conditions=[], derived=None)
        self._source = self.as_source(source)
        self._position = {index: position for position, index in enumerate(self.indices)}

    @property
    def indices(self) -> list[int]:
        """The indices of the images that have a pair."""
        return [index for index, name in enumerate(self._names) if name is not None]

    def missing(self, index: int) -> str | None:
        """The reason why the image has no pair, or None if it has one."""
        return None if self._names[index] is not None else "it has no pair"

    def read(self, index: int, image_size: tuple[int, int] | None = None) -> Image.Image | FloatImage:
        """The paired image. Raises UnreadableImage with the reason.

        With the `image_size` (width, height) of its image, raises OtherProportions if they differ by more than the rounding to whole pixels.
        """
        pair = self._source.read(self._position[index])
        if image_size is not None:
            (width, height), (image_width, image_height) = pair.size, image_size
            if abs(width * image_height - height * image_width) >= max(width, height, image_width, image_height):
                raise OtherProportions(f"it has other proportions: {width} x {height} pixels, the image {image_width} x {image_height}")
        return pair

    def check(self, index: int) -> None:
        """Raise UnreadableImage, with the reason, if the paired image cannot be used. Reads both images."""
        self.read(index, self._images.read(index).size)

    def as_source(self, source: ImageSource) -> FolderSource:
        """The paired images as a data set with the classes of the images they belong to, without the images that have no pair."""
        labels = [source.label(index) for index in self.indices] if source.class_names is not None else None
        return FolderSource(source.split, [name for name in self._names if name is not None], labels, source.class_names, self._data)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Identifies the pairs wherever they are stored, as the identity of an image source. Reads some bytes of each.

        `unread` lists the pairs that are missing or lack read permission, if there are any. Their contents are not part of the identity.
        """
        own = self._source.identity
        return {"kind": "pairs", "count": len(self._position), "sha256": own["sha256"], **({"unread": own["unread"]} if "unread" in own else {})}

    def with_unread(self, unread: Iterable[int]) -> "ImagePairs":
        """The same pairs with an identity without the contents of the `unread` pairs, even if they can be read now."""
        changed = copy.copy(self)
        vars(changed).pop("identity", None)  # the cached value
        changed._source = self._source.with_unread(unread)
        return changed


def find_pairs(path: str, data: DataConfig) -> dict[str, str]:
    """Relative path without suffix -> relative path of each image in the folder `path`. Raises InputError if two images have the same one."""
    root = check_pairs_folder(path, data)
    by_name: dict[str, str] = {}
    try:
        for name in sorted(image_files(root)):
            key = name_without_suffix(name)
            if key in by_name:
                raise InputError(f"{path} has {printable(by_name[key])} and {printable(name)}, so the pair of an image with this name is not clear. "
                                 "Remove one of them.")
            by_name[key] = name
    except PermissionError as error:
        raise permission_denied(error.filename) from error
    return by_name


def paired_splits(splits: ImageSplits, data: DataConfig) -> ImageSplits:
    """The paired images of both splits (data.derived of the kind paired_folder), for the training of their tokenizer.

    Raises InputError if a split has no pair.
    """
    assert data.derived is not None
    sources, notes = {}, []
    for split, source in (("train", splits.train), ("validation", splits.validation)):
        pairs = ImagePairs(source, data.derived, data)
        if not pairs.indices:
            raise InputError(f"no image of the {split} split has a pair in {data.derived['path']}. Pairs have the same path relative to data.path, "
                             f"without the suffix; an image is {printable(source.source_name(0))}.")
        lacking = len(source) - len(pairs.indices)
        if lacking:
            notes.append(f"{split}: {counted(lacking, 'image')} {is_or_are(lacking)} not used, because there is no pair")
        sources[split] = pairs.as_source(source)
    return dataclasses.replace(splits, train=sources["train"], validation=sources["validation"], notes=tuple(notes))
