"""What an edit is given: an image, and exactly one argument that says what to draw again. Checks both without torch.

    argument    method        draws
    mask        inpaint       the white part of the mask
    box         outpaint      what is around the image, which lies in this box of the result
    keep        complete      all but one side of the image
    strength    variations    this share of the tokens, at random places
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.read_images import ImageInput, read_image
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from stage1_tokenizer.tokenizer_config import read_tokenizer_config
from vqmosaic.errors import InputError
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.image_sizes import height_and_width

DRAWN_BY = ("mask", "box", "keep", "strength")
"""The arguments that say what to draw again, and the options of `vqmosaic edit`."""
WHITE_FROM = 128
"""Pixels of a mask picture from this value on, of 255, are drawn again."""


class ImageForm(NamedTuple):
    """What an image that is edited must be like: its channels, its range of values if it has more than 8 bits, and its height and width."""

    channels: int
    value_range: Sequence[float] | None
    sides: tuple[int, int]

    @classmethod
    def of_tokenizer(cls, folder: Path) -> "ImageForm":
        """That of the images of a tokenizer in a folder."""
        transform = read_tokenizer_config(folder)["transform"]
        return cls(transform["channels"], transform.get("value_range"), height_and_width(transform["image_size"]))


def check_files(image: Path, drawn_by: str, value: Any, form: ImageForm) -> None:
    """Check the files and options of `vqmosaic edit`. `value` is that of the option --mask (a file), --box, --keep or --strength.

    Raises:
        InputError: a file cannot be read or has another size, the mask has no white pixel, or the value is not allowed.
    """
    where = "this pipeline edits images"
    if drawn_by == "box":
        left, top, right, bottom = checked_box("--box", value, *form.sides)
        form, where = form._replace(sides=(bottom - top, right - left)), "--box is a place"
    elif drawn_by == "keep":
        checked_keep("--keep", value)
    elif drawn_by == "strength":
        checked_strength("--strength", value)
    checked_image(f"image {str(image)!r}", image, form, where)
    if drawn_by == "mask":
        name = f"the mask {str(value)!r}"
        check_mask(name, picture_mask(name, read_mask(value)), form.sides)


# --- images and masks ----------------------------------------------------------------------------------------------------------


def checked_image(name: str, image: ImageInput, form: ImageForm, where: str) -> Image.Image | FloatImage:
    """The upright image with the channels of the form. Raises InputError unless it has its size.

    `name` is what the message calls the image, and `where` says what needs this size, such as "this pipeline edits images".
    """
    try:
        upright = read_image(image, channels=form.channels, value_range=form.value_range)
    except UnreadableImage as error:
        raise InputError(f"{name} cannot be read: {error}.") from None
    (width, height), (expected_height, expected_width) = upright.size, form.sides
    if (height, width) != form.sides:
        raise InputError(f"{name} is {width} x {height} pixels (width x height), but {where} of {expected_width} x {expected_height}. Resize or crop "
                         f"it first, such as with Pillow: image.resize(({expected_width}, {expected_height})).")
    return upright


def read_mask(path: Path) -> Image.Image:
    """A mask file as a PIL image with its alpha, so that transparent ones can be refused. Raises InputError if it cannot be read."""
    try:
        return read_image(path, channels=2)
    except UnreadableImage as error:
        raise InputError(f"the mask {str(path)!r} cannot be read: {error}.") from None


def picture_mask(name: str, picture: Image.Image) -> np.ndarray:
    """The mask (1, H, W) in a PIL image. Raises InputError for transparent ones: whether these pixels are to be drawn is not known."""
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            raise InputError(f"{name} has transparent pixels. Save it without transparency: white where the image is to be drawn again, black "
                             "elsewhere.")
    try:
        return (np.asarray(read_image(picture, channels=1)) >= WHITE_FROM)[None]
    except UnreadableImage as error:
        raise InputError(f"{name} cannot be read: {error}.") from None


def check_mask(name: str, mask_NHW: np.ndarray, sides: tuple[int, int]) -> None:
    """Raise InputError unless masks (N, H, W) have the size of the image, and at least one pixel to draw each."""
    height, width = sides
    if mask_NHW.shape[1:] != sides:
        raise InputError(f"{name} is {mask_NHW.shape[2]} x {mask_NHW.shape[1]} pixels (width x height), but the image is {width} x {height}. Give a "
                         "mask of the size of the image.")
    if not mask_NHW.any(axis=(1, 2)).all():
        raise InputError(f"{name} has no white (True) pixel, so there is nothing to draw. White pixels are drawn again, black ones are kept.")


# --- other arguments -----------------------------------------------------------------------------------------------------------


def single_given(values: Mapping[str, Any], prefix: str = "") -> str:
    """The name of the only value that is not None. Raises InputError if there is none, or several. `prefix` precedes the names in the message."""
    given, names = [f"{prefix}{name}" for name, value in values.items() if value is not None], [f"{prefix}{name}" for name in values]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given" if given else "nothing says what to draw again"
        raise InputError(f"{found}; give exactly one of {', '.join(names[:-1])} and {names[-1]}.")
    return given[0].removeprefix(prefix)


def checked_box(name: str, box: Any, height: int, width: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a box. Raises InputError unless it lies in an image of this size, and does not cover all of it."""
    allowed = f"give left, top, right and bottom in pixels, inside of {width} x {height} (width x height)"
    if not hasattr(box, "__len__") or isinstance(box, str) or len(box) != 4:
        raise InputError(f"{name} is {box!r}; {allowed}.")
    left, top, right, bottom = (as_integer(f"{name}: an entry", side) for side in box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(f"{name} is {','.join(map(str, box))}; {allowed}.")
    if (left, top, right, bottom) == (0, 0, width, height):
        raise InputError(f"{name} is {','.join(map(str, box))}, which is the whole result, so there is nothing to draw. Give a smaller box.")
    return left, top, right, bottom


def checked_keep(name: str, keep: Any) -> float:
    """The share of the rows (for "left", of the columns) to keep, above 0 and below 1. Raises InputError for other values."""
    allowed = 'allowed: "top", "left", or a share of the rows between 0 and 1'
    return checked_share(name, 0.5 if isinstance(keep, str) and keep in ("top", "left") else keep, allowed, below_one=True)


def checked_strength(name: str, strength: Any) -> float:
    """The share of the tokens to draw, above 0 and at most 1. Raises InputError for other values."""
    return checked_share(name, strength, "allowed: a share of the tokens above 0, at most 1", below_one=False)


def checked_share(name: str, share: Any, allowed: str, below_one: bool) -> float:
    """A number above 0 and at most 1, or below 1. Raises InputError for anything else."""
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not is_number or not (0 < share < 1 or (share == 1 and not below_one)):
        raise InputError(f"{name} is {share!r}; {allowed}.")
    return float(share)
