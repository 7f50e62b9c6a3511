"""Encodes and decodes images of any size in overlapping tiles of the training size.

    ids = encode_tiled(tokenizer, images)              # images (B, C, H, W) of any height and width
    restored = decode_tiled(tokenizer, ids)            # (B, C, H, W), up to whole tokens

The device holds one batch of tiles, whatever the size of the image. Networks with attention or GroupNorm have only seen images of the training size,
and so do tiles. Each token comes from the tile in whose centre it lies, so it is encoded with what is around it. Decoded tiles are blended where they
overlap: a pixel is the mean over its tiles, weighted by its distance to the edge of each tile (diffusers' AutoencoderKL.tiled_decode blends in a
similar way).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from stage1_tokenizer.tiles.tiling import OVERLAP, Place, Tiling, tokens_covering
from stage1_tokenizer.tokenizer_protocol import Ids, Tokenizer, ids_shape
from token_shards.manifest import Grid
from vqmosaic.errors import InputError
from vqmosaic.runs.out_of_memory import FittingBatches, ranges

Result = TypeVar("Result")
Tile = tuple[int, Place]
"""The number of an image, and the place of one of its tiles."""
BATCH_TILES = 16
"""The default number of tiles in a batch."""


def encode_tiled(tokenizer: Tokenizer, images_BCHW: torch.Tensor, overlap: float = OVERLAP, batch_size: int = BATCH_TILES) -> Ids:
    """Encode images (B, C, H, W) in [-1, 1] of any size to int64 ids on the CPU, in the form of `tokenizer.encode`.

    The ids cover the image: images that do not consist of whole tokens, or that are smaller than a tile, are continued with their edge pixels. An
    image of the training size gives the ids of `tokenizer.encode`.

    Args:
        overlap: the share of a tile that its neighbour covers, too, from 0 to below 1. Larger values give tokens more context, and take longer.
        batch_size: number of tiles that are encoded together.

    Raises:
        InputError: another number of channels or an invalid overlap, or the tokenizer has no ids.
    """
    tokenizer.check_has_ids()
    tiling = tiling_of(tokenizer, images_BCHW, overlap)
    padded_BCHW = continue_edges(images_BCHW, tiling.image)
    ids = {grid.name: torch.empty(len(images_BCHW), *ids_shape(grid), dtype=torch.int64) for grid in tiling.image_grids}

    def encode(batch: Sequence[Tile]) -> dict[str, torch.Tensor]:
        return tokenizer.encode_grids(cut_tiles(padded_BCHW, tiling, batch).to(tokenizer.device))

    for batch, encoded in computed_tiles(encode, len(images_BCHW), tiling, batch_size, FittingBatches(tokenizer.device)):
        for grid in tiling.grids:
            for tokens_hw, (image, place) in zip(encoded[grid.name].cpu(), batch, strict=True):
                (rows, columns), (tile_rows, tile_columns) = tiling.central_tokens(grid, place), tiling.tokens(grid, place)
                central_hw = tokens_hw[shifted(rows, -tile_rows.start), shifted(columns, -tile_columns.start)]
                ids[grid.name][image, rows, columns] = central_hw
    for grid in tiling.grids:  # a side that is smaller than a tile has got further tokens
        height, width = tokens_covering(grid, tiling.sides, tiling.unit, size_of(images_BCHW))
        ids[grid.name] = ids[grid.name][:, :height, :width]
    return ids if len(ids) > 1 else next(iter(ids.values()))


def decode_tiled(tokenizer: Tokenizer, ids: torch.Tensor | Mapping[str, torch.Tensor], overlap: float = OVERLAP,
                 batch_size: int = BATCH_TILES, fitting: FittingBatches | None = None) -> torch.Tensor:
    """Decode ids of any number of rows and columns to float32 images (B, C, H, W) on the CPU, not clamped.

    Ids of the training size give the images of `tokenizer.decode`. Without overlap, the result consists of the decoded tiles. `overlap` and
    `batch_size` are those of `encode_tiled`. `fitting` remembers from call to call how many tiles fit into memory.

    Raises:
        InputError: ids of another form than those of `encode_tiled`, an invalid overlap, or the tokenizer has no ids.
    """
    by_grid = tokenizer.ids_by_grid(ids)
    size = size_of_decoded(tokenizer, by_grid)
    tiling = Tiling.for_image(tokenizer.transform.sides, tokenizer.grids, size, overlap)
    padded = {grid.name: continue_tokens(by_grid[grid.name], grid) for grid in tiling.image_grids}

    def decode(batch: Sequence[Tile]) -> torch.Tensor:
        parts = {grid.name: torch.stack([padded[grid.name][(image, *tiling.tokens(grid, place))] for image, place in batch]) for grid in tiling.grids}
        return tokenizer.decode_grids({name: part.to(tokenizer.device) for name, part in parts.items()})

    images = len(next(iter(padded.values())))
    if fitting is None:
        fitting = FittingBatches(tokenizer.device)
    return blend_tiles(decode, tokenizer.transform.channels, images, tiling, batch_size, fitting)[..., :size[0], :size[1]]


def reconstruct_tiled(tokenizer: Tokenizer, images_BCHW: torch.Tensor, overlap: float = OVERLAP, batch_size: int = BATCH_TILES) -> torch.Tensor:
    """Encode and decode images (B, C, H, W) of any size. Returns float32 images of this size on the CPU, not clamped.

    Without ids, the reconstructions of the tiles are blended. Arguments are those of `encode_tiled`.

    Raises:
        InputError: another number of channels or an invalid overlap.
    """
    height, width = size_of(images_BCHW)
    if tokenizer.grids:
        ids = encode_tiled(tokenizer, images_BCHW, overlap, batch_size)
        return decode_tiled(tokenizer, ids, overlap, batch_size)[..., :height, :width]
    tiling = tiling_of(tokenizer, images_BCHW, overlap)
    padded_BCHW = continue_edges(images_BCHW, tiling.image)

    def reconstruct(batch: Sequence[Tile]) -> torch.Tensor:
        return tokenizer.reconstruct(cut_tiles(padded_BCHW, tiling, batch).to(tokenizer.device))

    blended_BCHW = blend_tiles(reconstruct, images_BCHW.shape[1], len(images_BCHW), tiling, batch_size, FittingBatches(tokenizer.device))
    return blended_BCHW[..., :height, :width]


# --- tiles ---------------------------------------------------------------------------------------------------------------------


def tiling_of(tokenizer: Tokenizer, images_BCHW: torch.Tensor, overlap: float) -> Tiling:
    """The tiles of images (B, C, H, W). Raises InputError for another shape or number of channels."""
    channels = tokenizer.transform.channels
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != channels or not images_BCHW.numel():
        raise InputError(f"images have shape {tuple(images_BCHW.shape)}; give (B, {channels}, H, W), of any height and width.")
    return Tiling.for_image(tokenizer.transform.sides, tokenizer.grids, size_of(images_BCHW), overlap)


def computed_tiles(compute: Callable[[Sequence[Tile]], Result], images: int, tiling: Tiling, batch_size: int,
                   fitting: FittingBatches) -> Iterator[tuple[Sequence[Tile], Result]]:
    """All tiles of all images in batches, with what a function returns for them. Batches that do not fit into memory are split."""
    tiles = [(image, place) for image in range(images) for place in tiling.places]
    computed = fitting.run(ranges(len(tiles), batch_size), lambda part: compute(tiles[part.start:part.stop]))
    return ((tiles[part.start:part.stop], result) for part, result in computed)


def cut_tiles(images_BCHW: torch.Tensor, tiling: Tiling, batch: Sequence[Tile]) -> torch.Tensor:
    """The pixels (n, C, H, W) of tiles."""
    return torch.stack([images_BCHW[(image, slice(None), *tiling.pixels(place))] for image, place in batch])


def blend_tiles(decode: Callable[[Sequence[Tile]], torch.Tensor], channels: int, images: int, tiling: Tiling, batch_size: int,
                fitting: FittingBatches) -> torch.Tensor:
    """Images (B, C, H, W) from tiles (n, C, H, W), which `decode` returns for a batch of them. Each pixel is the weighted mean over its tiles."""
    blended_BCHW = torch.zeros(images, channels, *tiling.image)
    row_weights, column_weights = (tile_weights([start * step for start in starts], side, length)
                                   for starts, step, side, length in zip(tiling.starts, tiling.unit, tiling.sides, tiling.image, strict=True))
    for batch, tiles_nCHW in computed_tiles(lambda batch: decode(batch).float().cpu(), images, tiling, batch_size, fitting):
        for tile_CHW, (image, place) in zip(tiles_nCHW, batch, strict=True):
            weights_HW = row_weights[place[0]][:, None] * column_weights[place[1]]
            blended_BCHW[(image, slice(None), *tiling.pixels(place))] += tile_CHW * weights_HW
    return blended_BCHW


def tile_weights(starts: Sequence[int], side: int, length: int) -> list[torch.Tensor]:
    """The weights (side,) of the pixels of each tile along one side of the image. At each pixel, those of all tiles sum to 1.

    They fall linearly across an overlap. Where there is only one tile, the weight is exactly 1.
    """
    pixels = torch.arange(side, dtype=torch.float64)
    distances = torch.minimum(pixels + 0.5, side - 0.5 - pixels)  # to the nearer edge of the tile
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start:start + side] += distances
    return [(distances / total[start:start + side]).float() for start in starts]


# --- edges ---------------------------------------------------------------------------------------------------------------------


def continue_edges(images_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images enlarged to a size at the right and the bottom, with the values of their last column and row."""
    height, width = size_of(images_BCHW)
    return F.pad(images_BCHW.float(), (0, size[1] - width, 0, size[0] - height), mode="replicate")


def continue_tokens(ids_Bhw: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Ids enlarged to the rows and columns of a grid, with those of their last row and column."""
    rows = torch.arange(grid.height, device=ids_Bhw.device).clamp_max(ids_Bhw.shape[1] - 1)
    columns = torch.arange(grid.width, device=ids_Bhw.device).clamp_max(ids_Bhw.shape[2] - 1)
    return ids_Bhw[:, rows][:, :, columns]


def size_of_decoded(tokenizer: Tokenizer, ids: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of the images that ids are decoded to. Raises InputError unless all grids have the same."""
    sizes = {}
    for grid in tokenizer.grids:
        given, depth = ids[grid.name], () if grid.depth == 1 else (grid.depth,)
        if not isinstance(given, torch.Tensor) or given.ndim != 3 + len(depth) or tuple(given.shape[3:]) != depth or not given.numel():
            expected = ", ".join(map(str, ("B", "h", "w", *depth)))
            raise InputError(f"the ids of grid {grid.name!r} have shape {tuple(getattr(given, 'shape', ()))}; give ({expected}), with any h and w.")
        height, width = (side // count * found for side, count, found in zip(tokenizer.transform.sides, (grid.height, grid.width), given.shape[1:3],
                                                                              strict=True))
        sizes[grid.name] = (len(given), height, width)
    if len({*sizes.values()}) > 1:
        found = ", ".join(f"{name}: {count} images of {height} x {width} pixels" for name, (count, height, width) in sizes.items())
        raise InputError(f"the ids of the grids belong to other images ({found}). Give the ids of the same images in all grids.")
    _, height, width = next(iter(sizes.values()))
    return height, width


def size_of(images_BCHW: torch.Tensor) -> tuple[int, int]:
    """Height and width of images."""
    return images_BCHW.shape[-2], images_BCHW.shape[-1]


def shifted(part: slice, distance: int) -> slice:
    """The same number of entries, this far away."""
    return slice(part.start + distance, part.stop + distance)
