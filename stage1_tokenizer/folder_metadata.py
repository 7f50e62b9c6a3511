"""metadata.csv or metadata.jsonl beside the images of a folder: a row for each image, with its file_name and perhaps its class."""

import csv
import json
from pathlib import Path
from typing import Any

from stage1_tokenizer.class_labels import label_hint, sorted_classes
from vqmosaic.errors import InputError, check_name
from vqmosaic.permissions import permission_denied

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
_FILE_NAME = "file_name"


class FolderMetadata:
    """The rows of the metadata files at the top of a data set and of its split folders; names are relative to the data set."""

    def __init__(self, root: Path, folders: list[str]):
        self.paths = [path for folder in folders for name in METADATA_NAMES if (path := root / folder / name).is_file()]
        self._rows: dict[str, dict[str, Any]] = {}
        for path in self.paths:
            within = path.parent.relative_to(root)
            for row in _read(path):
                self._rows.setdefault((within / str(row[_FILE_NAME])).as_posix(), row)

    @property
    def columns(self) -> list[str]:
        """Names of the columns beside file_name."""
        return list(dict.fromkeys(name for row in self._rows.values() for name in row if name != _FILE_NAME))

    def labels(self, names: list[str], column: str) -> list[Any]:
        """The stored value of each image, None where there is none. Raises InputError for a column that holds no classes."""
        check_name(f"data.label_column (for {self.paths[0]})", column, self.columns)
        values = [self._rows.get(name, {}).get(column) for name in names]
        try:
            sorted_classes(values)
        except (ValueError, TypeError) as error:
            raise InputError(f"data.label_column is {column!r}, which holds no classes in {self.paths[0]} ({error}); allowed: whole numbers, "
                             "texts, true and false.") from None
        return values

    def hint(self) -> str:
        """Words that name the columns that look like labels."""
        distinct = {}
        for column in self.columns:
            try:
                distinct[column] = len(sorted_classes(row.get(column) for row in self._rows.values()))
            except (ValueError, TypeError):
                continue
        hint = label_hint(distinct, len(self._rows))
        return f"{self.paths[0].name}: {hint}" if hint else ""


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                rows = _with_numbers([{name: value or None for name, value in row.items() if name is not None} for row in csv.DictReader(file)])
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except PermissionError as error:
        raise permission_denied(path) from error
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); it tells the classes of the images beside it. Mend it or take it away.") from None
    if not all(isinstance(row, dict) and row.get(_FILE_NAME) for row in rows):
        raise InputError(f"{path} has rows without {_FILE_NAME}, the path of an image relative to the file. Mend it or take it away.")
    return rows


def _with_numbers(rows: list[dict[str, str | None]]) -> list[dict[str, Any]]:
    """Rows of texts, with numbers in the columns that hold nothing else, so that classes 2 and 10 are in that order."""
    for column in rows[0] if rows else ():
        if column == _FILE_NAME:
            continue
        try:
            numbers = [float(row[column]) if row.get(column) is not None else None for row in rows]
        except ValueError:
            continue
        for row, number in zip(rows, numbers, strict=True):
            row[column] = number
    return rows
