"""The order of the training stream, as arithmetic: any position can be asked for, so a resumed run needs nothing but its step."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from vqmosaic.errors import check_range
from vqmosaic.seeding import hashes, permutation

KEPT_EPOCHS = 2
KEPT_WINDOWS = 4


@functools.lru_cache(maxsize=2)
def permuted_sources(num_sources: int, order_seed: int) -> np.ndarray:
    """The source indices (N,), int64, in the order in which they are cut into shards.

    Shards on disk depend on this order, so it must be the same in every version of this package and of numpy.
    """
    return np.argsort(hashes(np.arange(num_sources), "source order", order_seed), kind="stable")


def recall(kept: OrderedDict, key: Hashable, limit: int, make: Callable[[], Any]) -> Any:
    """kept[key], made where it is missing; of more than `limit` entries the one unused for longest is dropped."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > limit:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


class EpochOrder:
    """Maps positions of the endless training stream to samples.

    The stream is the concatenation of epochs of N samples: position p is the place p % N of epoch p // N. In epoch e the
    shards are permuted by f(seed, e) and cut into windows of at most `window_shards` shards, as even as can be; inside window
    w the samples are permuted by f(seed, e, w). So each epoch is a permutation, a reader has one window of shards (two where
    windows meet) in use at a time, and seeking costs the permutation of the windows it lands in. Only samples of
    the same window are shuffled together, so classes mix only if each shard holds a random part of the data set (`ShardSetHeader.order_seed`).
    """

    def __init__(self, counts_per_shard: Sequence[int], seed: int, window_shards: int):
        check_range("window_shards", window_shards, at_least=1)
        self.counts_S = np.asarray(counts_per_shard, dtype=np.int64)
        self.seed = int(seed)
        self.num_samples = int(self.counts_S.sum())
        shards = len(self.counts_S)
        windows = -(-shards // window_shards)
        self._window_borders = np.arange(windows + 1) * shards // max(windows, 1)  # counted in shards of the permuted order
        self._epochs: OrderedDict = OrderedDict()
        self._windows: OrderedDict = OrderedDict()

    def epochs_at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The epoch (B,) of each position. Raises ValueError for a negative position or an empty data set."""
        return self._split(positions)[0]

    def sample_at(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard (B,) and the row in the shard (B,) at each position. Raises as `epochs_at` does."""
        epochs_B, places_B = self._split(positions)
        shards_B, rows_B = np.empty_like(places_B), np.empty_like(places_B)
        for epoch in np.unique(epochs_B).tolist():
            of_epoch = np.flatnonzero(epochs_B == epoch)
            _, starts = self._epoch(epoch)
            windows = np.searchsorted(starts, places_B[of_epoch], side="right") - 1
            for window in np.unique(windows).tolist():
                chosen = of_epoch[windows == window]
                shards_of_window, rows_of_window = self._window(epoch, window)
                places = places_B[chosen] - starts[window]
                shards_B[chosen], rows_B[chosen] = shards_of_window[places], rows_of_window[places]
        return shards_B, rows_B

    def _split(self, positions) -> tuple[np.ndarray, np.ndarray]:
        positions_B = np.asarray(positions, dtype=np.int64)
        if self.num_samples == 0:
            raise ValueError("There are no samples to order.")
        if positions_B.size and positions_B.min() < 0:
            raise ValueError(f"A position in the training stream is {positions_B.min()}; the first is 0.")
        return np.divmod(positions_B, self.num_samples)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the epoch's order, and the place at which each window begins."""
        def make():
            order = permutation(len(self.counts_S), "shards", self.seed, epoch)
            shard_starts = np.concatenate([[0], np.cumsum(self.counts_S[order])])
            return order, shard_starts[self._window_borders[:-1]]
        return recall(self._epochs, epoch, KEPT_EPOCHS, make)

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The shard and the row at each place of the window."""
        def make():
            order, _ = self._epoch(epoch)
            shards = order[self._window_borders[window]:self._window_borders[window + 1]]
            counts = self.counts_S[shards]
            size = int(counts.sum())
            rows = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
            shuffled = permutation(size, "window", self.seed, epoch, window)
            return np.repeat(shards, counts)[shuffled], rows[shuffled]
        return recall(self._windows, (epoch, window), KEPT_WINDOWS, make)
