"""Class labels in the columns of tables: which values are classes, and which columns look as if they held some."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
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
    """The distinct classes among stored values: numbers in order, strings in natural order. Raises ValueError for other values."""
    classes = {label for value in values if (label := class_of(value)) is not None}
    return sorted(classes, key=natural_key if all(isinstance(label, str) for label in classes) else None)


def natural_key(text: str) -> tuple[list[str | tuple[int, str]], str]:
    """The sort key that compares the numbers in a string as numbers: 2 before 10, and a2 before a10.

    If the numbers are equal, such as 01 and 1, the strings are compared as text.
    """
    parts = re.split("([0-9]+)", text)  # text and digits alternate and text comes first, so text is compared with text
    digits = (part.lstrip("0") for part in parts[1::2])
    numbers = [(len(significant), significant) for significant in digits]  # int() refuses more than 4,300 digits
    parts[1::2] = numbers
    return parts, text


def text_order(classes: Sequence[int | str | bool]) -> tuple[int, ...] | None:
    """The indices of sorted classes in the order of version 0.1.0, which sorted digits as text (0, 1, 10, 2); None if both orders are the same."""
    order = sorted(range(len(classes)), key=classes.__getitem__)
    return None if order == list(range(len(classes))) else tuple(order)


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
