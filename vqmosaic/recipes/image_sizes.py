"""Image sizes: one integer for square images, [height, width] for others. Loads no torch."""

from collections.abc import Sequence
from typing import Any

from vqmosaic.errors import InputError, check_range
from vqmosaic.recipes.field_types import as_integer

ImageSize = int | Sequence[int]
"""One integer, the side of a square, or a pair (height, width)."""
SIDES = ("height", "width")


def checked_image_size(field: str, given: Any, at_least: int = 1, at_most: int | None = None) -> int | list[int]:
    """The size in the form in which recipes and config.json store it: an integer for a square, else the list [height, width].

    Raises InputError unless it is one integer or a list of two, each within the bounds. The message names the field and the side.
    """
    if not isinstance(given, (list, tuple)):
        try:
            size = as_integer(field, given)
        except InputError:
            raise InputError(f"{field} is {given!r}; it must be an integer for square images, or [height, width], such as [32, 64].") from None
        check_range(field, size, at_least=at_least, at_most=at_most)
        return size
    if len(given) != 2:
        raise InputError(f"{field} is {list(given)}; it must be an integer for square images, or two integers, [height, width], such as [32, 64].")
    height, width = (as_integer(f"{field}: the {name}", side) for name, side in zip(SIDES, given, strict=True))
    for name, side in zip(SIDES, (height, width), strict=True):
        check_range(f"{field}: the {name}", side, at_least=at_least, at_most=at_most)
    return height if height == width else [height, width]


def height_and_width(image_size: ImageSize, field: str = "image_size") -> tuple[int, int]:
    """Height and width of an image size in either form. Raises InputError, which names the field, if it is not an image size."""
    size = checked_image_size(field, image_size)
    return (size, size) if isinstance(size, int) else (size[0], size[1])
