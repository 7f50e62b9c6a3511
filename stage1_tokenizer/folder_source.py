"""A folder of images: class sub-folders or none, with or without split sub-folders above them.

    photos/*.jpg                      no labels            photos/cat/*.jpg                  classes by folder
    photos/train/..., photos/val/...  splits, each laid out in one of the two ways
"""

import hashlib
import json
from functools import cached_property
from typing import Any

from PIL import Image

from stage1_tokenizer.content_digest import file_digest
from stage1_tokenizer.data_location import VALIDATION_SPLITS, image_files, local_path, no_images
from stage1_tokenizer.image_sources import ImageSplits, cut_validation
from stage1_tokenizer.images import read_image
from stage1_tokenizer.threaded_map import map_in_threads
from vqmosaic.errors import InputError, nearest_name
from vqmosaic.recipe_sections import DataConfig


class FolderSource:
    """One split of a folder; names are paths relative to data.path."""

    def __init__(self, split: str, names: list[str], labels: list[int] | None, class_names: list[str] | None, data: DataConfig):
        self.split = split
        self.class_names = class_names
        self._root = local_path(data)
        self._names = names
        self._labels = labels
        self._channels, self._max_pixels = data.channels, data.max_pixels

    @cached_property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        found = map_in_threads(lambda name: file_digest(self._root / name), self._names, bar=f"looking at {self.split}")
        for index, (size, content) in enumerate(found):
            digest.update(json.dumps([self._names[index], self.label(index), size, content and content.hex()]).encode())
        return {"kind": "folder", "version": 2, "split": self.split, "count": len(self), "sha256": digest.hexdigest()}

    @cached_property
    def former_identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for index, name in enumerate(self._names):
            path = self._root / name
            size = path.stat().st_size if path.exists() else None
            digest.update(json.dumps([name, self.label(index), size]).encode())
        return {"kind": "folder", "path": str(self._root.resolve()), "split": self.split, "count": len(self), "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._names)

    def source_name(self, index: int) -> str:
        return self._names[index]

    def label(self, index: int) -> int | None:
        return self._labels[index] if self._labels is not None else None

    def read(self, index: int) -> Image.Image:
        return read_image(self._root / self._names[index], channels=self._channels, max_pixels=self._max_pixels)


def open_folder(data: DataConfig) -> ImageSplits:
    """The images of a folder. Raises InputError for a layout that leaves splits or classes in doubt."""
    try:
        names = sorted(image_files(local_path(data)))
    except OSError as error:
        raise InputError(f"data.path is {data.path!r}, which cannot be listed: {error.strerror} ({error.filename}).") from error
    if not names:
        raise no_images(data)
    folders = sorted({name.split("/", 1)[0] for name in names if "/" in name})
    train_split, validation_split = _split_folders(folders, data)

    train_names = _inside(names, train_split)
    train_classes = _classes(train_names, train_split, data)
    class_names = sorted(set(train_classes)) if train_classes else None
    if validation_split is None:
        train, validation, how = cut_validation(train_names, train_classes, data)
        validation_names = [train_names[index] for index in validation]
        validation_classes = [train_classes[index] for index in validation] if train_classes else None
        train_names = [train_names[index] for index in train]
        train_classes = [train_classes[index] for index in train] if train_classes else None
        splits = ("train", "validation")
    else:
        validation_names = _inside(names, validation_split)
        validation_classes = _classes(validation_names, validation_split, data) if train_classes else None
        how = f"validation: the {len(validation_names)} images of the sub-folder {validation_split!r}"
        splits = (train_split or "train", validation_split)
    unknown = sorted(set(validation_classes or ()) - set(class_names or ()))
    if unknown:
        raise InputError(f"data.path {data.path!r}: class {unknown[0]!r} has images in {validation_split!r} but none in {train_split!r}; "
                         f"classes to train on: {', '.join(class_names)}.")
    index_of = {name: index for index, name in enumerate(class_names or ())}

    def source(split: str, names: list[str], classes: list[str] | None) -> FolderSource:
        return FolderSource(split, names, [index_of[name] for name in classes] if classes else None, class_names, data)

    return ImageSplits(source(splits[0], train_names, train_classes), source(splits[1], validation_names, validation_classes), how)


def _inside(names: list[str], split: str | None) -> list[str]:
    return [name for name in names if split is None or name.startswith(split + "/")]


def _split_folders(folders: list[str], data: DataConfig) -> tuple[str | None, str | None]:
    """The sub-folders to train and to validate on; None for the whole folder, and for a validation split that must be cut."""
    where = f"data.path {data.path!r}"
    if data.validation_split and data.validation_split not in folders:
        raise _no_such_split("data.validation_split", data.validation_split, folders, where)
    if data.train_split == ".":  # the folder itself
        if data.validation_split:
            raise InputError(f"data.train_split is '.', the whole of {where}, and data.validation_split is {data.validation_split!r}, "
                             "inside it; leave data.validation_split out, and a validation split is cut by a hash.")
        return None, None
    if data.train_split not in folders:
        if data.validation_split or data.train_split != DataConfig.train_split:
            raise _no_such_split("data.train_split", data.train_split, folders, where)
        return None, None
    if data.validation_split == data.train_split:
        raise InputError(f"data.train_split and data.validation_split are both {data.train_split!r}; give two different sub-folders of "
                         f"{where}, or leave data.validation_split out to have one cut by a hash.")
    others = [name for name in folders if name != data.train_split]
    validation = data.validation_split or next((name for name in VALIDATION_SPLITS if name in others), None)
    if validation is None and others:
        raise InputError(f"{where} has sub-folders with images {', '.join(folders)}: {data.train_split!r} may be a split or a class. Name "
                         "the sub-folder to validate on with --data.validation_split; or, if all are classes, set --data.train_split .")
    return data.train_split, validation


def _classes(names: list[str], split: str | None, data: DataConfig) -> list[str] | None:
    """The class of each image, which is the first sub-folder below the split, or None for images without labels."""
    if not data.use_labels:
        return None
    below = len(split) + 1 if split else 0
    parts = [name[below:].split("/", 1) for name in names]
    labelled = sum(len(part) == 2 for part in parts)
    if 0 < labelled < len(parts):
        top = next(part[0] for part in parts if len(part) == 1)
        inner = next(part[0] for part in parts if len(part) == 2)
        where = f"data.path {data.path!r} has images both at the top" + (f" of {split!r}" if split else "")
        raise InputError(f"{where} (such as {top!r}) and in sub-folders (such as {inner!r}), so classes cannot be told; move them, or set "
                         "--data.use_labels false to train without labels.")
    return [part[0] for part in parts] if labelled else None


def _no_such_split(field: str, given: str, folders: list[str], where: str) -> InputError:
    nearest = nearest_name(given, folders)
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    return InputError(f"{field} is {given!r}; sub-folders of {where} with images: {', '.join(folders) or 'none'}.{hint}")
