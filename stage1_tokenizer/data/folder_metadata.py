"""Reads the text files beside the images of a folder.

metadata.csv and metadata.jsonl have one row per image, with its file_name and optionally its class and its caption. A .txt file with the name of an
image has its caption.
"""

import csv
import json
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from stage1_tokenizer.data.class_labels import label_hint, sorted_classes
from vqmosaic.errors import InputError, check_name, printable
from vqmosaic.files.permissions import permission_denied

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
_FILE_NAME = "file_name"
_WHOLE_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?|nan", re.IGNORECASE)
"""Does not match names such as 007 and 1_0, which int() would read as 7 and 10."""


class FolderMetadata:
    """The rows of the metadata files in some folders of a data set. Names of images are relative to the data set, as in the image sources."""

    def __init__(self, root: Path, folders: list[str]):
        """Read the metadata files that exist. Raises InputError if one of them cannot be read.

        Args:
            root: folder of the data set.
            folders: folders relative to `root` that may have metadata files: "." and the split folders.
        """
        self.paths = [path for folder in folders for name in METADATA_NAMES if (path := root / folder / name).is_file()]
        self._rows: dict[str, dict[str, Any]] = {}
        self._repeated: list[tuple[str, dict[str, Any]]] = []  # (name, row) of further rows with the same image
        for path in self.paths:
            folder = path.parent.relative_to(root)
            for row in _read_rows(path):
                name = _normalize((folder / str(row[_FILE_NAME])).as_posix())
                if name in self._rows:
                    self._repeated.append((name, row))
                else:
                    self._rows[name] = row

    @property
    def columns(self) -> list[str]:
        """Names of the columns other than file_name."""
        return list(dict.fromkeys(name for row in self._rows.values() for name in row if name != _FILE_NAME))

    def labels(self, names: list[str], column: str) -> list[Any]:
        """The value of `column` for each image; None for images without a value.

        Raises InputError if the column does not hold classes, if an image has two classes, or if no row names an image.
        """
        if not self._rows:
            raise InputError(f"data.label_column is {column!r}, but {self.paths[0]} has no rows. Fix or remove this file.")
        check_name(f"data.label_column (for {self.paths[0]})", column, self.columns)
        for name, row in self._repeated:
            if row.get(column) != self._rows[name].get(column):
                raise InputError(f"{self.paths[0]}: {name!r} has several rows, with {column} {self._rows[name].get(column)!r} and "
                                 f"{row.get(column)!r}. An image can have only one class. Fix the file, or choose another data.label_column.")
        if names and not any(_normalize(name) in self._rows for name in names):
            raise InputError(f"data.label_column is {column!r}, but no row of {self.paths[0]} names an image: rows name files such as "
                             f"{next(iter(self._rows))!r}, but the images have names such as {names[0]!r}. Give paths relative to the metadata file.")
        values = [self._rows.get(_normalize(name), {}).get(column) for name in names]
        try:
            sorted_classes(values)
        except (ValueError, TypeError) as error:
            raise InputError(f"data.label_column is {column!r}, which does not hold classes in {self.paths[0]} ({error}); allowed: whole numbers, "
                             "strings, true and false.") from None
        return values

    def texts(self, names: list[str], column: str) -> list[str | None]:
        """The text in `column` for each image; None for images without one. Of several rows of an image, the first counts.

        Raises InputError if there is no such column, or if a row has a list or an object in it.
        """
        check_name(f"data.conditions: column (for {self.paths[0]})", column, self.columns)
        values = [self._rows.get(_normalize(name), {}).get(column) for name in names]
        for name, value in zip(names, values, strict=True):
            if isinstance(value, list | dict):
                raise InputError(f"data.conditions: column {column!r} of {self.paths[0].name} has {printable(str(value)[:100])} for "
                                 f"{printable(name)}; a caption must be one text. Write one text per image, or set column to another one.")
        return [None if value is None else str(value) for value in values]

    def names_without_image(self, names: Iterable[str]) -> list[str]:
        """Names of images that have a row but are not among `names`, sorted."""
        return sorted(set(self._rows) - set(map(_normalize, names)))

    def label_column_hint(self) -> str:
        """A message that suggests the columns that look like labels for data.label_column; "" if there are none."""
        class_counts = {}
        for column in self.columns:
            try:
                class_counts[column] = len(sorted_classes(row.get(column) for row in self._rows.values()))
            except (ValueError, TypeError):
                continue
        hint = label_hint(class_counts, len(self._rows))
        return f"{self.paths[0].name}: {hint}" if hint else ""


def _normalize(name: str) -> str:
    """The name of an image with forward slashes and without redundant . and .. parts, so that rows match images."""
    return posixpath.normpath(name.replace("\\", "/"))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metadata file. Empty CSV fields become None. Raises InputError if the file cannot be read or a row has no file_name."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                rows = [{column: value or None for column, value in row.items() if column is not None}  # csv puts surplus fields under None
                        for row in csv.DictReader(file)]
                _convert_numbers(rows)
            else:
                rows = [_parse_line(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except PermissionError as error:
        raise permission_denied(path) from error
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); it has the classes or captions of the images beside it. Fix or remove this "
                         "file.") from None
    if not all(isinstance(row, dict) and row.get(_FILE_NAME) for row in rows):
        found = f" Its first row has: {printable(', '.join(map(str, rows[0])))}." if isinstance(rows[0], dict) else ""
        raise InputError(f"{path} has rows without {_FILE_NAME}, the path of an image relative to the file. Fix or remove this file.{found}")
    return rows


def _parse_line(number: int, line: str) -> Any:
    """The JSON value in a line. Raises ValueError that names the number of the line."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError(f"line {number}: too deeply nested") from None
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _convert_numbers(rows: list[dict[str, Any]]) -> None:
    """Convert columns that contain only numbers from strings to numbers, in place, so that class 2 comes before class 10."""
    for column in rows[0] if rows else ():
        if column == _FILE_NAME:
            continue
        values = [row.get(column) for row in rows]
        if all(value is None or _NUMBER.fullmatch(value) for value in values):
            for row, value in zip(rows, values, strict=True):
                if value is not None:
                    row[column] = int(value) if _WHOLE_NUMBER.fullmatch(value) else float(value)


def text_beside(image: Path) -> str | None:
    """The content of the .txt file with the name of an image file; None if there is none. Raises InputError if it is not UTF-8."""
    path = image.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise permission_denied(path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{printable(str(path))} cannot be read as a caption in UTF-8 ({error}). Convert or remove this file.") from None


def texts_in_metadata(root: Path, names: list[str], column: str) -> list[str | None]:
    """The text of each image in a column of the metadata files beside the images and in the folders above them. Names are relative to `root`.

    Raises InputError if there is no such file, or no such column.
    """
    folders = {str(parent) for folder in {posixpath.dirname(name) for name in names} for parent in PurePosixPath(folder, "_").parents}
    metadata = FolderMetadata(root, sorted(folders))
    if not metadata.paths:
        raise InputError(f"data.conditions: column is {column!r}, but data.path {str(root)!r} has no {' or '.join(METADATA_NAMES)}. Add one, or "
                         "leave out column to read a .txt file beside each image.")
    return metadata.texts(names, column)
