"""Writes token shards. Shards appear atomically, their bytes do not depend on which process writes them, and the manifest is written last."""

import dataclasses
import functools
import hashlib
import io
import json
import operator
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from token_shards.manifest import MANIFEST_NAME, Grid, ShardEntry, ShardSetHeader, TokenShardManifest, shard_name
from token_shards.sidecar import ShardSidecar, sidecar_path, source_line, unlisted_files
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import publish, sha256_of_file, temporary_sibling
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.files.permissions import PermissionDenied, check_readable

WRITE_BUFFER_BYTES = 2**20  # each write call releases the GIL to the decoding threads and then waits to get it back


def default_key(index: int) -> str:
    """The key of a source, such as 000000017. Keys sort like indices and contain no dots."""
    return f"{index:09d}"


class DigestMismatch(InputError):
    """A shard that was encoded again has other bytes than the original. The original was not replaced."""


class ShardInProgress:
    """A shard that is being written. Add or skip each of its sources. Sources must be added in index order."""

    def __init__(self, tar: tarfile.TarFile, header: ShardSetHeader, name: str, sources: Sequence[int]):
        self._tar, self._header, self.name, self._indices = tar, header, name, frozenset(sources)
        self.keys: list[str] = []
        self.indices: list[int] = []
        self.labels: list[int | None] = []
        self.sources: list[str] = []
        self.offsets: dict[str, list[int]] = {grid.name: [] for grid in header.grids}
        self._skipped: dict[int, dict] = {}
        self._seen_keys: set[str] = set()

    def add(self, *, index: int, key: str, source: str, label: int | None = None, ids: dict[str, np.ndarray]) -> None:
        """Store one image. `ids` maps each grid name to integers (V, T). Raises ValueError or TypeError for invalid arguments."""
        index = self._check_index(index)
        if self.indices and index <= self.indices[-1]:
            raise ValueError(f"{self.name}: source index {index} was added after {self.indices[-1]}; add sources in ascending order, "
                             "so that the bytes do not depend on the writer.")
        self._check_key(key)
        label = self._check_label(index, label)
        if not isinstance(source, str):
            raise TypeError(f"{self.name}, key {key}: source is {source!r}; expected a string, such as a file name or row number.")
        if ids.keys() != self.offsets.keys():
            raise ValueError(f"{self.name}, key {key}: ids are given for the grids {sorted(ids)}; expected {sorted(self.offsets)}.")
        checked = {grid.name: self._checked_ids(key, grid, ids[grid.name]) for grid in self._header.grids}  # check all grids before writing
        for grid_name, ids_VT in checked.items():
            header = _npy_header(ids_VT.dtype, ids_VT.shape)
            start = self._add_member(f"{key}.{grid_name}.npy", header + ids_VT.tobytes())
            self.offsets[grid_name].append(start + len(header))
        record = {"index": index, "label": label, "source": source, "views": len(self._header.views)}
        self._add_member(f"{key}.json", json.dumps(record).encode())
        self._seen_keys.add(key)
        self.keys.append(key)
        self.indices.append(index)
        self.labels.append(label)
        self.sources.append(source)

    def skip(self, *, index: int, source: str, reason: str) -> None:
        """Record that a source is not stored, and why. Raises ValueError if the index is not in this shard or was added or skipped already."""
        index = self._check_index(index)
        self._skipped[index] = {"index": index, "source": source, "reason": reason}

    @property
    def skipped(self) -> list[dict]:
        """The skipped sources so far, in index order."""
        return [self._skipped[index] for index in sorted(self._skipped)]

    def check_complete(self) -> None:
        """Raise ValueError unless each source of the shard was added or skipped."""
        missing = sorted(self._indices.difference(self.indices, self._skipped))
        if missing:
            raise ValueError(f"{self.name}: {len(missing)} of {len(self._indices)} source indices were neither added nor skipped; "
                             f"the first is {missing[0]}.")

    def _check_index(self, index: int) -> int:
        index = operator.index(index)
        if index not in self._indices:
            raise ValueError(f"{self.name}: source index {index} belongs to another shard; see `ShardSetHeader.source_indices`.")
        if index in self._skipped or (self.indices and index <= self.indices[-1] and index in self.indices):
            raise ValueError(f"{self.name}: source index {index} was added or skipped already; each index must come exactly once.")
        return index

    def _check_key(self, key: str) -> None:
        # a dot would end the key, a slash would make a folder, webdataset skips __x__ as metadata, and USTAR names have at most 100 characters
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", key):
            raise ValueError(f"{self.name}: key is {key!r}; allowed: at most 64 letters, digits, '-' and '_', "
                             "starting with a letter or digit.")
        if key in self._seen_keys:
            raise ValueError(f"{self.name}: key {key!r} was added already; keys must be unique.")

    def _check_label(self, index: int, label: int | None) -> int | None:
        if label is None:
            return None
        label, names = operator.index(label), self._header.class_names
        if names is None or not 0 <= label < len(names):
            allowed = "None, because the header has no class_names" if names is None else f"0 to {len(names) - 1}, or None"
            raise ValueError(f"{self.name}: the label of source index {index} is {label}; allowed: {allowed}.")
        return label

    def _checked_ids(self, key: str, grid: Grid, ids_VT: np.ndarray) -> np.ndarray:
        ids_VT = np.asarray(ids_VT)
        where, expected = f"{self.name}, key {key}, grid {grid.name!r}", (len(self._header.views), grid.num_tokens)
        if ids_VT.shape != expected:
            raise ValueError(f"{where}: the ids have the shape {ids_VT.shape}; expected {expected} (views, tokens).")
        if ids_VT.dtype.kind not in "iu":
            raise ValueError(f"{where}: the ids are {ids_VT.dtype}; expected integers.")
        low, high = int(ids_VT.min()), int(ids_VT.max())
        if low < 0 or high >= grid.codebook_size:
            raise ValueError(f"{where}: the ids run from {low} to {high}; allowed: 0 to {grid.codebook_size - 1}.")
        return np.ascontiguousarray(ids_VT, dtype=grid.dtype)

    def _add_member(self, name: str, content: bytes) -> int:
        """Add a file to the tar. Returns the byte offset of its content in the tar."""
        start = self._tar.offset + tarfile.BLOCKSIZE
        block = _tar_header(name, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
        self._tar.fileobj.write(block)
        self._tar.offset += len(block)
        return start


# Building the headers with tarfile and numpy took longer than the rest of the work on a sample. Between samples, the headers differ only in the name
# and its contribution to the checksum. So each header is built once by the library and then reused.

@functools.cache
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The npy header of an array in C order."""
    buffer = io.BytesIO()
    array = np.zeros(shape, dtype)
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()[:-array.nbytes]


def _tar_header(name: str, size: int) -> bytes:
    """The USTAR header of a member. The name must be ASCII with at most 100 characters."""
    sum_without_name, after_name, after_sum = _tar_header_parts(size)
    encoded = name.encode("ascii")
    return encoded.ljust(100, b"\0") + after_name + b"%06o" % (sum_without_name + sum(encoded)) + after_sum


@functools.lru_cache(maxsize=4096)
def _tar_header_parts(size: int) -> tuple[int, bytes, bytes]:
    """The checksum of the header without the name, the bytes between the name and the checksum, and the bytes after the checksum's digits."""
    member = tarfile.TarInfo("")  # mtime 0, uid and gid 0, mode 0644, no user names: independent of the machine and the time
    member.size = size
    header = member.tobuf(tarfile.USTAR_FORMAT)
    return int(header[148:154], 8), header[100:148], header[154:]


def headers_in_stored_order(headers: Mapping[Path, ShardSetHeader]) -> dict[Path, ShardSetHeader]:
    """Folder -> header, with the source order of the shards that are already in the folders.

    Shard sets written by version 0.1.0 are not permuted, so their missing or damaged shards must be written in the same order. All splits of a data
    set have the same order, so one split determines the order of the others. If there are no shards yet, the headers are unchanged.
    """
    permuted = unpermuted = 0
    for folder, header in headers.items():
        check_readable(folder)  # otherwise, sidecars without read permission would count as missing
        in_index_order = dataclasses.replace(header, order_seed=None)
        fingerprints = (header.fingerprint, in_index_order.fingerprint)
        for name in map(shard_name, range(header.num_shards)):
            with suppress(InputError):
                found = ShardSidecar.load(folder, name).header_fingerprint
                permuted, unpermuted = permuted + (found == fingerprints[0]), unpermuted + (found == fingerprints[1])
        with suppress(InputError):
            seed = TokenShardManifest.load(folder).order_seed
            permuted, unpermuted = permuted + (seed == header.order_seed), unpermuted + (seed is None)
    return {folder: dataclasses.replace(header, order_seed=None) if unpermuted > permuted else header for folder, header in headers.items()}


class TokenShardWriter:
    """Writes the shards of one folder. Several processes can write different shards of the folder at the same time::

        writer = TokenShardWriter("tokens/train", header)
        for s in range(rank, writer.num_shards, ranks):
            if not writer.is_complete(s):
                with writer.shard(s) as shard:
                    for index in header.source_indices(s): shard.add(...) or shard.skip(...)
        # wait for all ranks; then one rank calls:
        manifest = writer.finish()

    A folder without a manifest is incomplete.
    """

    def __init__(self, folder: str | Path, header: ShardSetHeader):
        self.folder = Path(folder)
        self.header = header
        self._header_fingerprint = header.fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return self.header.num_shards

    def is_complete(self, shard_index: int) -> bool:
        """True if the shard was written for this header and its tar has the size and digest that its sidecar says."""
        return self.incompleteness(shard_index) is None

    def incompleteness(self, shard_index: int) -> str | None:
        """A sentence that says why a shard is not complete, or None if it is complete."""
        name = shard_name(shard_index)
        path = self.folder / name
        try:
            sidecar = ShardSidecar.load(self.folder, name)
        except PermissionDenied:  # the shard may be complete
            raise
        except InputError as error:
            return str(error)
        if sidecar.header_fingerprint != self._header_fingerprint:
            return f"{path} was written with other settings or another tokenizer."
        if not path.is_file():
            return f"{path} is missing."
        if path.stat().st_size != sidecar.size or sha256_of_file(path) != sidecar.sha256:
            return f"{path} does not match its sidecar."
        return None

    @contextmanager
    def shard(self, shard_index: int, allowed_sha256: Collection[str] | None = None, keep_manifest: bool = False) -> Iterator[ShardInProgress]:
        """A new shard, to which the block adds sources. It is published when the block ends, but not if the block raises or the process dies.

        Publishing a shard deletes the manifest, which no longer describes the folder. `keep_manifest` keeps it, for repairs that restore the shards
        that it lists. Raises ValueError if a source of the shard was neither added nor skipped. Raises DigestMismatch if `allowed_sha256` is given
        and does not contain the digest of the new tar.
        """
        if not 0 <= shard_index < self.num_shards:
            raise ValueError(f"shard_index is {shard_index}; allowed: 0 to {self.num_shards - 1}.")
        path = self.folder / shard_name(shard_index)
        partial = temporary_sibling(path)
        try:
            with explain_full_disk(self.folder, lambda: self._expected_bytes(shard_index)), \
                    open(partial, "wb", buffering=WRITE_BUFFER_BYTES) as file, \
                    tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                shard = ShardInProgress(tar, self.header, path.name, self.header.source_indices(shard_index))
                yield shard
                shard.check_complete()
            digest = sha256_of_file(partial)
            if allowed_sha256 is not None and digest not in allowed_sha256:
                raise DigestMismatch(f"{path}: re-encoding gave a different file: its sha256 is {digest}, but the original had "
                                     f"{' or '.join(sorted(allowed_sha256))}. An image has changed, or this processor or torch version rounds "
                                     "differently. The shard was not replaced. Repair it on the machine that wrote it, or write all shards again "
                                     "with `vqmosaic preprocess --redo tokens`.")
            sidecar = ShardSidecar(shard=path.name, count=len(shard.keys), size=partial.stat().st_size, sha256=digest,
                                   header_fingerprint=self._header_fingerprint, skipped=shard.skipped, keys=shard.keys,
                                   indices=shard.indices, labels=shard.labels, sources=shard.sources, offsets=shard.offsets)
            if not keep_manifest:
                (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
            publish(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sidecar.save(self.folder)

    def _expected_bytes(self, shard_index: int) -> int:
        """Approximate size of a shard in bytes: for each sample, the ids and two header blocks of each grid, and two blocks for the json."""
        ids = sum(len(self.header.views) * grid.num_tokens * grid.dtype.itemsize + 2 * tarfile.BLOCKSIZE for grid in self.header.grids)
        return len(self.header.source_range(shard_index)) * (ids + 2 * tarfile.BLOCKSIZE) + tarfile.RECORDSIZE

    def finish(self) -> TokenShardManifest:
        """Check that every shard is complete, write the manifest and return it. Call it once, when all ranks are done.

        Removes partial files and shards of an earlier, longer set. Raises InputError if shards are unfinished.
        """
        unfinished = [reason for index in range(self.num_shards) if (reason := self.incompleteness(index))]
        if unfinished:
            raise InputError(f"{len(unfinished)} of {self.num_shards} shards in {self.folder} are not finished. The first: {unfinished[0]}")
        for name in self.strays():
            (self.folder / name).unlink()
        digest, skipped, entries = hashlib.sha256(), [], []
        keys: set[str] = set()
        for index in range(self.num_shards):
            sidecar = ShardSidecar.load(self.folder, shard_name(index))
            repeated = keys.intersection(sidecar.keys)
            if repeated:
                raise ValueError(f"{sidecar.shard}: key {min(repeated)!r} is also in an earlier shard; keys must be unique.")
            keys.update(sidecar.keys)
            for line in zip(sidecar.indices, sidecar.keys, sidecar.sources, sidecar.labels, strict=True):
                digest.update(source_line(*line))
            skipped += sidecar.skipped
            entries.append(ShardEntry(name=sidecar.shard, count=sidecar.count, size=sidecar.size, sha256=sidecar.sha256,
                                      sidecar_sha256=sha256_of_file(sidecar_path(self.folder, sidecar.shard))))
        skipped.sort(key=lambda record: record["index"])
        header = {name: getattr(self.header, name) for name in self.header.__dataclass_fields__}
        manifest = TokenShardManifest(**header, num_samples=len(keys), skipped=skipped, sources_sha256=digest.hexdigest(), shards=entries)
        manifest.save(self.folder)
        return manifest

    def strays(self) -> list[str]:
        """Names of the files that `finish` removes: partial files, and shards and sidecars that are not part of this set."""
        return [name for name in unlisted_files(self.folder, map(shard_name, range(self.num_shards))) if (self.folder / name).is_file()]
