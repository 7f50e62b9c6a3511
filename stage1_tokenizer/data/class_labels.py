"""Class labels in table columns: the classes among stored values, their order, and hints about columns that look like labels."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LABEL_NAMES = ("label", "labels", "class")
"""Columns with these names are read as labels by default."""
_LIKELY_WORDS = frozenset({"label", "labels", "class", "classes", "category", "categories", "target", "targets", "species", "breed", "digit", "y"})
_MAX_HINTED_COLUMNS = 5


def class_of(value: Any) -> int | str | bool | None:
    """The class for a stored value; None for a missing label. A whole number is the same class as a float and as an integer.

    Raises ValueError for a number with a fraction.
    """
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    if not value.is_integer():
        raise ValueError(f"{value:g} is not a whole number")
    return int(value)


def sorted_classes(values: Iterable[Any]) -> list[int | str | bool]:
    """The distinct classes among stored values: numbers in order, strings in natural order. Raises ValueError for other values."""
    classes = {label for value in values if (label := class_of(value)) is not None}
    if all(isinstance(label, str) for label in classes):
        return sorted(classes, key=lambda label: natural_key(str(label)))
    return sorted(classes)


def natural_key(text: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sort key that compares the numbers in a string as numbers: 2 before 10, and a2 before a10.

    If the numbers are equal, such as 01 and 1, the strings are compared as text.
    """
    parts = re.split("([0-9]+)", text)  # text and digits alternate, starting with text, so that text is compared with text
    digits = (part.lstrip("0") for part in parts[1::2])
    numbers = [(len(significant), significant) for significant in digits]  # int() refuses more than 4,300 digits
    parts[1::2] = numbers
    return parts, text


def text_order(classes: Sequence[int | str | bool]) -> tuple[int, ...] | None:
    """The indices of the sorted classes in the order of version 0.1.0, which sorted numbers as text (0, 1, 10, 2); None if the order is the same."""
    order = sorted(range(len(classes)), key=classes.__getitem__)
    return None if order == list(range(len(classes))) else tuple(order)


def label_hint(distinct: Mapping[str, int], rows: int) -> str:
    """A message that names the columns that look like class labels, for data without classes; "" if there are none.

    `distinct` maps each column with a suitable type to its number of distinct values.
    """
    likely = [name for name, count in distinct.items() if 2 <= count <= rows / 2]
    likely.sort(key=lambda name: not _LIKELY_WORDS & set(re.findall("[a-z]+", name.lower())))
    if not likely:
        return ""
    listed = ", ".join(f"{name!r} ({distinct[name]} values)" for name in likely[:_MAX_HINTED_COLUMNS])
    return f"no classes are read; columns that look like labels: {listed}; to read one, give --data.label_column {likely[0]}"
