"""The sidecar of one shard: its digest, what it holds, and where each array lies in the tar."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_bytes
from vqmosaic.files.json_files import VERSION_FIELD, from_fields, written_by
from vqmosaic.files.permissions import permission_denied


def sidecar_path(folder: Path, name: str) -> Path:
    """Where the sidecar of the shard with this file name lies."""
    return (folder / name).with_suffix(".json")


def source_line(index: int, key: str, source: str, label: int | None) -> bytes:
    """One sample's line for the manifest's sources_sha256."""
    # surrogatepass: a file name that is not valid UTF-8 has surrogates in it
    return f"{index}\t{key}\t{source}\t{'none' if label is None else label}\n".encode("utf-8", "surrogatepass")


@dataclass(frozen=True, kw_only=True)
class ShardSidecar:
    """What is known of one finished shard; the lists run over its samples in stored order."""

    shard: str
    """File name of the tar."""
    count: int
    """Samples in it."""
    size: int
    """Bytes of the tar."""
    sha256: str
    """Digest of the tar."""
    header_fingerprint: str
    """Of the header it was written for; with another header the shard is written again."""
    skipped: list[dict]
    """Sources of the shard that are not stored: {"index", "source", "reason"}, in index order."""
    keys: list[str]
    """Key of each sample."""
    indices: list[int]
    """Source index of each sample."""
    labels: list[int | None]
    """Label of each sample, None without one."""
    sources: list[str]
    """Source (file name, row) of each sample."""
    offsets: dict[str, list[int]]
    """For each grid, the byte in the tar at which each sample's (V, T) ids begin, in C order."""

    def save(self, folder: Path) -> None:
        """Write the sidecar; done after the tar is in place, so that a sidecar means a finished shard."""
        write_bytes(sidecar_path(folder, self.shard), self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the sidecar's file."""
        return json.dumps({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, separators=(",", ":")).encode()

    @classmethod
    def load(cls, folder: Path, name: str) -> "ShardSidecar":
        """The sidecar of the shard with this file name. Raises InputError where it is missing or malformed."""
        path = sidecar_path(folder, name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{path} is missing; it is the sidecar of {name}.") from None
        except PermissionError as error:
            raise permission_denied(path) from error
        return cls.from_bytes(content, path)

    @classmethod
    def from_bytes(cls, content: bytes, path: Path) -> "ShardSidecar":
        """The sidecar for its file's bytes; `path` is for the words of an InputError."""
        try:
            fields = json.loads(content)
            version = written_by(fields)
            if version is not None:
                del fields[VERSION_FIELD]
            sidecar = from_fields(cls, fields, f"{path} is not the sidecar of a shard that this version reads: it", version)
            lists = [sidecar.keys, sidecar.indices, sidecar.labels, sidecar.sources, *sidecar.offsets.values()]
            lengths = {len(entries) for entries in lists} | {sidecar.count}
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not the sidecar of a shard ({error}).") from None
        if len(lengths) > 1:
            raise InputError(f"{path} has lists of {sorted(lengths)} entries; there must be one for each of its {sidecar.count} samples.")
        return sidecar
