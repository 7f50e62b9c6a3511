"""Reading token shards: any position of the training stream, or samples by number for validation, read from memory-mapped tar files."""

import functools
import hashlib
import mmap
import os
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
from vqmosaic.files.permissions import permission_denied
from vqmosaic.seeding import hashes

MOST_OPEN_MAPS = 256  # each holds a file descriptor, of which a process has 1,024 by default
REMEDY = "`vqmosaic audit --repair` rewrites what is damaged; tokens that were imported are imported again."


@dataclass(frozen=True)
class ShardIndex:
    """What a sidecar says about the n samples of one shard, as arrays."""

    labels_n: np.ndarray
    """int64; -1 where there is none."""
    indices_n: np.ndarray
    """int64; the source index of each sample."""
    first_ids_n: list[np.ndarray]
    """For each grid, int64: where the ids of each sample begin in the tar, counted in ids of the grid's dtype."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """What a read returns; B samples of T tokens."""

    ids_BT: np.ndarray
    """int64; the grids one after another in the manifest's order, each with its own ids 0 .. K-1."""
    labels_B: np.ndarray
    """int64; -1 where there is none."""
    epochs_B: np.ndarray
    """int64; the epoch of each position (0 for `samples` and `sequential`)."""
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
        views_B[chosen] = (hashes(samples_B[chosen], "view", seed, number) % np.uint64(num_views)).astype(np.int64)
    return (views_B + epochs_B) % num_views


class TokenShardReader:
    """Reads the complete folder of one split, in one thread at a time; `len(reader)` is the number of samples.

    The training stream is endless and its order is EpochOrder's. A caller asks for the positions it wants: step s takes
    [s*B, (s+1)*B) and each rank a slice of them, so ranks share nothing twice and leave nothing out, whatever their number,
    and a resumed run asks for the positions of its next step. Memory is that of the shards in use: a window of them, or two.
    """

    def __init__(self, folder: str | Path, seed: int = 0, window_shards: int = 16,
                 token_fingerprint: str | None = None, token_fingerprint_path: str | Path | None = None):
        """Open a folder: manifest, sizes and digests of the sidecars are checked; a shard's sidecar is understood, and its tar is mapped, when
        the shard is first read, so that a million samples open in a fraction of a second (tars are not hashed; audits do that).

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
        self.window_shards = window_shards
        self.order = EpochOrder([shard.count for shard in self.manifest.shards], self.seed, window_shards)
        self._starts_S = np.cumsum(self.order.counts_S) - self.order.counts_S
        self._steps_T = [np.arange(grid.num_tokens) for grid in self.manifest.grids]
        self._header_fingerprint = self.manifest.header.fingerprint
        self._indexes: OrderedDict = OrderedDict()
        self._maps: OrderedDict = OrderedDict()
        self._most_indexes = 2 * window_shards + 1
        self._most_maps = min(MOST_OPEN_MAPS, self._most_indexes)
        for entry in self.manifest.shards:
            self._check_shard(entry)
        self._read_index(0)  # all sidecars have the digest that the manifest was written with, so what one of them fits, all of them do

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getstate__(self):
        return self.__dict__ | {"_maps": OrderedDict()}  # a reader may be sent to a worker process; its maps may not

    @property
    def num_tokens(self) -> int:
        """Ids of one sample, T."""
        return self.manifest.num_tokens

    @property
    def labels_N(self) -> np.ndarray:
        """The label (N,) of every sample in stored order, int64, -1 where there is none; reads every sidecar once."""
        return self._labels_and_indices[0]

    @property
    def indices_N(self) -> np.ndarray:
        """The source index (N,) of every sample in stored order, int64; reads every sidecar once."""
        return self._labels_and_indices[1]

    @functools.cached_property
    def _labels_and_indices(self) -> tuple[np.ndarray, np.ndarray]:
        read = [(index.labels_n, index.indices_n) for index in map(self._read_index, range(len(self.manifest.shards)))]
        labels, indices = zip(*read, strict=True)
        return np.concatenate(labels), np.concatenate(indices)

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
        return self.samples(np.arange(start, stop, dtype=np.int64), view)

    def samples(self, numbers: Sequence[int] | np.ndarray, view: int = 0) -> TokenBatch:
        """The samples with these numbers in stored order, all in the same view. Raises ValueError for numbers out of range."""
        check_range("view", view, at_least=0, below=len(self.manifest.views))
        samples_B = np.asarray(numbers, dtype=np.int64)
        if len(samples_B):
            check_range("the smallest sample number", int(samples_B.min()), at_least=0)
            check_range("the largest sample number", int(samples_B.max()), below=len(self))
        shards_B = np.searchsorted(self._starts_S, samples_B, side="right") - 1
        return self._gather(shards_B, samples_B, np.zeros_like(samples_B), np.full_like(samples_B, view))

    def _gather(self, shards_B: np.ndarray, samples_B: np.ndarray, epochs_B: np.ndarray, views_B: np.ndarray) -> TokenBatch:
        grids, by_shard = self.manifest.grids, np.argsort(shards_B, kind="stable")
        ids_BT, labels_B = np.empty((len(shards_B), self.num_tokens), dtype=np.int64), np.empty(len(shards_B), dtype=np.int64)
        columns = np.cumsum([0, *(grid.num_tokens for grid in grids)]).tolist()
        for of_shard in np.split(by_shard, np.flatnonzero(np.diff(shards_B[by_shard])) + 1) if len(shards_B) else ():
            shard = int(shards_B[of_shard[0]])
            index, mapped = self._index(shard), self._mapped(shard)
            rows, views = samples_B[of_shard] - self._starts_S[shard], views_B[of_shard]
            labels_B[of_shard] = index.labels_n[rows]
            for number, grid in enumerate(grids):
                first = index.first_ids_n[number][rows] + views * grid.num_tokens
                ids_BT[of_shard, columns[number]:columns[number + 1]] = mapped[number][first[:, None] + self._steps_T[number]]
        for grid, (first, last) in zip(grids, pairwise(columns), strict=True):
            of_grid_BT = ids_BT[:, first:last]
            if of_grid_BT.size and (of_grid_BT.max() >= grid.codebook_size or of_grid_BT.min() < 0):
                wrong = int(np.flatnonzero(((of_grid_BT < 0) | (of_grid_BT >= grid.codebook_size)).any(axis=1))[0])
                self._refuse_ids(int(shards_B[wrong]), int(samples_B[wrong]), grid, of_grid_BT[wrong])
        return TokenBatch(ids_BT=ids_BT, labels_B=labels_B, epochs_B=epochs_B, samples_B=samples_B, views_B=views_B)

    def _mapped(self, shard: int) -> list[np.ndarray]:
        """The shard's whole tar as an array of each grid's dtype."""
        def make():
            with open(self.folder / self.manifest.shards[shard].name, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return [np.frombuffer(mapped, dtype=grid.dtype) for grid in self.manifest.grids]
        return recall(self._maps, shard, self._most_maps, make)

    def _check_shard(self, entry: ShardEntry) -> None:
        """Raise InputError unless a shard's tar has its size and its sidecar the bytes that the manifest was written with."""
        path, sidecar_file = self.folder / entry.name, sidecar_path(self.folder, entry.name)
        try:
            with open(path, "rb") as file:  # not path.stat, which works even if the file may not be read
                size = os.fstat(file.fileno()).st_size
        except PermissionError as error:
            raise permission_denied(path) from error
        except OSError:
            raise InputError(f"{path} is missing. {REMEDY}") from None
        if size != entry.size:
            raise InputError(f"{path} has {size} bytes; the manifest says {entry.size}. {REMEDY}")
        try:
            content = sidecar_file.read_bytes()
        except PermissionError as error:
            raise permission_denied(sidecar_file) from error
        except OSError:
            raise InputError(f"{sidecar_file} is missing. {REMEDY}") from None
        if hashlib.sha256(content).hexdigest() != entry.sidecar_sha256:
            self._checked_sidecar(entry, content)  # which says what it is that differs

    def _checked_sidecar(self, entry: ShardEntry, content: bytes) -> ShardSidecar:
        """The sidecar for its file's bytes. Raises InputError unless it is the one that the manifest was written with."""
        path = sidecar_path(self.folder, entry.name)
        sidecar = ShardSidecar.from_bytes(content, path)
        found = {"sha256": (sidecar.sha256, entry.sha256), "count": (sidecar.count, entry.count), "size": (sidecar.size, entry.size),
                 "header fingerprint": (sidecar.header_fingerprint, self._header_fingerprint),
                 "own digest": (hashlib.sha256(content).hexdigest(), entry.sidecar_sha256)}
        for what, (own, expected) in found.items():
            if own != expected:
                raise InputError(f"{path} disagrees with the manifest: its {what} is {own}, the manifest says {expected}. {REMEDY}")
        return sidecar

    def _index(self, shard: int) -> ShardIndex:
        """What a shard's sidecar says, kept while the shard is in use."""
        return recall(self._indexes, shard, self._most_indexes, lambda: self._read_index(shard))

    def _read_index(self, shard: int) -> ShardIndex:
        entry = self.manifest.shards[shard]
        path = sidecar_path(self.folder, entry.name)
        try:
            content = path.read_bytes()
        except PermissionError as error:
            raise permission_denied(path) from error
        except OSError:
            raise InputError(f"{path} is missing. {REMEDY}") from None
        sidecar = self._checked_sidecar(entry, content)
        first_ids_n = []
        for grid in self.manifest.grids:
            offsets_n = np.array(sidecar.offsets.get(grid.name, []), dtype=np.int64)
            last = entry.size - len(self.manifest.views) * grid.num_tokens * grid.dtype.itemsize
            if len(offsets_n) != entry.count or ((offsets_n < 0) | (offsets_n > last) | (offsets_n % grid.dtype.itemsize > 0)).any():
                raise InputError(f"{path}: its offsets of grid {grid.name!r} do not fit into {entry.name}. {REMEDY}")
            first_ids_n.append(offsets_n // grid.dtype.itemsize)
        labels_n = np.array([-1 if label is None else label for label in sidecar.labels], dtype=np.int64)
        return ShardIndex(labels_n, np.array(sidecar.indices, dtype=np.int64), first_ids_n)

    def _refuse_ids(self, shard: int, sample: int, grid: Grid, ids_T: np.ndarray) -> None:
        name = self.manifest.shards[shard].name
        key = ShardSidecar.load(self.folder, name).keys[sample - int(self._starts_S[shard])]
        raise InputError(f"{self.folder / name}, key {key}, grid {grid.name!r}: stored ids run from {ids_T.min()} to {ids_T.max()}; "
                         f"allowed: 0 to {grid.codebook_size - 1}. `vqmosaic audit {self.folder}` lists what is damaged.")
