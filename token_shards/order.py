"""Computes the order of the training stream. Any position can be looked up, so a run needs only its step number to resume."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from vqmosaic.errors import check_range
from vqmosaic.seeding import hashes, permutation

MAX_CACHED_EPOCHS = 2
MAX_CACHED_WINDOWS = 4


@functools.lru_cache(maxsize=2)
def permuted_sources(num_sources: int, order_seed: int) -> np.ndarray:
    """The source indices (N,), int64, in the order in which they are divided into shards.

    Shards on disk depend on this order, so it must be the same in every version of this package and of numpy.
    """
    return np.argsort(hashes(np.arange(num_sources), "source order", order_seed), kind="stable")


def get_or_make(cache: OrderedDict, key: Hashable, limit: int, make: Callable[[], Any]) -> Any:
    """cache[key], created by `make` if it is missing. Removes the least recently used entry if the cache exceeds `limit` entries."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


class EpochOrder:
    """Maps positions of the endless training stream to samples.

    The stream is the concatenation of epochs of N samples: position p is offset p % N in epoch p // N. In epoch e, the shards are permuted by
    f(seed, e) and divided into windows of at most `window_shards` shards, as evenly as possible. In window w, the samples are permuted by
    f(seed, e, w). Therefore each epoch is a permutation of all samples, a reader uses one window of shards at a time (two at a window boundary), and
    a seek computes only the permutations of the windows that it reads. Only samples of the same window are shuffled together, so classes mix only
    if each shard holds a random part of the data set (`ShardSetHeader.order_seed`).
    """

    def __init__(self, counts_per_shard: Sequence[int], seed: int, window_shards: int):
        check_range("window_shards", window_shards, at_least=1)
        self.counts_S = np.asarray(counts_per_shard, dtype=np.int64)
        self.seed = int(seed)
        self.num_samples = int(self.counts_S.sum())
        shards = len(self.counts_S)
        windows = -(-shards // window_shards)
        self._window_borders = np.arange(windows + 1) * shards // max(windows, 1)  # in shards of the permuted order
        self._epochs: OrderedDict = OrderedDict()
        self._windows: OrderedDict = OrderedDict()

    def epochs_at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The epoch (B,) of each position. Raises ValueError for a negative position or an empty data set."""
        return self._split(positions)[0]

    def sample_at(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard (B,) and the row in the shard (B,) at each position. Raises the same errors as `epochs_at`."""
        epochs_B, offsets_B = self._split(positions)
        shards_B, rows_B = np.empty_like(offsets_B), np.empty_like(offsets_B)
        for epoch in np.unique(epochs_B).tolist():
            in_epoch = np.flatnonzero(epochs_B == epoch)
            _, starts = self._epoch(epoch)
            windows = np.searchsorted(starts, offsets_B[in_epoch], side="right") - 1
            for window in np.unique(windows).tolist():
                in_window = in_epoch[windows == window]
                window_shards, window_rows = self._window(epoch, window)
                offsets = offsets_B[in_window] - starts[window]
                shards_B[in_window], rows_B[in_window] = window_shards[offsets], window_rows[offsets]
        return shards_B, rows_B

    def _split(self, positions) -> tuple[np.ndarray, np.ndarray]:
        """The epoch (B,) and the offset in the epoch (B,) of each position."""
        positions_B = np.asarray(positions, dtype=np.int64)
        if self.num_samples == 0:
            raise ValueError("The data set has no samples.")
        if positions_B.size and positions_B.min() < 0:
            raise ValueError(f"A position in the training stream is {positions_B.min()}; it must be at least 0.")
        return np.divmod(positions_B, self.num_samples)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of the epoch, and the offset at which each window begins."""
        def make():
            order = permutation(len(self.counts_S), "shards", self.seed, epoch)
            shard_starts = np.concatenate([[0], np.cumsum(self.counts_S[order])])
            return order, shard_starts[self._window_borders[:-1]]
        return get_or_make(self._epochs, epoch, MAX_CACHED_EPOCHS, make)

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The shard and the row at each offset in the window."""
        def make():
            order, _ = self._epoch(epoch)
            shards = order[self._window_borders[window]:self._window_borders[window + 1]]
            counts = self.counts_S[shards]
            size = int(counts.sum())
            rows = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
            shuffled = permutation(size, "window", self.seed, epoch, window)
            return np.repeat(shards, counts)[shuffled], rows[shuffled]
        return get_or_make(self._windows, (epoch, window), MAX_CACHED_WINDOWS, make)
