"""Draws a random subset of a stream of rows in bounded memory."""

import numpy as np
import torch

from vqmosaic.seeding import generator


class RandomSubset:
    """A uniformly random subset of `size` rows of a stream (reservoir sampling: Vitter 1985, algorithm R).

    The choice of rows depends on their positions in the stream and on `seed_parts`, not on the batches. If the stream has at most `size` rows, all
    rows are kept, in order.
    """

    def __init__(self, size: int, *seed_parts: int | str):
        self.size, self.count = size, 0
        self._rows: list[torch.Tensor] = []
        self._generator = generator("random subset", *seed_parts)

    def update(self, rows_BF: torch.Tensor) -> None:
        """Add the next rows (B, F) of the stream."""
        positions_B = np.arange(self.count, self.count + len(rows_BF))
        # row n goes to a random slot from 0 to n, and is dropped if the slot is not below `size`
        slots_B = np.where(positions_B < self.size, positions_B, (self._generator.random(len(rows_BF)) * (positions_B + 1)).astype(np.int64))
        for row_F, slot in zip(rows_BF, slots_B.tolist(), strict=True):
            if slot < self.size:
                self._rows[slot:slot + 1] = [row_F.clone()]  # a view would keep its whole batch
        self.count += len(rows_BF)

    def rows(self) -> torch.Tensor:
        """The kept rows (min(size, count), F)."""
        return torch.stack(self._rows)
