"""Hugging Face data sets: a name on the hub, or a local parquet or arrow file, or a folder of them.

Rows are read as stored bytes, and images.py decodes them. So the rules for EXIF, alpha and bit depth are the same as for image files.
"""

import hashlib
import json
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from PIL import Image

from stage1_tokenizer.data.content_digest import content_digest, file_digest
from stage1_tokenizer.data.data_location import TABLE_SUFFIXES, VALIDATION_SPLITS, local_path, nearest_sibling
from stage1_tokenizer.data.huggingface_labels import class_indices, find_label_column, hint_of_labels
from stage1_tokenizer.data.image_sources import ImageSplits, changed_copy, hold_out_validation, update_digest
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import UnreadableImage, read_image
from vqmosaic.errors import InputError, check_name, printable
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted

_CONNECT_SECONDS = 5
_FINGERPRINT_ROWS = 256


class HuggingFaceSource:
    """One split of a data set. Each image is named by its row number in the stored split."""

    def __init__(self, split: str, rows: datasets.Dataset, row_numbers: np.ndarray, labels: np.ndarray | None, class_names: list[str] | None,
                 data: DataConfig):
        self.split = split
        self.class_names = class_names
        self._rows = rows.with_format("arrow")  # the stored images, and the columns with captions
        self._row_numbers, self._labels = row_numbers, labels
        path = local_path(data)
        self._folder = path if path.is_dir() else path.parent if path.is_file() else None
        self._name = str(path.resolve()) if path.exists() else data.path
        self._channels, self._value_range, self._max_pixels = data.channels, data.value_range, data.max_pixels
        self._unread: frozenset[int] | None = None  # indices; None: `identity` finds the files whose bytes cannot be read

    @cached_property
    def _image_digests(self) -> list[tuple[int | None, bytes | None, bool]]:
        return list(map_in_threads(self._digest, range(len(self)), bar=f"checking {self.split}"))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See ImageSource. The first call reads a few bytes of every image (content_digest.py)."""
        # The library's own fingerprint depends on paths and times. This digest is the same on every machine.
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        digest.update(self._row_numbers.astype("<i8").tobytes())
        if self._labels is not None:
            digest.update(self._labels[self._row_numbers].astype("<i8").tobytes())
        unread: Iterable[int] | None = self._unread
        if unread is None:  # files whose bytes could not be read; a row without an image is not among them
            unread = [index for index, (_, content, is_file_path) in enumerate(self._image_digests) if content is None and is_file_path]
        contents = [(size, content) for size, content, _ in self._image_digests]
        update_digest(digest, entries=[[]] * len(self), contents=contents, unread=unread)  # empty: row numbers and labels are in the digest already
        return {"kind": "huggingface", "version": 2, "split": self.split, "count": len(self), "sha256": digest.hexdigest(),
                **({"unread": sorted(unread)} if unread else {})}

    @cached_property
    def former_identity(self) -> dict[str, Any]:
        """See ImageSource. Covers the labels of all images, the sizes of all rows, and the bytes of up to _FINGERPRINT_ROWS images."""
        digest = hashlib.sha256(json.dumps([self.class_names, len(self._rows)]).encode())
        digest.update(self._row_numbers.astype("<i8").tobytes())
        if self._labels is not None:
            digest.update(self._labels[self._row_numbers].astype("<i8").tobytes())
        digest.update(_byte_sizes(self._column).astype("<i8").tobytes())
        for position in np.linspace(0, len(self) - 1, min(len(self), _FINGERPRINT_ROWS)).astype(int):
            stored = self._stored(position)
            digest.update(stored if isinstance(stored, bytes) else str(stored).encode())
        return {"kind": "huggingface", "path": self._name, "split": self.split, "count": len(self), "sha256": digest.hexdigest()}

    def with_class_order(self, order: Sequence[int]) -> "HuggingFaceSource":
        assert self.class_names is not None  # only classes can be in another order
        new_labels = np.append(np.argsort(order), -1)  # label -1 (no class) indexes the last entry, so it stays -1
        return changed_copy(self, class_names=[self.class_names[old] for old in order],
                            _labels=None if self._labels is None else new_labels[self._labels])

    def with_unread(self, unread: Iterable[int]) -> "HuggingFaceSource":
        return changed_copy(self, _unread=frozenset(unread))

    def __len__(self) -> int:
        return len(self._row_numbers)

    def source_name(self, index: int) -> str:
        return str(self._row_numbers[index])

    def label(self, index: int) -> int | None:
        if self._labels is None:
            return None
        label = int(self._labels[self._row_numbers[index]])
        return label if label >= 0 else None

    def read(self, index: int, before_decoding: Callable[[Image.Image], object] | None = None) -> Image.Image | FloatImage:
        stored = self._stored(index)
        if stored is None:
            raise UnreadableImage("the row has no image")
        file = self._path(stored) if isinstance(stored, str) else stored
        try:
            return read_image(file, channels=self._channels, value_range=self._value_range, max_pixels=self._max_pixels,
                              before_decoding=before_decoding)
        except UnreadableImage as error:
            raise UnreadableImage(f"{str(file)!r}: {error}" if isinstance(file, Path) else str(error)) from error

    def texts(self, column: str | None) -> list[str | None]:
        if column is None:
            raise InputError("captions are read from .txt files only beside image files. Set column of the condition to the text column of this data "
                             "set.")
        stored = self._rows[:].column(column).to_pylist()
        return [None if (text := stored[row]) is None else str(text) for row in self._row_numbers.tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_column", "_bytes")}  # pickling these would copy the images

    @cached_property
    def _column(self) -> pyarrow.ChunkedArray:
        # The table is memory-mapped, so its column takes no memory. Reading a row from it takes a fifth of the time of indexing the Dataset.
        return self._rows[:].column(0)

    @cached_property
    def _bytes(self) -> pyarrow.ChunkedArray:
        # In a column of structs, reading only the field takes a quarter of the time of reading the struct.
        return pyarrow.compute.struct_field(self._column, "bytes") if pyarrow.types.is_struct(self._column.type) else self._column

    def _path(self, stored: str) -> Path:
        """The file that a row names, relative to the folder of the tables, or else to the working directory."""
        path = Path(stored)
        inside = self._folder / path if self._folder is not None else path  # an absolute path stays as it is
        return path if os.path.exists(path) and not os.path.exists(inside) else inside  # unlike Path.exists, raises no error for impossible paths

    def _digest(self, index: int) -> tuple[int | None, bytes | None, bool]:
        """(size in bytes, content_digest, is_file_path) of an image; (None, None, False) if the row has none. Does not copy stored images."""
        stored = self._bytes[int(self._row_numbers[index])]
        if stored.is_valid and not isinstance(stored, pyarrow.StringScalar | pyarrow.LargeStringScalar):
            content = stored.as_buffer()
            return content.size, content_digest(memoryview(content)), False
        path = self._stored(index)
        return (*file_digest(self._path(path)), True) if isinstance(path, str) else (None, None, False)

    def _stored(self, index: int) -> bytes | str | None:
        """The stored bytes of an image, or the path that its row names; None if the row has no image."""
        row = int(self._row_numbers[index])
        if (value := self._bytes[row].as_py()) is not None:
            return value
        record = self._column[row].as_py()
        return record["path"] if isinstance(record, dict) else None


def open_huggingface(data: DataConfig) -> ImageSplits:
    """The images of a Hugging Face data set. Raises InputError for missing splits or columns, and if the hub cannot be reached."""
    splits = _load(data)
    check_name(f"data.train_split (for data.path {data.path!r})", data.train_split, splits)
    validation_split = data.validation_split
    if validation_split is None:
        validation_split = next((name for name in VALIDATION_SPLITS if name in splits and name != data.train_split), None)
    else:
        check_name(f"data.validation_split (for data.path {data.path!r})", validation_split, splits)
        if validation_split == data.train_split:
            raise InputError(f"data.train_split and data.validation_split are both {validation_split!r}; give two different splits of "
                             f"{', '.join(splits)}, or remove data.validation_split to hold out a validation split by a hash.")
    train = splits[data.train_split]
    image_column = _image_column(train, data)
    label_column = find_label_column(train, data)
    class_names, to_index, order = class_indices(train, label_column)
    notes = (hint,) if class_names is None and data.use_labels and (hint := hint_of_labels(train, image_column)) else ()

    text_columns = [*dict.fromkeys(condition.column for condition in data.given_conditions if condition.column is not None)]

    def undecoded_images(rows: datasets.Dataset) -> datasets.Dataset:
        for column in text_columns:
            check_name(f"data.conditions: column (for data.path {data.path!r})", column, rows.column_names)
            if not isinstance(rows.features[column], datasets.Value) or "string" not in rows.features[column].dtype:
                raise InputError(f"data.conditions: column {column!r} holds {rows.features[column]}, not text. Give another column.")
        rows = rows.select_columns([image_column, *text_columns])
        if isinstance(rows.features[image_column], datasets.Image):
            return rows.cast_column(image_column, datasets.Image(decode=False))
        return rows

    train_labels = to_index(train)
    if validation_split is None:
        kept, held_out, origin = hold_out_validation(range(len(train)), None if train_labels is None else train_labels.tolist(), data)
        stored = undecoded_images(train)
        return ImageSplits(HuggingFaceSource(data.train_split, stored, kept, train_labels, class_names, data),
                           HuggingFaceSource("validation", stored, held_out, train_labels, class_names, data), origin, notes, order)
    validation = splits[validation_split]
    check_name(f"data.image_column (in split {validation_split!r} of data.path {data.path!r})", image_column, validation.column_names)
    for split, rows in ((data.train_split, train), (validation_split, validation)):
        if not len(rows):
            raise InputError(f"split {split!r} of data.path {data.path!r} is empty.")
    validation_labels = to_index(validation)
    if class_names and train_labels is not None and validation_labels is not None:
        unknown = sorted(set(validation_labels.tolist()) - set(train_labels.tolist()) - {-1})
        if unknown:
            raise InputError(f"data.path {data.path!r}: class {class_names[unknown[0]]!r} has images in {validation_split!r} but none in "
                             f"{data.train_split!r}, so it cannot be learned.")
    return ImageSplits(
        HuggingFaceSource(data.train_split, undecoded_images(train), np.arange(len(train)), train_labels, class_names, data),
        HuggingFaceSource(validation_split, undecoded_images(validation), np.arange(len(validation)), validation_labels, class_names, data),
        f"validation: {counted(len(validation), 'image')} in the split {validation_split!r}", notes, order)


def _load(data: DataConfig) -> dict[str, datasets.Dataset]:
    """Load the data set and return its splits by name; without splits, all of it is the training split. Raises InputError with the cause."""
    path = local_path(data)
    check_readable(path, *(found for suffix in TABLE_SUFFIXES for found in path.rglob(f"*{suffix}")))
    local = path.exists()
    bars = datasets.utils.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if path.is_file():
            loaded = datasets.load_dataset("arrow" if path.suffix.lower() == ".arrow" else "parquet", data_files=str(path))
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif local:
            loaded = datasets.load_dataset(str(path.resolve()))  # the library would read "." as a name on the hub
        else:
            assert data.path is not None
            loaded = _load_from_hub(data.path)
    except InputError:
        raise
    except Exception as error:  # the library raises errors of many types, its own and those of other libraries
        if local:
            cause: BaseException = error
            while cause.__cause__ is not None:  # the library's own error is vague: "An error occurred while generating the dataset"
                cause = cause.__cause__
            reason = f"{type(cause).__name__}: {cause}"
            if re.search(r"[*?\[\]]", str(path.resolve())):
                reason += ". The library reads * ? [ ] in a path as patterns. Rename the folder, or give the path of a link to it."
            raise InputError(f"data.path {data.path!r} cannot be loaded as a Hugging Face data set: {reason}") from error
        raise InputError(_hub_failure(data, error)) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    loaded = loaded.with_format(None)  # a data set that was saved with another format would return labels as tensors
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {data.train_split: loaded}


def _load_from_hub(name: str) -> datasets.DatasetDict:
    """The data set from the hub, or from the local cache if a test of the connection fails. Without the test, the library would retry for 25 s."""
    import huggingface_hub.constants as hub

    endpoint, before = urlsplit(hub.ENDPOINT), hub.HF_HUB_OFFLINE
    try:
        if not before and not urllib.request.getproxies():  # behind a proxy, a failed direct connection does not mean that the hub is unreachable
            try:
                socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=_CONNECT_SECONDS).close()
            except OSError:
                hub.HF_HUB_OFFLINE = True
        return datasets.load_dataset(name)
    finally:
        hub.HF_HUB_OFFLINE = before


def _hub_failure(data: DataConfig, error: Exception) -> str:
    nearest = nearest_sibling(local_path(data))
    neighbour = f" (nearest: {nearest!r})" if nearest else ""
    return (f"data.path is {data.path!r}, which is not a local folder{neighbour} and cannot be loaded from the Hugging Face hub: "
            f"{type(error).__name__}: {error}. Check the name and the connection (a private data set needs `hf auth login`). Without a "
            "connection, copy the data set to this machine and give --data.path its folder of parquet files.")


def _image_column(rows: datasets.Dataset, data: DataConfig) -> str:
    """The column with the images: data.image_column, else the only column of type Image, else the only column of bytes."""
    given = f"data.image_column (for data.path {data.path!r})"
    if data.image_column:
        check_name(given, data.image_column, rows.column_names)
        feature = rows.features[data.image_column]
        if not _has_image_type(feature) and not (isinstance(feature, datasets.Value) and "string" in feature.dtype):  # strings are image paths
            raise InputError(f"{given} is {data.image_column!r}, which holds {feature}, not images.")
        return data.image_column
    typed = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    found = typed or [name for name, feature in rows.features.items() if _has_image_type(feature)]
    if len(found) != 1:
        raise InputError(f"{given} is not given, and {len(found) or 'no'} columns hold images; give one of: "
                         f"{printable(', '.join(found or rows.column_names))}.")
    return found[0]


def _has_image_type(feature: Any) -> bool:
    # Parquet files that another library wrote have no Image type. They hold the same struct, or plain bytes.
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return isinstance(feature, datasets.Image) or (isinstance(feature, datasets.Value) and "binary" in feature.dtype)


def _byte_sizes(stored: pyarrow.ChunkedArray) -> np.ndarray:
    """The number of bytes of each stored image (int64, -1 for rows without bytes). Reads only the offsets of the column."""
    if pyarrow.types.is_struct(stored.type):
        stored = pyarrow.compute.struct_field(stored, "bytes")
    if pyarrow.types.is_null(stored.type):
        return np.full(len(stored), -1)
    return pyarrow.compute.binary_length(stored).fill_null(-1).to_numpy()
