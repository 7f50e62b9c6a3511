"""A folder of images, with or without class sub-folders, and with or without split sub-folders above them.

    photos/*.jpg                      no labels            photos/cat/*.jpg                  classes by folder
    photos/train/..., photos/val/...  splits, each with one of these two layouts
    photos/metadata.csv               classes in the column data.label_column; file_name is relative to this file
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
from stage1_tokenizer.data.data_location import VALIDATION_SPLITS, data_files, is_image, local_path, no_images_error, split_by_name, suffix_counts
from stage1_tokenizer.data.folder_metadata import METADATA_NAMES, FolderMetadata, text_beside, texts_in_metadata
from stage1_tokenizer.data.image_sources import ImageSplits, changed_copy, hold_out_validation, update_digest
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import read_image
from vqmosaic.errors import InputError, did_you_mean, printable
from vqmosaic.files.permissions import permission_denied
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted, is_or_are

_ClassValues = list[str | int | bool | None]


class FolderSource:
    """One split of a folder. Names are paths relative to data.path."""

    def __init__(self, split: str, names: list[str], labels: list[int | None] | None, class_names: list[str] | None, data: DataConfig):
        self.split = split
        self.class_names = class_names
        self._root = local_path(data)
        self._names = names
        self._labels = labels
        self._channels, self._value_range, self._max_pixels = data.channels, data.value_range, data.max_pixels
        self._unread: frozenset[int] | None = None

    @cached_property
    def _file_digests(self) -> list[tuple[int | None, bytes | None]]:
        return list(map_in_threads(lambda name: file_digest(self._root / name), self._names, bar=f"checking {self.split}"))

    @cached_property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        unread: Iterable[int] | None = self._unread
        if unread is None:
            unread = [index for index, (_, content) in enumerate(self._file_digests) if content is None]
        update_digest(digest, ([name, self.label(index)] for index, name in enumerate(self._names)), self._file_digests, unread)
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
        assert self.class_names is not None  # only classes can be in another order
        new_labels = {None: None} | {old: new for new, old in enumerate(order)}
        return changed_copy(self, class_names=[self.class_names[old] for old in order],
                            _labels=self._labels and [new_labels[label] for label in self._labels])

    def with_unread(self, unread: Iterable[int]) -> "FolderSource":
        return changed_copy(self, _unread=frozenset(unread))

    def __len__(self) -> int:
        return len(self._names)

    def source_name(self, index: int) -> str:
        return self._names[index]

    def label(self, index: int) -> int | None:
        return self._labels[index] if self._labels is not None else None

    def texts(self, column: str | None) -> list[str | None]:
        if column is None:
            return list(map_in_threads(lambda name: text_beside(self._root / name), self._names))
        return texts_in_metadata(self._root, self._names, column)

    def read(self, index: int, before_decoding: Callable[[Image.Image], object] | None = None) -> Image.Image | FloatImage:
        return read_image(self._root / self._names[index], channels=self._channels, value_range=self._value_range, max_pixels=self._max_pixels,
                          before_decoding=before_decoding)


def open_folder(data: DataConfig) -> ImageSplits:
    """The images of a folder. Raises InputError if the layout leaves the splits or classes unclear."""
    try:
        files = sorted(data_files(local_path(data)))
    except PermissionError as error:
        raise permission_denied(error.filename) from error
    except OSError as error:
        raise InputError(f"data.path is {data.path!r}, which cannot be listed: {error.strerror} ({error.filename}).") from error
    names = list(filter(is_image, files))
    if not names:
        raise no_images_error(data)
    folders = sorted({name.split("/", 1)[0] for name in names if "/" in name})
    train_split, validation_split = _split_folders(folders, data)

    train_names = _names_in_split(names, train_split)
    metadata = _metadata(train_split, validation_split, data)
    train_classes = _classes(train_names, train_split, data, metadata)
    class_values = sorted_classes(train_classes) if train_classes else None
    notes = [] if metadata or not (data.use_labels and data.label_column) else [
        f"data.label_column {data.label_column!r} is not used: there is no {' or '.join(METADATA_NAMES)} beside the images"]
    notes += [*_note_ignored_files(files, data), *_note_unused_images(names, train_split, validation_split), *_note_missing_images(names, metadata),
              *_note_other_classes(train_names, train_split, class_values, data)]
    if validation_split is None:
        train, validation, origin = hold_out_validation(train_names, train_classes, data)
        validation_names = [train_names[index] for index in validation]
        validation_classes = [train_classes[index] for index in validation] if train_classes else None
        train_names = [train_names[index] for index in train]
        train_classes = [train_classes[index] for index in train] if train_classes else None
        splits = ("train", "validation")
    else:
        validation_names = _names_in_split(names, validation_split)
        validation_classes = _classes(validation_names, validation_split, data, metadata) if train_classes else None
        origin = f"validation: {counted(len(validation_names), 'image')} in the sub-folder {validation_split!r}"
        splits = (train_split or "train", validation_split)
    class_names = [class_name(value) for value in class_values] if class_values else None
    unknown = sorted_classes(set(validation_classes or ()) - set(class_values or ()))
    if unknown:
        assert class_names is not None  # without classes of training images, those of validation images are not read
        raise InputError(f"data.path {data.path!r}: class {unknown[0]!r} has images in {validation_split!r} but none in {train_split!r}; "
                         f"classes of the training split: {printable(', '.join(class_names))}.")
    index_of = {None: None} | {value: index for index, value in enumerate(class_values or ())}

    def source(split: str, names: list[str], classes: _ClassValues | None) -> FolderSource:
        return FolderSource(split, names, [index_of[value] for value in classes] if class_names and classes else None, class_names, data)

    return ImageSplits(source(splits[0], train_names, train_classes), source(splits[1], validation_names, validation_classes), origin, tuple(notes),
                       text_order(class_values) if class_values else None)


def class_name(value: str | int | bool) -> str:
    """The name of a class, given its value in a table or the name of its folder. Bytes that are not UTF-8 become escapes."""
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return printable(text)
    return text


def _names_in_split(names: list[str], split: str | None) -> list[str]:
    return [name for name in names if split is None or name.startswith(split + "/")]


def _split_folders(folders: list[str], data: DataConfig) -> tuple[str | None, str | None]:
    """The sub-folders for training and validation. None for training means the whole folder; None for validation means to hold out a split."""
    where = f"data.path {data.path!r}"
    if data.validation_split and data.validation_split not in folders:
        raise _no_such_split("data.validation_split", data.validation_split, folders, where)
    if data.train_split == ".":  # the folder itself
        if data.validation_split:
            raise InputError(f"data.train_split is '.', the whole of {where}, which contains data.validation_split {data.validation_split!r}; "
                             "remove data.validation_split to hold out a validation split by a hash.")
        return None, None
    train: str | None = data.train_split
    if train not in folders:
        train = _train_folder_by_name(folders, where) if train == DataConfig.train_split else None
        if train is None:
            if data.validation_split or data.train_split != DataConfig.train_split:
                raise _no_such_split("data.train_split", data.train_split, folders, where)
            return None, None
    if data.validation_split == train:
        raise InputError(f"data.train_split and data.validation_split are both {train!r}; give two different sub-folders of "
                         f"{where}, or remove data.validation_split to hold out a validation split by a hash.")
    others = [name for name in folders if name != train]
    by_name = [name for split in VALIDATION_SPLITS for name in others if split_by_name(name) == split]
    validation = data.validation_split or next((name for name in VALIDATION_SPLITS if name in others), next(iter(by_name), None))
    if validation is None and others:
        raise InputError(f"{where} has sub-folders with images {_join_names(folders)}: {train!r} may be a split or a class. Give "
                         "the sub-folder for validation as --data.validation_split; or, if all are classes, set --data.train_split .")
    return train, validation


def _train_folder_by_name(folders: list[str], where: str) -> str | None:
    """The training sub-folder if its name is a variant of the usual one, such as Training, TRAIN or train_set; None if all are classes."""
    split_of = {folder: split_by_name(folder) for folder in folders}
    train = [folder for folder, split in split_of.items() if split == "train"]
    validation = [folder for folder, split in split_of.items() if split in VALIDATION_SPLITS]
    rest = [folder for folder, split in split_of.items() if split is None]
    if len(train) == 1 and (len(folders) == 1 or (validation and not rest)):
        return train[0]
    if (validation and train) or (len(folders) > 1 and not rest):
        raise InputError(f"{where} has sub-folders with images {_join_names(folders)}, some of which look like splits. Give those for training and "
                         "validation as --data.train_split and --data.validation_split; or, if all are classes, set --data.train_split .")
    return None


def _metadata(train_split: str | None, validation_split: str | None, data: DataConfig) -> FolderMetadata | None:
    """The metadata files; None if there are none, or if data.label_column is not given."""
    if not (data.use_labels and data.label_column):
        return None
    metadata = FolderMetadata(local_path(data), [".", *filter(None, (train_split, validation_split))])
    return metadata if metadata.paths else None


def _note_ignored_files(files: list[str], data: DataConfig) -> list[str]:
    """The note about files that are neither read as images nor as captions; empty if there are none."""
    has_texts = any(condition.is_caption and condition.column is None and not condition.templates for condition in data.given_conditions)
    ignored = [name for name in files if not is_image(name) and os.path.basename(name) not in METADATA_NAMES
               and not (has_texts and name.endswith(".txt"))]
    if not ignored:
        return []
    return [f"{counted(len(ignored), 'file')} without the suffix of a supported image format {is_or_are(len(ignored))} ignored: "
            f"{suffix_counts(ignored)}; such as {printable(ignored[0])}"]


def _note_unused_images(names: list[str], train_split: str | None, validation_split: str | None) -> list[str]:
    """The note about images that are in neither split; empty if there are none."""
    splits = tuple(f"{split}/" for split in (train_split, validation_split) if split is not None)
    unused = [name for name in names if train_split is not None and not name.startswith(splits)]
    if not unused:
        return []
    return [f"{counted(len(unused), 'image')} outside of {' and '.join(split[:-1] for split in splits)} {is_or_are(len(unused))} not used, "
            f"such as {printable(unused[0])}"]


def _note_missing_images(names: list[str], metadata: FolderMetadata | None) -> list[str]:
    """The note about metadata rows without a matching image; empty if there are none."""
    missing = metadata.names_without_image(names) if metadata else []
    if metadata is None or not missing:
        return []
    return [f"{counted(len(missing), 'file')} named in {metadata.paths[0].name} {is_or_are(len(missing))} not among the images, such as "
            f"{printable(missing[0])}"]


def _note_other_classes(names: list[str], split: str | None, class_values: list | None, data: DataConfig) -> list[str]:
    """The note about another possible choice of classes: columns of the metadata, or the sub-folders of a single class; empty if there is none."""
    if class_values is None and data.use_labels:
        try:
            hint = FolderMetadata(local_path(data), [".", split] if split else ["."]).label_column_hint()
        except InputError:
            return []  # some other metadata.csv or metadata.jsonl, which no option asks to read
        return [hint] if hint else []
    if class_values is None or len(class_values) > 1:
        return []
    wrapper = "/".join(filter(None, (split, str(class_values[0]))))
    inner = sorted({name[len(wrapper) + 1:].split("/")[0] for name in names if name.startswith(wrapper + "/") and "/" in name[len(wrapper) + 1:]})
    if not inner:
        return []
    return [f"the only class, {class_values[0]!r}, has the sub-folders {_join_names(inner)}; if these are the classes, "
            f"give --data.path {printable(str(local_path(data) / wrapper))}"]


def _join_names(folders: list[str], most: int = 10) -> str:
    return printable(", ".join(folders[:most])) + (f" and {len(folders) - most} more" if len(folders) > most else "")


def _classes(names: list[str], split: str | None, data: DataConfig, metadata: FolderMetadata | None) -> _ClassValues | None:
    """The class of each image: its value in the metadata, or else the first sub-folder below the split; None for images without labels."""
    if not data.use_labels:
        return None
    if metadata is not None:
        assert data.label_column is not None  # the metadata are only read for a column
        values = [class_of(value) for value in metadata.labels(names, data.label_column)]
        return values if any(value is not None for value in values) else None
    prefix_length = len(split) + 1 if split else 0
    parts = [name[prefix_length:].split("/", 1) for name in names]
    labelled = sum(len(part) == 2 for part in parts)
    if 0 < labelled < len(parts):
        top = next(part[0] for part in parts if len(part) == 1)
        inner = next(part[0] for part in parts if len(part) == 2)
        where = f"data.path {data.path!r} has images both at the top" + (f" of {split!r}" if split else "")
        raise InputError(f"{where} (such as {top!r}) and in sub-folders (such as {inner!r}), so the classes are not clear. Move them, or set "
                         "--data.use_labels false to train without labels.")
    return [part[0] for part in parts] if labelled else None


def _no_such_split(field: str, given: str, folders: list[str], where: str) -> InputError:
    return InputError(f"{field} is {given!r}; sub-folders of {where} with images: {_join_names(folders) or 'none'}."
                      f"{did_you_mean(given, folders)}")
