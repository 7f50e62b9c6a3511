"""The class labels of Hugging Face data sets: which column holds them, and the index of each class."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute

from stage1_tokenizer.data.class_labels import LABEL_NAMES, class_of, label_hint, sorted_classes, text_order
from vqmosaic.errors import InputError, check_name, printable
from vqmosaic.recipes.recipe_sections import DataConfig


def find_label_column(rows: datasets.Dataset, data: DataConfig) -> str | None:
    """The column with the classes: data.label_column, else the only one of type ClassLabel, else one named in LABEL_NAMES; None if there is none."""
    if not data.use_labels:
        return None
    given = f"data.label_column (for data.path {data.path!r})"
    if data.label_column:
        check_name(given, data.label_column, rows.column_names)
        if not _has_class_type(rows.features[data.label_column]):
            raise InputError(f"{given} is {data.label_column!r}, which holds {rows.features[data.label_column]}; "
                             "allowed: class labels, whole numbers, strings, true and false.")
        if not _has_only_class_values(rows, data.label_column):
            raise InputError(f"{given} is {data.label_column!r}, which holds numbers with fractions; "
                             "allowed: class labels, whole numbers, strings, true and false.")
        return data.label_column
    found = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) > 1:
        raise InputError(f"{given} is not given, and there are several: {printable(', '.join(found))}; give one, or set --data.use_labels false.")
    named = (name for name in LABEL_NAMES if name in rows.features and _has_class_type(rows.features[name]) and _has_only_class_values(rows, name))
    return found[0] if found else next(named, None)


def _has_class_type(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and any(kind in feature.dtype for kind in ("int", "string", "bool", "float")))


def _has_only_class_values(rows: datasets.Dataset, column: str) -> bool:
    """Whether all values of a column are classes: none is a number with a fraction."""
    if "float" not in rows.features[column].dtype:
        return True
    try:
        return bool(sorted_classes(rows[column][:]))
    except ValueError:
        return False


def hint_of_labels(rows: datasets.Dataset, image_column: str) -> str:
    """A message that names the columns that look like class labels; "" if there are none."""
    names = [name for name, feature in rows.features.items()
             if name != image_column and _has_class_type(feature) and _has_only_class_values(rows, name)]
    if not names:
        return ""
    table = rows.select_columns(names).with_format("arrow")[:]
    return label_hint({name: pyarrow.compute.count_distinct(table.column(name)).as_py() for name in names}, len(rows))


def class_indices(train: datasets.Dataset,
                  column: str | None) -> tuple[list[str] | None, Callable[[datasets.Dataset], np.ndarray | None], tuple[int, ...] | None]:
    """(class names, to_index, text_order). The names and text_order are None without a column, or if no row has a class.

    to_index returns the class index of each row of a split: int64, -1 for rows without a class; None if there are no classes.
    text_order is ImageSplits.text_order: the order of the classes in version 0.1.0, or None if it is the same.
    """
    if column is None:
        return None, lambda rows: None, None
    feature, stored = train.features[column], train[column][:]
    values: Sequence[int | str | bool]
    if isinstance(feature, datasets.ClassLabel):
        values = range(len(feature.names)) if set(map(class_of, stored)) - {None, -1} else ()
        names = list(feature.names)
    else:
        values = sorted_classes(stored)
        names = [str(value) for value in values]
    if not values:
        return None, lambda rows: None, None
    index_of = {value: index for index, value in enumerate(values)}
    if isinstance(feature, datasets.ClassLabel):
        index_of[-1] = -1  # public test splits use -1 for classes that are not published

    def to_index(rows: datasets.Dataset) -> np.ndarray:
        given = rows[column][:] if column in rows.column_names else [None] * len(rows)
        given = list(map(class_of, given))
        unknown = sorted({value for value in given if value is not None and value not in index_of})
        if unknown and isinstance(feature, datasets.ClassLabel):
            raise InputError(f"data.label_column {column!r}: class number {unknown[0]} has no name; the data set names {len(names)} classes, "
                             "numbered from 0, and -1 means no class. Choose another column, or set --data.use_labels false.")
        if unknown:
            raise InputError(f"data.label_column {column!r}: class {unknown[0]!r} has images in the validation split but none in the "
                             "training split, so it cannot be learned.")
        return np.array([-1 if value is None else index_of[value] for value in given], np.int64)

    return names, to_index, text_order(values)
