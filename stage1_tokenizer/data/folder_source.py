"""A folder of images: class sub-folders or none, with or without split sub-folders above them.

    photos/*.jpg                      no labels            photos/cat/*.jpg                  classes by folder
    photos/train/..., photos/val/...  splits, each laid out in one of the two ways
    photos/metadata.csv               classes in the column that data.label_column names; file_name is relative to the file
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from PIL import Image

from stage1_tokenizer.data.class_labels import class_of, sorted_classes, text_order
from stage1_tokenizer.data.content_digest import file_digest
from stage1_tokenizer.data.data_location import VALIDATION_SPLITS, data_files, is_image, local_path, no_images, split_by_name, suffix_counts
from stage1_tokenizer.data.folder_metadata import METADATA_NAMES, FolderMetadata
from stage1_tokenizer.data.image_sources import ImageSplits, changed_copy, combined_digest, cut_validation
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.images import read_image
from vqmosaic.errors import InputError, nearest_name, printable
from vqmosaic.files.permissions import permission_denied
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted, is_or_are

_Classes = list[str | int | bool | None]


class FolderSource:
    """One split of a folder; names are paths relative to data.path."""

    def __init__(self, split: str, names: list[str], labels: list[int | None] | None, class_names: list[str] | None, data: DataConfig):
        self.split = split
        self.class_names = class_names
        self._root = local_path(data)
        self._names = names
        self._labels = labels
        self._channels, self._max_pixels = data.channels, data.max_pixels
        self._unread: frozenset[int] | None = None

    @cached_property
    def _found(self) -> list[tuple[int | None, bytes | None]]:
        return list(map_in_threads(lambda name: file_digest(self._root / name), self._names, bar=f"looking at {self.split}"))

    @cached_property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        unread = self._unread
        if unread is None:
            unread = [index for index, (_, content) in enumerate(self._found) if content is None]
        combined_digest(digest, ([name, self.label(index)] for index, name in enumerate(self._names)), self._found, unread)
        return {"kind": "folder", "version": 2, "split": self.split, "count": len(self), "sha256": digest.hexdigest(),
                **({"unread": sorted(unread)} if unread else {})}

    @cached_property
    def former_identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for index, name in enumerate(self._names):
            path = self._root / name
            size = path.stat().st_size if path.exists() else None
            digest.update(json.dumps([name, self.label(index), size]).encode())
        return {"kind": "folder", "path": str(self._root.resolve()), "split": self.split, "count": len(self), "sha256": digest.hexdigest()}

    def with_class_order(self, order: Sequence[int]) -> "FolderSource":
        new = {None: None} | {before: now for now, before in enumerate(order)}
        return changed_copy(self, class_names=[self.class_names[before] for before in order],
                            _labels=self._labels and [new[label] for label in self._labels])

    def with_unread(self, unread: Iterable[int]) -> "FolderSource":
        return changed_copy(self, _unread=frozenset(unread))

    def __len__(self) -> int:
        return len(self._names)

    def source_name(self, index: int) -> str:
        return self._names[index]

    def label(self, index: int) -> int | None:
        return self._labels[index] if self._labels is not None else None

    def read(self, index: int, before_decoding: Callable[[Image.Image], object] | None = None) -> Image.Image:
        return read_image(self._root / self._names[index], channels=self._channels, max_pixels=self._max_pixels, before_decoding=before_decoding)


def open_folder(data: DataConfig) -> ImageSplits:
    """The images of a folder. Raises InputError for a layout that leaves splits or classes in doubt."""
    try:
        files = sorted(data_files(local_path(data)))
    except PermissionError as error:
        raise permission_denied(error.filename) from error
    except OSError as error:
        raise InputError(f"data.path is {data.path!r}, which cannot be listed: {error.strerror} ({error.filename}).") from error
    names = list(filter(is_image, files))
    if not names:
        raise no_images(data)
    folders = sorted({name.split("/", 1)[0] for name in names if "/" in name})
    train_split, validation_split = _split_folders(folders, data)

    train_names = _inside(names, train_split)
    metadata = _metadata(train_split, validation_split, data)
    train_classes = _classes(train_names, train_split, data, metadata)
    class_values = sorted_classes(train_classes) if train_classes else None
    notes = [] if metadata or not (data.use_labels and data.label_column) else [
        f"data.label_column {data.label_column!r} is not used: there is no {' or '.join(METADATA_NAMES)} beside the images"]
    notes += [*_left_out(files), *_unused(names, train_split, validation_split), *_without_image(names, metadata),
              *_doubts(train_names, train_split, class_values, data)]
    if validation_split is None:
        train, validation, how = cut_validation(train_names, train_classes, data)
        validation_names = [train_names[index] for index in validation]
        validation_classes = [train_classes[index] for index in validation] if train_classes else None
        train_names = [train_names[index] for index in train]
        train_classes = [train_classes[index] for index in train] if train_classes else None
        splits = ("train", "validation")
    else:
        validation_names = _inside(names, validation_split)
        validation_classes = _classes(validation_names, validation_split, data, metadata) if train_classes else None
        how = f"validation: the {counted(len(validation_names), 'image')} of the sub-folder {validation_split!r}"
        splits = (train_split or "train", validation_split)
    class_names = [class_name(value) for value in class_values] if class_values else None
    unknown = sorted_classes(set(validation_classes or ()) - set(class_values or ()))
    if unknown:
        raise InputError(f"data.path {data.path!r}: class {unknown[0]!r} has images in {validation_split!r} but none in {train_split!r}; "
                         f"classes to train on: {printable(', '.join(class_names))}.")
    index_of = {None: None} | {value: index for index, value in enumerate(class_values or ())}

    def source(split: str, names: list[str], classes: _Classes | None) -> FolderSource:
        return FolderSource(split, names, [index_of[value] for value in classes] if class_names and classes else None, class_names, data)

    return ImageSplits(source(splits[0], train_names, train_classes), source(splits[1], validation_names, validation_classes), how, tuple(notes),
                       text_order(class_values) if class_values else None)


def class_name(value: str | int | bool) -> str:
    """The name of a class, for the value in a table or the name of a folder; bytes that are not UTF-8 are written as escapes."""
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return printable(text)
    return text


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
    train = data.train_split
    if train not in folders:
        train = _train_folder_by_name(folders, where) if train == DataConfig.train_split else None
        if train is None:
            if data.validation_split or data.train_split != DataConfig.train_split:
                raise _no_such_split("data.train_split", data.train_split, folders, where)
            return None, None
    if data.validation_split == train:
        raise InputError(f"data.train_split and data.validation_split are both {train!r}; give two different sub-folders of "
                         f"{where}, or leave data.validation_split out to have one cut by a hash.")
    others = [name for name in folders if name != train]
    by_name = [name for split in VALIDATION_SPLITS for name in others if split_by_name(name) == split]
    validation = data.validation_split or next((name for name in VALIDATION_SPLITS if name in others), next(iter(by_name), None))
    if validation is None and others:
        raise InputError(f"{where} has sub-folders with images {_listed(folders)}: {train!r} may be a split or a class. Name "
                         "the sub-folder to validate on with --data.validation_split; or, if all are classes, set --data.train_split .")
    return train, validation


def _train_folder_by_name(folders: list[str], where: str) -> str | None:
    """The sub-folder to train on where none has exactly the usual name: Training, TRAIN or train_set; None where all are classes."""
    split_of = {folder: split_by_name(folder) for folder in folders}
    train = [folder for folder, split in split_of.items() if split == "train"]
    validation = [folder for folder, split in split_of.items() if split in VALIDATION_SPLITS]
    rest = [folder for folder, split in split_of.items() if split is None]
    if len(train) == 1 and (len(folders) == 1 or (validation and not rest)):
        return train[0]
    if (validation and train) or (len(folders) > 1 and not rest):
        raise InputError(f"{where} has sub-folders with images {_listed(folders)}, some of which look like splits. Name those to train and to "
                         "validate on with --data.train_split and --data.validation_split; or, if all are classes, set --data.train_split .")
    return None


def _metadata(train_split: str | None, validation_split: str | None, data: DataConfig) -> FolderMetadata | None:
    """The metadata files, where data.label_column asks for them."""
    if not (data.use_labels and data.label_column):
        return None
    metadata = FolderMetadata(local_path(data), [".", *filter(None, (train_split, validation_split))])
    return metadata if metadata.paths else None


def _left_out(files: list[str]) -> list[str]:
    """What is said of files that are not read as images."""
    others = [name for name in files if not is_image(name) and os.path.basename(name) not in METADATA_NAMES]
    if not others:
        return []
    return [f"{counted(len(others), 'file')} {is_or_are(len(others))} left out, because the name has no suffix of a supported image format: "
            f"{suffix_counts(others)}; such as {printable(others[0])}"]


def _unused(names: list[str], train_split: str | None, validation_split: str | None) -> list[str]:
    """What is said of images that are in neither split."""
    splits = tuple(f"{split}/" for split in (train_split, validation_split) if split is not None)
    unused = [name for name in names if train_split is not None and not name.startswith(splits)]
    if not unused:
        return []
    return [f"{counted(len(unused), 'image')} outside of {' and '.join(split[:-1] for split in splits)} {is_or_are(len(unused))} not used, "
            f"such as {printable(unused[0])}"]


def _without_image(names: list[str], metadata: FolderMetadata | None) -> list[str]:
    """The note on metadata rows that match no image; empty if there are none."""
    missing = metadata.without_image(names) if metadata else []
    if not missing:
        return []
    return [f"{counted(len(missing), 'file')} that {metadata.paths[0].name} names {is_or_are(len(missing))} not among the images, such as "
            f"{printable(missing[0])}"]


def _doubts(names: list[str], split: str | None, class_values: list | None, data: DataConfig) -> list[str]:
    """What is said of classes that may be meant in another way: a single one that holds folders, and columns of metadata."""
    if class_values is None and data.use_labels:
        try:
            hint = FolderMetadata(local_path(data), [".", split] if split else ["."]).hint()
        except InputError:
            return []  # a file of another kind, that nothing was asked of
        return [hint] if hint else []
    if class_values is None or len(class_values) > 1:
        return []
    wrapper = "/".join(filter(None, (split, str(class_values[0]))))
    inner = sorted({name[len(wrapper) + 1:].split("/")[0] for name in names if name.startswith(wrapper + "/") and "/" in name[len(wrapper) + 1:]})
    if not inner:
        return []
    return [f"the only class, {class_values[0]!r}, has the sub-folders {_listed(inner)}; if these are the classes, "
            f"give --data.path {printable(str(local_path(data) / wrapper))}"]


def _listed(folders: list[str], most: int = 10) -> str:
    return printable(", ".join(folders[:most])) + (f" and {len(folders) - most} more" if len(folders) > most else "")


def _classes(names: list[str], split: str | None, data: DataConfig, metadata: FolderMetadata | None) -> _Classes | None:
    """The class of each image, which is the first sub-folder below the split or stands in the metadata; None for images without labels."""
    if not data.use_labels:
        return None
    if metadata is not None:
        values = [class_of(value) for value in metadata.labels(names, data.label_column)]
        return values if any(value is not None for value in values) else None
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
    return InputError(f"{field} is {given!r}; sub-folders of {where} with images: {_listed(folders) or 'none'}.{hint}")
