"""Class labels in the columns of tables: which values are classes, and which columns look as if they held some."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

LABEL_NAMES = ("label", "labels", "class")
"""Columns of these names are read without being asked for."""
_LIKELY_WORDS = frozenset({"label", "labels", "class", "classes", "category", "categories", "target", "targets", "species", "breed", "digit", "y"})
_HINTED = 5


def class_of(value: Any) -> int | str | bool | None:
    """The class that a stored value names: whole numbers are the same as floats and as integers; None where there is no label.

    Raises ValueError for a number with a fraction, which is no class.
    """
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    if not value.is_integer():
        raise ValueError(f"{value:g} is no whole number")
    return int(value)


def sorted_classes(values: Iterable[Any]) -> list[int | str | bool]:
    """The distinct classes among stored values, in order. Raises ValueError where they are no classes."""
    return sorted({label for value in values if (label := class_of(value)) is not None})


def label_hint(distinct: Mapping[str, int], rows: int) -> str:
    """Words that name the columns that look like class labels, for data whose classes are not read; "" where there are none.

    `distinct` has for each column of a fitting type how many different values it holds.
    """
    likely = [name for name, count in distinct.items() if 2 <= count <= rows / 2]
    likely.sort(key=lambda name: not _LIKELY_WORDS & set(re.findall("[a-z]+", name.lower())))
    if not likely:
        return ""
    listed = ", ".join(f"{name!r} ({distinct[name]} values)" for name in likely[:_HINTED])
    return f"classes are not read; columns that look like labels: {listed}; read one with --data.label_column {likely[0]}"
