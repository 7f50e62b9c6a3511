"""Reads token shards from memory-mapped tar files: any position of the training stream, or samples by number for validation."""

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
from token_shards.order import EpochOrder, get_or_make
from token_shards.sidecar import ShardSidecar, sidecar_path
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.permissions import permission_denied
from vqmosaic.seeding import hashes

MAX_OPEN_MAPS = 256  # each uses a file descriptor, and a process has 1,024 by default
REMEDY = "Run `vqmosaic audit --repair`, or import the tokens again if they were imported."


@dataclass(frozen=True)
class ShardIndex:
    """The content of a sidecar as arrays, for the n samples of one shard."""

    labels_n: np.ndarray
    """int64; -1 means no label."""
    indices_n: np.ndarray
    """int64; the source index of each sample."""
    first_ids_n: list[np.ndarray]
    """For each grid, int64: the offset of each sample's ids in the tar, in units of the grid's dtype."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """B samples of T tokens."""

    ids_BT: np.ndarray
    """int64; the grids concatenated in the manifest's order, each with its own ids 0 .. K-1."""
    labels_B: np.ndarray
    """int64; -1 means no label."""
    epochs_B: np.ndarray
    """int64; the epoch of each position (0 for `samples` and `sequential`)."""
    samples_B: np.ndarray
    """int64; the number of each sample in the split's stored order, the same in every epoch."""
    views_B: np.ndarray
    """int64; the number of the stored view that was read, 0 .. V-1."""


def stored_views(seed: int, epochs_B: np.ndarray, samples_B: np.ndarray, num_views: int) -> np.ndarray:
    """The number of the stored view (B,) of each sample in its epoch, a function of seed, epoch and sample.

    V epochs show all V views of a sample, starting at a random view. Each view is read equally often, and an epoch mixes the views.
    """
    views_B = np.zeros(len(samples_B), dtype=np.int64)
    if num_views == 1:
        return views_B
    rounds_B = epochs_B // num_views
    for number in np.unique(rounds_B).tolist():
        in_round = rounds_B == number
        views_B[in_round] = (hashes(samples_B[in_round], "view", seed, number) % np.uint64(num_views)).astype(np.int64)
    return (views_B + epochs_B) % num_views


class TokenShardReader:
    """Reads the complete folder of one split. Not thread-safe. `len(reader)` is the number of samples.

    The training stream is endless, and EpochOrder defines its order. The caller chooses the positions: step s reads [s*B, (s+1)*B), and each rank
    reads a slice of them. So for any number of ranks, each position is read exactly once, and a resumed run continues with the positions of its
    next step. Memory is needed only for the shards in use, one or two windows.
    """

    def __init__(self, folder: str | Path, seed: int = 0, window_shards: int = 16,
                 token_fingerprint: str | None = None, token_fingerprint_path: str | Path | None = None):
        """Open a folder and check its manifest, the sizes of the tars and the digests of the sidecars.

        A shard's sidecar is parsed and its tar is mapped when the shard is first read, so a million samples open in a fraction of a second. The tars
        are not hashed; `vqmosaic audit` does that. If `token_fingerprint` is given, the tokens must come from the tokenizer with this fingerprint, in
        the artefact at `token_fingerprint_path`.
        Raises InputError if the folder is incomplete, a shard is missing, truncated or from another set, or the token fingerprint differs.
        """
        self.folder = Path(folder)
        self.manifest = TokenShardManifest.load(self.folder)
        self.seed = int(seed)
        if token_fingerprint is not None:
            self.manifest.check_token_fingerprint(token_fingerprint, token_fingerprint_path or "the caller", self.folder)
        if self.manifest.num_samples == 0:
            raise InputError(f"{self.folder} contains no samples: all {self.manifest.num_sources} sources were skipped. "
                             f"See {MANIFEST_NAME} for the reasons.")
        self.window_shards = window_shards
        self.order = EpochOrder([shard.count for shard in self.manifest.shards], self.seed, window_shards)
        self._starts_S = np.cumsum(self.order.counts_S) - self.order.counts_S
        self._steps_T = [np.arange(grid.num_tokens) for grid in self.manifest.grids]
        self._header_fingerprint = self.manifest.header.fingerprint
        self._indexes: OrderedDict = OrderedDict()
        self._maps: OrderedDict = OrderedDict()
        self._most_indexes = 2 * window_shards + 1
        self._most_maps = min(MAX_OPEN_MAPS, self._most_indexes)
        for entry in self.manifest.shards:
            self._check_shard(entry)
        self._read_index(0)  # one is enough: all sidecars have the digests in the manifest, so if the header fingerprint fits one, it fits all

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getstate__(self):
        return self.__dict__ | {"_maps": OrderedDict()}  # readers are sent to worker processes, but maps cannot be pickled

    @property
    def num_tokens(self) -> int:
        """Number of ids of one sample, T."""
        return self.manifest.num_tokens

    @property
    def labels_N(self) -> np.ndarray:
        """The label (N,) of every sample in stored order, int64, -1 for no label. The first access reads every sidecar."""
        return self._labels_and_indices[0]

    @property
    def indices_N(self) -> np.ndarray:
        """The source index (N,) of every sample in stored order, int64. The first access reads every sidecar."""
        return self._labels_and_indices[1]

    @functools.cached_property
    def _labels_and_indices(self) -> tuple[np.ndarray, np.ndarray]:
        read = [(index.labels_n, index.indices_n) for index in map(self._read_index, range(len(self.manifest.shards)))]
        labels, indices = zip(*read, strict=True)
        return np.concatenate(labels), np.concatenate(indices)

    def read(self, positions: Sequence[int] | np.ndarray) -> TokenBatch:
        """The samples at these positions of the training stream, each in the view for its epoch.

        Raises ValueError for a negative position. Raises InputError, which names the shard and the key, if stored ids are out of range.
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
        for in_shard in np.split(by_shard, np.flatnonzero(np.diff(shards_B[by_shard])) + 1) if len(shards_B) else ():
            shard = int(shards_B[in_shard[0]])
            index, mapped = self._index(shard), self._mapped(shard)
            rows, views = samples_B[in_shard] - self._starts_S[shard], views_B[in_shard]
            labels_B[in_shard] = index.labels_n[rows]
            for number, grid in enumerate(grids):
                first = index.first_ids_n[number][rows] + views * grid.num_tokens
                ids_BT[in_shard, columns[number]:columns[number + 1]] = mapped[number][first[:, None] + self._steps_T[number]]
        for grid, (first, last) in zip(grids, pairwise(columns), strict=True):
            grid_ids_BT = ids_BT[:, first:last]
            if grid_ids_BT.size and (grid_ids_BT.max() >= grid.codebook_size or grid_ids_BT.min() < 0):
                bad = int(np.flatnonzero(((grid_ids_BT < 0) | (grid_ids_BT >= grid.codebook_size)).any(axis=1))[0])
                self._raise_bad_ids(int(shards_B[bad]), int(samples_B[bad]), grid, grid_ids_BT[bad])
        return TokenBatch(ids_BT=ids_BT, labels_B=labels_B, epochs_B=epochs_B, samples_B=samples_B, views_B=views_B)

    def _mapped(self, shard: int) -> list[np.ndarray]:
        """The whole tar of a shard, once for each grid, as an array of the grid's dtype."""
        def make():
            with open(self.folder / self.manifest.shards[shard].name, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return [np.frombuffer(mapped, dtype=grid.dtype) for grid in self.manifest.grids]
        return get_or_make(self._maps, shard, self._most_maps, make)

    def _check_shard(self, entry: ShardEntry) -> None:
        """Raise InputError unless a shard's tar has the size, and its sidecar the digest, that the manifest says."""
        path, sidecar_file = self.folder / entry.name, sidecar_path(self.folder, entry.name)
        try:
            with open(path, "rb") as file:  # not path.stat, which works even without permission to read the file
                size = os.fstat(file.fileno()).st_size
        except PermissionError as error:
            raise permission_denied(path) from error
        except OSError:
            raise InputError(f"{path} is missing. {REMEDY}") from None
        if size != entry.size:
            raise InputError(f"{path} has {size} bytes; the manifest says {entry.size}. {REMEDY}")
        content = _read_bytes(sidecar_file)
        if hashlib.sha256(content).hexdigest() != entry.sidecar_sha256:
            self._parse_sidecar(entry, content)  # raises the error that names the difference

    def _parse_sidecar(self, entry: ShardEntry, content: bytes) -> ShardSidecar:
        """The sidecar for the bytes of its file. Raises InputError unless it matches the manifest."""
        path = sidecar_path(self.folder, entry.name)
        sidecar = ShardSidecar.from_bytes(content, path)
        pairs = {"sha256": (sidecar.sha256, entry.sha256), "count": (sidecar.count, entry.count), "size": (sidecar.size, entry.size),
                 "header fingerprint": (sidecar.header_fingerprint, self._header_fingerprint),
                 "own digest": (hashlib.sha256(content).hexdigest(), entry.sidecar_sha256)}
        for field, (found, expected) in pairs.items():
            if found != expected:
                raise InputError(f"{path} does not match the manifest: its {field} is {found}, the manifest says {expected}. {REMEDY}")
        return sidecar

    def _index(self, shard: int) -> ShardIndex:
        """The index of a shard, cached while the shard is in use."""
        return get_or_make(self._indexes, shard, self._most_indexes, lambda: self._read_index(shard))

    def _read_index(self, shard: int) -> ShardIndex:
        entry = self.manifest.shards[shard]
        path = sidecar_path(self.folder, entry.name)
        sidecar = self._parse_sidecar(entry, _read_bytes(path))
        first_ids_n = []
        for grid in self.manifest.grids:
            offsets_n = np.array(sidecar.offsets.get(grid.name, []), dtype=np.int64)
            last = entry.size - len(self.manifest.views) * grid.num_tokens * grid.dtype.itemsize
            if len(offsets_n) != entry.count or ((offsets_n < 0) | (offsets_n > last) | (offsets_n % grid.dtype.itemsize > 0)).any():
                raise InputError(f"{path}: the offsets of grid {grid.name!r} do not fit {entry.name}. {REMEDY}")
            first_ids_n.append(offsets_n // grid.dtype.itemsize)
        labels_n = np.array([-1 if label is None else label for label in sidecar.labels], dtype=np.int64)
        return ShardIndex(labels_n, np.array(sidecar.indices, dtype=np.int64), first_ids_n)

    def _raise_bad_ids(self, shard: int, sample: int, grid: Grid, ids_T: np.ndarray) -> None:
        """Raise the InputError for stored ids that are out of range."""
        name = self.manifest.shards[shard].name
        key = ShardSidecar.load(self.folder, name).keys[sample - int(self._starts_S[shard])]
        raise InputError(f"{self.folder / name}, key {key}, grid {grid.name!r}: stored ids run from {ids_T.min()} to {ids_T.max()}; "
                         f"allowed: 0 to {grid.codebook_size - 1}. `vqmosaic audit {self.folder}` lists all damaged shards.")


def _read_bytes(path: Path) -> bytes:
    """The content of a sidecar. Raises InputError if it is missing or may not be read."""
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise permission_denied(path) from error
    except OSError:
        raise InputError(f"{path} is missing. {REMEDY}") from None
