"""Reading token shards: any position of the training stream, or stored order for validation, straight from mapped tar files."""

import hashlib
import mmap
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from token_shards.manifest import MANIFEST_NAME, Grid, ShardEntry, TokenShardManifest
from token_shards.order import EpochOrder, recall
from token_shards.sidecar import ShardSidecar, sidecar_path
from vqmosaic.errors import InputError, check_range
from vqmosaic.seeding import derive_seed

MOST_OPEN_MAPS = 256  # each holds a file descriptor, of which a process has 1,024 by default


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """What a read returns; B samples of T tokens."""

    ids_BT: np.ndarray
    """int64; the grids one after another in the manifest's order, each with its own ids 0 .. K-1."""
    labels_B: np.ndarray
    """int64; -1 where there is none."""
    epochs_B: np.ndarray
    """int64; the epoch of each position (0 for `sequential`)."""
    samples_B: np.ndarray
    """int64; the number of the sample in the split's stored order, the same in every epoch."""
    views_B: np.ndarray
    """int64; which of the V stored views was read."""


def stored_views(seed: int, epochs_B: np.ndarray, samples_B: np.ndarray, num_views: int) -> np.ndarray:
    """The stored view (B,) of each sample in its epoch, a function of seed, epoch and sample.

    A sample goes through all V views in V epochs, beginning anywhere: each is seen equally often, and an epoch mixes them.
    """
    views_B = np.zeros(len(samples_B), dtype=np.int64)
    if num_views == 1:
        return views_B
    rounds_B = epochs_B // num_views
    for number in np.unique(rounds_B).tolist():
        chosen = rounds_B == number
        # the finalizer of splitmix64 (Steele et al. 2014): a hash of the sample number for a whole batch at once
        hashed = samples_B[chosen].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive_seed("view", seed, number))
        hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashed ^= hashed >> np.uint64(31)
        views_B[chosen] = (hashed % np.uint64(num_views)).astype(np.int64)
    return (views_B + epochs_B) % num_views


class TokenShardReader:
    """Reads the complete folder of one split, in one thread at a time; `len(reader)` is the number of samples.

    The training stream is endless and its order is EpochOrder's. A caller asks for the positions it wants: step s takes
    [s*B, (s+1)*B) and each rank a slice of them, so ranks share nothing twice and leave nothing out, whatever their number,
    and a resumed run asks for the positions of its next step.
    """

    def __init__(self, folder: str | Path, seed: int = 0, window_shards: int = 16,
                 token_fingerprint: str | None = None, token_fingerprint_path: str | Path | None = None):
        """Open a folder: manifest, sizes and sidecars are checked, tars are mapped when they are first read (not hashed; audits do that).

        `token_fingerprint`, of the artefact at `token_fingerprint_path`, is what the tokens must have been made by, if given.
        Raises InputError for an incomplete folder, a shard that is missing, cut off or foreign, or another token fingerprint.
        """
        self.folder = Path(folder)
        self.manifest = TokenShardManifest.load(self.folder)
        self.seed = int(seed)
        if token_fingerprint is not None:
            self.manifest.check_token_fingerprint(token_fingerprint, token_fingerprint_path or "the caller", self.folder)
        if self.manifest.num_samples == 0:
            raise InputError(f"{self.folder} holds no samples: all {self.manifest.num_sources} sources were skipped; "
                             f"{MANIFEST_NAME} says why.")
        self.order = EpochOrder([shard.count for shard in self.manifest.shards], self.seed, window_shards)
        self._starts_S = np.cumsum(self.order.counts_S) - self.order.counts_S
        header_fingerprint = self.manifest.header.fingerprint
        sidecars = [self._checked_sidecar(entry, header_fingerprint) for entry in self.manifest.shards]
        self.labels_N = np.array([-1 if label is None else label for labels, _ in sidecars for label in labels], dtype=np.int64)
        self._first_ids_N = {grid.name: np.concatenate([offsets[grid.name] for _, offsets in sidecars]) // grid.dtype.itemsize
                             for grid in self.manifest.grids}
        self._maps: OrderedDict = OrderedDict()
        self._most_maps = min(MOST_OPEN_MAPS, 2 * window_shards + 1)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getstate__(self):
        return self.__dict__ | {"_maps": OrderedDict()}  # a reader may be sent to a worker process; its maps may not

    @property
    def num_tokens(self) -> int:
        """Ids of one sample, T."""
        return self.manifest.num_tokens

    def read(self, positions: Sequence[int] | np.ndarray) -> TokenBatch:
        """The samples at these positions of the training stream, each in the view of its epoch.

        Raises ValueError for a negative position and InputError, naming shard and key, for stored ids that are out of range.
        """
        epochs_B = self.order.epochs_at(positions)
        shards_B, rows_B = self.order.sample_at(positions)
        samples_B = self._starts_S[shards_B] + rows_B
        return self._gather(shards_B, samples_B, epochs_B, stored_views(self.seed, epochs_B, samples_B, len(self.manifest.views)))

    def sequential(self, start: int, stop: int, view: int = 0) -> TokenBatch:
        """The samples start .. stop - 1 in stored order, all in the same view. Raises ValueError for numbers out of range."""
        check_range("start", start, at_least=0, at_most=len(self))
        check_range("stop", stop, at_least=start, at_most=len(self))
        check_range("view", view, at_least=0, below=len(self.manifest.views))
        samples_B = np.arange(start, stop, dtype=np.int64)
        shards_B = np.searchsorted(self._starts_S, samples_B, side="right") - 1
        return self._gather(shards_B, samples_B, np.zeros_like(samples_B), np.full_like(samples_B, view))

    def _gather(self, shards_B: np.ndarray, samples_B: np.ndarray, epochs_B: np.ndarray, views_B: np.ndarray) -> TokenBatch:
        by_shard = np.argsort(shards_B, kind="stable")
        sorted_shards = shards_B[by_shard]
        borders = [0, *(np.flatnonzero(np.diff(sorted_shards)) + 1).tolist(), len(sorted_shards)] if len(sorted_shards) else [0]
        sorted_ids_BT = np.empty((len(sorted_shards), self.num_tokens), dtype=np.int64)
        column = 0
        for number, grid in enumerate(self.manifest.grids):
            first_B = self._first_ids_N[grid.name][samples_B] + views_B * grid.num_tokens
            places_BT = first_B[by_shard, None] + np.arange(grid.num_tokens)
            ids_BT = sorted_ids_BT[:, column:column + grid.num_tokens]
            for begin, end in pairwise(borders):
                ids_BT[begin:end] = self._mapped(int(sorted_shards[begin]))[number][places_BT[begin:end]]
            if ids_BT.size and (ids_BT.max() >= grid.codebook_size or ids_BT.min() < 0):
                wrong = int(np.flatnonzero(((ids_BT < 0) | (ids_BT >= grid.codebook_size)).any(axis=1))[0])
                self._refuse_ids(int(sorted_shards[wrong]), int(samples_B[by_shard[wrong]]), grid, ids_BT[wrong])
            column += grid.num_tokens
        ids_BT = np.empty_like(sorted_ids_BT)
        ids_BT[by_shard] = sorted_ids_BT
        return TokenBatch(ids_BT=ids_BT, labels_B=self.labels_N[samples_B], epochs_B=epochs_B, samples_B=samples_B, views_B=views_B)

    def _mapped(self, shard: int) -> list[np.ndarray]:
        """The shard's whole tar as an array of each grid's dtype."""
        def make():
            with open(self.folder / self.manifest.shards[shard].name, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return [np.frombuffer(mapped, dtype=grid.dtype) for grid in self.manifest.grids]
        return recall(self._maps, shard, self._most_maps, make)

    def _checked_sidecar(self, entry: ShardEntry, header_fingerprint: str) -> tuple[list[int | None], dict[str, np.ndarray]]:
        """The labels of a shard and, for each grid, the bytes at which its samples begin."""
        path, remedy = self.folder / entry.name, "Run `vqmosaic preprocess` again; it rewrites what is damaged."
        if not path.is_file():
            raise InputError(f"{path} is missing. {remedy}")
        size = path.stat().st_size
        if size != entry.size:
            raise InputError(f"{path} has {size} bytes; the manifest says {entry.size}. {remedy}")
        sidecar_file = sidecar_path(self.folder, entry.name)
        if not sidecar_file.is_file():
            raise InputError(f"{sidecar_file} is missing. {remedy}")
        content = sidecar_file.read_bytes()
        sidecar = ShardSidecar.from_bytes(content, sidecar_file)
        found = {"sha256": (sidecar.sha256, entry.sha256), "count": (sidecar.count, entry.count), "size": (sidecar.size, entry.size),
                 "header fingerprint": (sidecar.header_fingerprint, header_fingerprint),
                 "own digest": (hashlib.sha256(content).hexdigest(), entry.sidecar_sha256)}
        for what, (own, expected) in found.items():
            if own != expected:
                raise InputError(f"{sidecar_file} disagrees with the manifest: its {what} is {own}, the manifest says {expected}. {remedy}")
        offsets = {}
        for grid in self.manifest.grids:
            offsets_N = offsets[grid.name] = np.array(sidecar.offsets.get(grid.name, []), dtype=np.int64)
            last = size - len(self.manifest.views) * grid.num_tokens * grid.dtype.itemsize
            if len(offsets_N) != entry.count or ((offsets_N < 0) | (offsets_N > last) | (offsets_N % grid.dtype.itemsize > 0)).any():
                raise InputError(f"{sidecar_file}: its offsets of grid {grid.name!r} do not fit into {entry.name}. {remedy}")
        return sidecar.labels, offsets

    def _refuse_ids(self, shard: int, sample: int, grid: Grid, ids_T: np.ndarray) -> None:
        name = self.manifest.shards[shard].name
        key = ShardSidecar.load(self.folder, name).keys[sample - int(self._starts_S[shard])]
        raise InputError(f"{self.folder / name}, key {key}, grid {grid.name!r}: stored ids run from {ids_T.min()} to {ids_T.max()}; "
                         f"allowed: 0 to {grid.codebook_size - 1}. `vqmosaic audit {self.folder}` lists what is damaged.")
