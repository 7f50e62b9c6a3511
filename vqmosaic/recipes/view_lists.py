"""Checks which views of each training image a recipe stores as tokens: a named set, or a list with one record for each view.

A view is a crop of the image with the proportions of data.image_size, flipped or shifted if the view says so. Does not load torch.
"""

from typing import Any

from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width

VIEW_COUNTS = {"none": 1, "flip": 2, "shifts": 9, "flip+shifts": 18, "wide-shifts": 25, "flip+wide-shifts": 50, "ten-crop": 10}
"""The named sets, and the number of views in each."""
VIEW_SETS = tuple(VIEW_COUNTS)
MIRRORED_SETS = ("flip", "flip+shifts", "flip+wide-shifts", "ten-crop")
"""The named sets that contain flipped views."""
POSITIONS = {
    "center": (0.5, 0.5), "top-left": (0.0, 0.0), "top": (0.5, 0.0), "top-right": (1.0, 0.0), "left": (0.0, 0.5), "right": (1.0, 0.5),
    "bottom-left": (0.0, 1.0), "bottom": (0.5, 1.0), "bottom-right": (1.0, 1.0),
}
"""Offset (x, y) of a crop as fractions of the largest possible offset: (0, 0) is the top left, (1, 1) the bottom right."""
DEFAULTS = {"crop_scale": 1.0, "position": "center", "flip": False, "shift": [0, 0]}
"""The fields of a record, with the values of fields that are not given. crop_scale is the side of the crop (not its area) relative to the
largest crop of the same proportions. shift is in pixels to the right and down."""


def checked_views(field: str, records: list) -> list[dict[str, Any]]:
    """The records of a list of views, completed to all four fields: crop_scale, position, flip and shift.

    Raises InputError for an empty list, for a record that is not a view and for a repeated view. The message names the entry by its index.
    """
    if not records:
        raise InputError(f"{field} is an empty list; give at least one record, such as {{flip: false}}, or one of: {', '.join(VIEW_SETS)}.")
    checked: list[dict[str, Any]] = []
    for index, record in enumerate(records):
        view = _checked_view(f"{field}[{index}]", record)
        if view in checked:
            raise InputError(f"{field}[{index}] is the same view as {field}[{checked.index(view)}]. Remove one of them.")
        checked.append(view)
    return checked


def _checked_view(entry: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{entry} is {record!r}; it must be a record with any of the fields {', '.join(DEFAULTS)}, such as {{flip: true}}.")
    for name in record:
        check_name(f"{entry}: a field", name, DEFAULTS)
    view = {**DEFAULTS, **record}
    scale, flip, shift = view["crop_scale"], view["flip"], view["shift"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise InputError(f"{entry}.crop_scale is {scale!r}; it must be a number above 0 and at most 1.")
    check_range(f"{entry}.crop_scale", scale, above=0, at_most=1)
    check_name(f"{entry}.position", view["position"], POSITIONS)
    if not isinstance(flip, bool):
        raise InputError(f"{entry}.flip is {flip!r}; it must be true or false.")
    if not isinstance(shift, (list, tuple)) or len(shift) != 2 or any(isinstance(step, bool) or not isinstance(step, int) for step in shift):
        raise InputError(f"{entry}.shift is {shift!r}; it must be two integers, the pixels to the right and down, such as [1, 0].")
    return {**view, "crop_scale": float(scale), "shift": list(shift)}


def check_shifts_fit(field: str, views: str | list[dict[str, Any]], image_size: ImageSize) -> None:
    """Raise InputError, which names the entry, if a listed view shifts the image by half of its width or height or more."""
    height, width = height_and_width(image_size)
    for index, view in enumerate(views if isinstance(views, list) else ()):
        for step, side in zip(view["shift"], (width, height), strict=True):
            check_range(f"{field}[{index}].shift: an entry", step, above=-side / 2, below=side / 2)
