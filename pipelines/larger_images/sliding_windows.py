"""Draws the tokens of an image that is larger than the training images: one window of the training size after another.

Each window keeps the tokens that earlier windows have drawn and draws the others. It is drawn like an image whose tokens are partly known, so all
sampling settings, orders and chains of priors work. Taming-transformers (Esser et al. 2021) moves its window by one token. Here, a window overlaps
the one before it by a share of its size.

In comments and names: B images, T tokens of all grids of a window, G tokens of a condition in a window.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from stage1_tokenizer.tiles.tiling import Place, Tiling
from stage1_tokenizer.tokenizer_protocol import Ids
from stage2_prior.generation.passes import UNKNOWN
from token_shards.manifest import Grid, grid_columns
from vqmosaic.seeding import derive_seed

Report = Callable[[int, int], bool | None]
"""A callback (done, total) with numbers of tokens. If it returns False, sampling stops."""


class LargerTokens:
    """The tokens of larger images: of each grid (B, h, w, depth), by name. UNKNOWN is a token to draw."""

    def __init__(self, tiling: Tiling, grids: Sequence[Grid], images: int, device: torch.device, ids_BT: torch.Tensor | None = None):
        """`grids` are those of a window. `ids_BT` are the tokens of all grids of the whole images. None: all are UNKNOWN."""
        whole = {grid.name: grid for grid in tiling.image_grids}
        larger = [whole[grid.name] for grid in grids]
        if ids_BT is None:
            ids_BT = torch.full((images, sum(grid.num_tokens for grid in larger)), UNKNOWN)
        self.tiling, self.grids = tiling, list(grids)
        self.ids = {grid.name: ids_BT[:, columns].reshape(-1, grid.height, grid.width, grid.depth).to(device, copy=True)
                    for grid, columns in zip(larger, grid_columns(larger).values(), strict=True)}

    def window(self, place: Place) -> torch.Tensor:
        """The tokens (B, T) of a window."""
        return torch.cat([self.ids[grid.name][(slice(None), *self.tiling.tokens(grid, place))].flatten(1) for grid in self.grids], dim=1)

    def set_window(self, place: Place, ids_BT: torch.Tensor) -> None:
        """Replace the tokens of a window."""
        for grid, columns in zip(self.grids, grid_columns(self.grids).values(), strict=True):
            shape = (-1, grid.height, grid.width, grid.depth)
            self.ids[grid.name][(slice(None), *self.tiling.tokens(grid, place))] = ids_BT[:, columns].reshape(shape)

    def public(self) -> Ids:
        """The ids in the form of `Tokenizer.encode`."""
        ids = {grid.name: self.ids[grid.name][..., 0] if grid.depth == 1 else self.ids[grid.name] for grid in self.grids}
        return ids if len(ids) > 1 else next(iter(ids.values()))


def sample_windows(tokens: LargerTokens, seeds: Sequence[int], draw: Callable[[Place, list[int], torch.Tensor, Report | None], torch.Tensor],
                   callback: Report | None = None) -> None:
    """Draw all unknown tokens of larger images, window by window.

    Args:
        tokens: the images, with the known tokens. They are completed in place.
        seeds: the seed of each image. The first window has this seed, so the upper left corner has the tokens of an image of the training size.
        draw: returns the tokens (B, T) of the window at a place, for the seed of each image and the known tokens (B, T), UNKNOWN where to draw.
        callback: see Report.
    """
    places = tokens.tiling.places
    for number, place in enumerate(places):
        known_BT = tokens.window(place)
        before, total = number * known_BT.shape[1], len(places) * known_BT.shape[1]

        def report(done: int, _: int, before: int = before, total: int = total) -> bool | None:
            assert callback is not None  # otherwise this function is not passed on
            return callback(before + done, total)

        if bool((known_BT == UNKNOWN).any()):
            own_seeds = list(seeds) if number == 0 else [derive_seed("window", *place, seed) for seed in seeds]
            tokens.set_window(place, draw(place, own_seeds, known_BT, report if callback is not None else None))


def given_in_window(given: Mapping[str, torch.Tensor], tiling: Tiling, place: Place) -> dict[str, torch.Tensor]:
    """The ids (B, G) of the conditions of a window: the part of images that lies in it, and texts as they are."""
    grids = {grid.name: grid for grid in tiling.grids}
    return {name: LargerTokens(tiling, [grids[name]], len(ids_Bn), ids_Bn.device, ids_Bn).window(place) if name in grids else ids_Bn
            for name, ids_Bn in given.items()}


def ids_of_first_window(ids: Ids, grids: Sequence[Grid]) -> Ids:
    """The ids of the upper left window of images of any size, in the form of `Tokenizer.encode`. `grids` are those of a window."""
    if isinstance(ids, dict):
        return {grid.name: ids[grid.name][:, :grid.height, :grid.width] for grid in grids}
    return ids[:, :grids[0].height, :grids[0].width]
