"""The sidecar of one shard: its digest, its samples, and the byte offset of each array in the tar."""

import dataclasses
import json
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import TEMPORARY_PREFIX, write_bytes
from vqmosaic.files.json_files import VERSION_FIELD, from_fields, written_by
from vqmosaic.files.permissions import permission_denied


def sidecar_path(folder: Path, name: str) -> Path:
    """The path of the sidecar of the shard with this file name."""
    return (folder / name).with_suffix(".json")


def unlisted_files(folder: Path, shards: Iterable[str]) -> list[str]:
    """Names of the shards, sidecars and partial files in a folder that do not belong to the shards with these names."""
    expected = {name for shard in shards for name in (shard, sidecar_path(folder, shard).name)}
    found = {path.name for pattern in ("shard-*.tar", "shard-*.json", f"{TEMPORARY_PREFIX}*") for path in folder.glob(pattern)}
    return sorted(found - expected)


def source_line(index: int, key: str, source: str, label: int | None) -> bytes:
    """The line of one sample that is hashed into sources_sha256 of the manifest."""
    # surrogatepass: a file name that is not valid UTF-8 contains surrogates
    return f"{index}\t{key}\t{source}\t{'none' if label is None else label}\n".encode("utf-8", "surrogatepass")


@dataclass(frozen=True, kw_only=True)
class ShardSidecar:
    """Description of one finished shard. The lists have one entry for each sample, in stored order."""

    shard: str
    """File name of the tar."""
    count: int
    """Number of samples in the tar."""
    size: int
    """Size of the tar in bytes."""
    sha256: str
    """Digest of the tar."""
    header_fingerprint: str
    """Fingerprint of the header that the shard was written for. If the header changes, the shard is written again."""
    skipped: list[dict]
    """Sources of the shard that are not stored: {"index", "source", "reason"}, in index order."""
    keys: list[str]
    """Key of each sample."""
    indices: list[int]
    """Source index of each sample."""
    labels: list[int | None]
    """Label of each sample, or None."""
    sources: list[str]
    """Source (file name, row) of each sample."""
    offsets: dict[str, list[int]]
    """For each grid, the byte offset in the tar of each sample's ids (V, T), in C order."""

    def save(self, folder: Path) -> None:
        """Write the sidecar. Call it after the tar is published, because the sidecar marks the shard as finished."""
        write_bytes(sidecar_path(folder, self.shard), self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the sidecar file."""
        return json.dumps({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, separators=(",", ":")).encode()

    @classmethod
    def load(cls, folder: Path, name: str) -> "ShardSidecar":
        """The sidecar of the shard with this file name. Raises InputError if it is missing or malformed."""
        path = sidecar_path(folder, name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{path}, the sidecar of {name}, is missing.") from None
        except PermissionError as error:
            raise permission_denied(path) from error
        return cls.from_bytes(content, path)

    @classmethod
    def from_bytes(cls, content: bytes, path: Path) -> "ShardSidecar":
        """The sidecar for the bytes of its file. `path` is the file that an InputError names."""
        try:
            fields = json.loads(content)
            version = written_by(fields)
            if version is not None:
                del fields[VERSION_FIELD]
            sidecar = from_fields(cls, fields, f"{path} is not a shard sidecar that this version can read: it", version)
            lists: list[Sized] = [sidecar.keys, sidecar.indices, sidecar.labels, sidecar.sources, *sidecar.offsets.values()]
            lengths = {len(entries) for entries in lists} | {sidecar.count}
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a shard sidecar ({error}).") from None
        if len(lengths) > 1:
            raise InputError(f"{path} has lists of {sorted(lengths)} entries; each list must have one entry for each of its {sidecar.count} samples.")
        return sidecar
