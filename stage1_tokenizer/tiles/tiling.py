"""Where the tiles of a larger image lie, in pixels and in tokens. Does not import torch.

A unit is the smallest box of pixels that holds whole tokens of every grid of a tokenizer. Tiles start at multiples of it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from token_shards.manifest import Grid
from vqmosaic.errors import InputError, check_range
from vqmosaic.recipes.image_sizes import height_and_width

OVERLAP = 0.5
"""The default overlap of tiles, as a share of a tile."""
Place = tuple[int, int]
"""The number of the tile along each side, from the top and from the left."""


@dataclass(frozen=True)
class Tiling:
    """Overlapping tiles that cover an image. `for_image` makes one for images of any size, and `checked` only for sizes of whole tokens."""

    sides: tuple[int, int]
    """Height and width of a tile in pixels: the size of the training images."""
    image: tuple[int, int]
    """Height and width of the image in pixels: multiples of the unit, and at least those of a tile."""
    grids: Sequence[Grid]
    """The grids of a tile. Empty for tokenizers without ids."""
    overlap: float
    """The share of a tile, in each direction, that its neighbour covers, too. Rounded to units."""

    @classmethod
    def for_image(cls, sides: tuple[int, int], grids: Sequence[Grid], image: tuple[int, int], overlap: float) -> "Tiling":
        """The tiles for an image of any size, enlarged to at least one tile and to whole units. Raises InputError for an invalid overlap."""
        check_overlap(overlap)
        unit = unit_sides(sides, grids)
        enlarged = [max(side, math.ceil(length / step) * step) for side, length, step in zip(sides, image, unit, strict=True)]
        return cls(sides, (enlarged[0], enlarged[1]), tuple(grids), overlap)

    @classmethod
    def checked(cls, sides: tuple[int, int], grids: Sequence[Grid], size: Any, overlap: float, field: str = "size") -> "Tiling":
        """The tiles for images of exactly this size, an integer or (height, width). Raises InputError, which names the field, for other sizes."""
        height, width = height_and_width(size, field)
        check_overlap(overlap)
        unit = unit_sides(sides, grids)
        for name, given, side, step in zip(("height", "width"), (height, width), sides, unit, strict=True):
            if given < side:
                raise InputError(f"{field}: the {name} is {given}, but this pipeline was trained with images of {sides[0]} x {sides[1]} pixels "
                                 f"(height x width). Give at least this size, and crop the result.")
            if given % step:
                near = " or ".join(str(each) for each in (given // step * step, (given // step + 1) * step))
                raise InputError(f"{field}: the {name} is {given}; it must be a multiple of {step}, the {name} of a token in pixels, such as {near}.")
        return cls(sides, (height, width), tuple(grids), overlap)

    @functools.cached_property
    def unit(self) -> tuple[int, int]:
        """Height and width of a unit in pixels."""
        return unit_sides(self.sides, self.grids)

    @functools.cached_property
    def starts(self) -> tuple[list[int], list[int]]:
        """The first row and the first column of the tiles, in units."""
        rows, columns = (tile_starts(length // step, side // step, self.overlap)
                         for length, side, step in zip(self.image, self.sides, self.unit, strict=True))
        return rows, columns

    @property
    def places(self) -> list[Place]:
        """All tiles, row by row."""
        rows, columns = self.starts
        return [(row, column) for row in range(len(rows)) for column in range(len(columns))]

    @property
    def image_grids(self) -> list[Grid]:
        """The grids of the whole image."""
        return [dataclasses.replace(grid, height=grid.height * self.image[0] // self.sides[0], width=grid.width * self.image[1] // self.sides[1])
                for grid in self.grids]

    def pixels(self, place: Place) -> tuple[slice, slice]:
        """The rows and columns of a tile in the image."""
        return self._slices(place, self.unit, self.sides)

    def tokens(self, grid: Grid, place: Place) -> tuple[slice, slice]:
        """The rows and columns of a tile in a grid of the image. `grid` is that of a tile."""
        steps = tokens_per_unit(grid, self.sides, self.unit)
        return self._slices(place, steps, (grid.height, grid.width))

    def _slices(self, place: Place, steps: Sequence[int], lengths: Sequence[int]) -> tuple[slice, slice]:
        first = [starts[number] * step for starts, number, step in zip(self.starts, place, steps, strict=True)]
        return slice(first[0], first[0] + lengths[0]), slice(first[1], first[1] + lengths[1])

    def central_tokens(self, grid: Grid, place: Place) -> tuple[slice, slice]:
        """The rows and columns, in a grid of the image, of the tokens that are nearer to the centre of this tile than to that of any other."""
        parts = []
        steps = tokens_per_unit(grid, self.sides, self.unit)
        for starts, number, step, side, length, whole in zip(self.starts, place, steps, self.unit, self.sides, self.image, strict=True):
            tile = length // side
            first = 0 if number == 0 else border(starts[number - 1], starts[number], tile)
            stop = whole // side if number == len(starts) - 1 else border(starts[number], starts[number + 1], tile)
            parts.append(slice(first * step, stop * step))
        return parts[0], parts[1]


def border(start: int, next_start: int, tile: int) -> int:
    """The first unit that is nearer to the centre of the next tile than to that of a tile."""
    return (start + next_start + tile + 1) // 2


def check_overlap(overlap: Any) -> None:
    """Raise InputError unless the overlap is a share from 0 to below 1."""
    check_range("overlap", overlap, at_least=0, below=1)


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles start that cover `length` units: each overlaps the one before it by at least this share of a tile, rounded."""
    stride = max(1, tile - round(overlap * tile))
    return [*range(0, length - tile, stride), length - tile]


def unit_sides(sides: tuple[int, int], grids: Sequence[Grid]) -> tuple[int, int]:
    """Height and width of a unit in pixels; 1 without grids. Raises InputError if the tokens do not have a whole number of pixels."""
    for grid in grids:
        if sides[0] % grid.height or sides[1] % grid.width:
            raise InputError(f"the {grid.height} x {grid.width} tokens of grid {grid.name!r} do not divide images of {sides[0]} x {sides[1]} pixels, "
                             "so this tokenizer cannot work on tiles.")
    return math.lcm(*(sides[0] // grid.height for grid in grids)), math.lcm(*(sides[1] // grid.width for grid in grids))


def tokens_covering(grid: Grid, sides: tuple[int, int], unit: tuple[int, int], image: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tokens that cover an image of any size, in whole units."""
    rows, columns = (math.ceil(length / step) * count for length, step, count in zip(image, unit, tokens_per_unit(grid, sides, unit), strict=True))
    return rows, columns


def tokens_per_unit(grid: Grid, sides: tuple[int, int], unit: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a grid's tokens in a unit."""
    return unit[0] * grid.height // sides[0], unit[1] * grid.width // sides[1]
