"""The order in which the tokens of an image are drawn, and how many of them each pass draws.

    raster      row by row
    random      another random order for each image
    spread      each token far from those before it
    confidence  the tokens that the prior is most certain of; known only while sampling

If a prior draws several grids, each order draws one grid after another.

In comments: B batch, T tokens, U unknown tokens. A place is the number of a token in raster order.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from token_shards.manifest import Grid
from vqmosaic.seeding import derive_seed, generator

SHARES = {"cosine": lambda progress: 1 - math.cos(math.pi / 2 * progress), "arccos": lambda progress: 1 - math.acos(progress) * 2 / math.pi,
          "linear": lambda progress: progress}
"""For each schedule, the share of the tokens that are drawn after a share of the passes."""


def tokens_per_pass(unknown: int, steps: int | None, schedule: str) -> list[int]:
    """The number of tokens that each pass draws, at least one. Without `steps`, or with more steps than tokens, each pass draws one token."""
    if steps is None or steps >= unknown:
        return [1] * unknown
    drawn = [0]
    for number in range(1, steps + 1):
        share = round(unknown * SHARES[schedule](number / steps))
        drawn.append(min(max(share, drawn[-1] + 1), unknown - (steps - number)))
    return [after - before for before, after in pairwise(drawn)]


def drawing_orders(order: str, grids: Sequence[Grid], seeds: Sequence[int]) -> np.ndarray:
    """All places (B, T) of each image in the order in which they are drawn. An image's order depends only on its seed. Grids follow each other."""
    parts, first = [], 0
    for number, grid in enumerate(grids):
        if order == "raster":
            parts.append(np.tile(np.arange(grid.num_tokens), (len(seeds), 1)) + first)
        else:
            keys_BT = np.stack([generator("drawing order", number, derive_seed("image order", seed)).random(grid.num_tokens) for seed in seeds])
            parts.append((spread_orders(grid, keys_BT) if order == "spread" else keys_BT.argsort(axis=1)) + first)
        first += grid.num_tokens
    return np.concatenate(parts, axis=1)


def spread_orders(grid: Grid, keys_BT: np.ndarray) -> np.ndarray:
    """Orders (B, T) in which each token is as far as possible from those before it. Random keys in [0, 1) choose among equal distances.

    Distances wrap around the edges of the grid. Otherwise edges and corners, which are far from everything, would come first. If a position has
    several tokens, the first ones of all positions precede the second ones.
    """
    rows, columns, _ = np.unravel_index(np.arange(grid.num_tokens), (grid.height, grid.width, grid.depth))
    levels = np.arange(grid.num_tokens) % grid.depth
    down, across = np.abs(rows[:, None] - rows), np.abs(columns[:, None] - columns)
    squared_TT = np.minimum(down, grid.height - down) ** 2 + np.minimum(across, grid.width - across) ** 2
    images = np.arange(len(keys_BT))
    orders_BT = np.empty(keys_BT.shape, dtype=np.int64)
    for level in range(grid.depth):
        # distances are integers, so a key below 1 only decides between equal ones
        nearest_BT = np.where(levels == level, grid.height**2 + grid.width**2, -np.inf) + keys_BT
        for number in range(level * grid.height * grid.width, (level + 1) * grid.height * grid.width):
            place_B = nearest_BT.argmax(axis=1)
            orders_BT[:, number] = place_B
            nearest_BT = np.minimum(nearest_BT, squared_TT[place_B] + keys_BT)
            nearest_BT[images, place_B] = -np.inf
    return orders_BT


def confidence_noise(seeds: Sequence[int], length: int) -> np.ndarray:
    """A random number (B, T) for each token with the standard Gumbel distribution. Those of an image depend only on its seed."""
    return np.stack([generator("confidence", derive_seed("image order", seed)).gumbel(size=length) for seed in seeds])
