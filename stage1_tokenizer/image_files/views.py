"""Views of an image: which crop of it is resized, and how the result is flipped and shifted."""

import functools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vqmosaic.errors import InputError, check_name
from vqmosaic.recipes.recipe_sections import TokensConfig
from vqmosaic.recipes.view_lists import POSITIONS, VIEW_SETS


@dataclass(frozen=True, kw_only=True)
class View:
    """A crop of an image with the proportions of the result, optionally flipped and shifted."""

    crop_scale: float = 1.0
    """Side of the crop relative to the largest crop with these proportions. For a square, that is the short side of the image."""
    x: float = 0.5
    """Horizontal position of the crop: 0 is at the left edge of the image, 0.5 in the centre, 1 at the right edge."""
    y: float = 0.5
    """Vertical position of the crop: 0 is at the top edge of the image, 0.5 in the centre, 1 at the bottom edge."""
    flip: bool = False
    """Flip left and right."""
    shift_x: int = 0
    """Shift to the right, after the flip, in pixels of the resized image. The edge is repeated."""
    shift_y: int = 0
    """Shift down in pixels of the resized image. The edge is repeated."""

    def __post_init__(self):
        if not (0 < self.crop_scale <= 1 and 0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise InputError(f"{self}: crop_scale must be above 0 and at most 1; x and y must be at least 0 and at most 1.")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)


CENTER_VIEW = View()
"""The largest crop in the centre of the image, neither flipped nor shifted."""
_SHIFT_STEPS = {"shifts": (0, -1, 1), "wide-shifts": (0, -1, 1, -2, 2)}
"""The shifts along each axis, in steps of `shift` pixels. Sets that are not listed have no shifts."""


def training_views(tokens: TokensConfig) -> list[View]:
    """The views of each training image that preprocessing stores, in stored order. The recipe names a set of views or lists them."""
    if isinstance(tokens.views, str):
        return named_views(tokens.views, tokens.view_shift, tokens.view_crop_scale)
    views = []
    for record in tokens.views:
        (x, y), (shift_x, shift_y) = POSITIONS[record["position"]], record["shift"]
        views.append(View(crop_scale=record["crop_scale"], x=x, y=y, flip=record["flip"], shift_x=shift_x, shift_y=shift_y))
    return views


def named_views(name: str, shift: int = 1, crop_scale: float = TokensConfig.view_crop_scale) -> list[View]:
    """The views of a named set (VIEW_SETS). All sets except ten-crop begin with CENTER_VIEW.

    none: only CENTER_VIEW. shifts: CENTER_VIEW and its eight neighbours at a distance of `shift` pixels. wide-shifts: the 25 views at up to
    two such steps in each direction. flip: CENTER_VIEW and its flipped version. flip+NAME: the views of the set NAME, then their flipped versions.
    ten-crop: the centre and the four corners at `crop_scale`, then their flipped versions (Krizhevsky et al. 2012; stored as tokens: LlamaGen,
    Sun et al. 2024).
    """
    check_name("tokens.views", name, VIEW_SETS)
    if name == "ten-crop":
        positions = [POSITIONS[position] for position in ("center", "top-left", "top-right", "bottom-left", "bottom-right")]
        return [View(crop_scale=crop_scale, x=x, y=y, flip=flip) for flip in (False, True) for x, y in positions]
    shifts = [step * shift for step in _SHIFT_STEPS.get(name.removeprefix("flip+"), (0,))]
    flips = (False, True) if name.startswith("flip") else (False,)
    return [View(flip=flip, shift_x=shift_x, shift_y=shift_y) for flip in flips for shift_y in shifts for shift_x in shifts]


def flip_and_shift(pixels_HWC: np.ndarray, view: View) -> np.ndarray:
    """The image (H, W, C) with the flip and shift of the view. Ignores the crop of the view."""
    height, width = pixels_HWC.shape[:2]
    if view.flip:
        pixels_HWC = pixels_HWC[:, ::-1]
    if view.shift_y:
        pixels_HWC = pixels_HWC.take(_shifted_indices(height, view.shift_y), axis=0)
    if view.shift_x:
        pixels_HWC = pixels_HWC.take(_shifted_indices(width, view.shift_x), axis=1)
    return np.ascontiguousarray(pixels_HWC)


@functools.lru_cache(maxsize=256)
def _shifted_indices(size: int, shift: int) -> np.ndarray:
    """The indices that shift an axis of `size` pixels by `shift` and repeat its edge."""
    return np.clip(np.arange(size) - shift, 0, size - 1)
