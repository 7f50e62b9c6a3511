"""The manifest of one folder of token shards: the meaning of the ids, their origin, and the list of all shards."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from token_shards.order import permuted_sources
from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.files.durable_files import write_bytes
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, from_fields, read_object, written_by
from vqmosaic.files.permissions import check_readable
from vqmosaic.wording import counted, is_or_are

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")
BYTES_FINGERPRINT = "text:bytes"
"""The token_fingerprint of a text whose ids are the bytes of UTF-8."""
OPTIONAL_FIELDS = ("order_seed", "conditions")
"""Fields that a manifest has only if they are set. Versions before them did not write them."""
ORDER_SEED = 0
"""The order_seed of all new shard sets. The training stream has its own seed."""


def shard_name(shard_index: int) -> str:
    """The file name of a shard, such as shard-000004.tar."""
    return f"shard-{shard_index:06d}.tar"


@dataclass(frozen=True)
class Grid:
    """One grid of ids of an image. Most tokenizers have one grid of depth 1. The ids are flattened row by row, with depth innermost."""

    name: str
    """Part of the file names in the shards: at most 30 lower case letters, digits and underscores, starting with a letter."""
    codebook_size: int
    """Number of codes K: 0 <= id < K."""
    height: int
    """Number of rows of the grid."""
    width: int
    """Number of columns of the grid."""
    depth: int = 1
    """Number of ids at each position of the grid (residual quantizers have several)."""
    token_fingerprint: str | None = None
    """Fingerprint of the tokenizer that made the ids. None: the fingerprint in the manifest or vocabulary that contains the grid."""

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,29}", self.name):  # webdataset lower-cases the part after the key and splits it at dots
            raise InputError(f"The grid name is {self.name!r}; allowed: at most 30 lower case letters, digits and underscores, "
                             "starting with a letter.")
        check_range(f"codebook_size of grid {self.name!r}", self.codebook_size, at_least=1, at_most=2**31)
        for side in ("height", "width", "depth"):
            check_range(f"{side} of grid {self.name!r}", getattr(self, side), at_least=1)
        if not isinstance(self.token_fingerprint, str | None):
            raise InputError(f"token_fingerprint of grid {self.name!r} is {self.token_fingerprint!r}; it must be a string, or None.")

    def to_dict(self) -> dict[str, Any]:
        """The grid as JSON content. It omits a token_fingerprint of None, because older versions did not write the field."""
        content = dataclasses.asdict(self)
        if self.token_fingerprint is None:
            del content["token_fingerprint"]
        return content

    def relative_to(self, token_fingerprint: str) -> "Grid":
        """The same grid, without its own token_fingerprint if it equals that of the manifest or vocabulary. So equal grids compare equal."""
        return dataclasses.replace(self, token_fingerprint=None) if self.token_fingerprint == token_fingerprint else self

    @property
    def num_tokens(self) -> int:
        """Number of ids of one image in this grid."""
        return self.height * self.width * self.depth

    @property
    def dtype(self) -> np.dtype:
        """The stored type of the ids: little-endian uint16 if every id fits, else int32."""
        return np.dtype("<u2" if self.codebook_size <= 65536 else "<i4")


def grid_columns(grids: Sequence[Grid]) -> dict[str, slice]:
    """Grid name -> columns of its ids in the tokens (..., T) of all grids, which are concatenated in this order."""
    columns, start = {}, 0
    for grid in grids:
        columns[grid.name] = slice(start, start + grid.num_tokens)
        start += grid.num_tokens
    return columns


def describe_grids(grids: Sequence[Grid]) -> str:
    """The sizes of grids, such as "8 x 8 of 512 codes". With several grids, each with its name."""
    return ", ".join(f"{f'{grid.name}: ' if len(grids) > 1 else ''}{grid.height} x {grid.width}{f' x {grid.depth}' if grid.depth > 1 else ''} of "
                     f"{counted(grid.codebook_size, 'code')}" for grid in grids)


@dataclass(frozen=True)
class ShardEntry:
    """The manifest's record of one shard."""

    name: str
    """File name of the tar."""
    count: int
    """Number of samples in the tar."""
    size: int
    """Size of the tar in bytes."""
    sha256: str
    """Digest of the tar."""
    sidecar_sha256: str
    """Digest of the sidecar. It protects the labels and offsets that readers take from the sidecar."""


@dataclass(frozen=True, kw_only=True)
class ShardSetHeader:
    """Everything known about a folder of shards before the first image is encoded. Equal headers give equal shards."""

    split: str
    """train or validation."""
    token_fingerprint: str
    """Fingerprint of the tokenizer that made the ids (encoder, quantizer, deterministic transform). A grid of another tokenizer has its own."""
    grids: list[Grid]
    """The grids of each image. A reader concatenates their ids in this order."""
    views: list[dict]
    """The V stored views of each image, each described by a dict such as {"name": "original"}."""
    class_names: list[str] | None = None
    """Name of each label, or None for unlabelled data."""
    dataset: dict
    """Identity of the data set: fields that name it for a human and distinguish it from other data sets."""
    encoding: dict
    """Other settings that the bytes depend on, such as {"threads": 2, "batch_size": 64}."""
    images_per_shard: int
    """Number of source images in one shard, n. Shard s holds the positions [s*n, (s+1)*n) of the order given by order_seed."""
    num_sources: int
    """Number of source images in the split, readable or not."""
    conditions: list[dict] = field(default_factory=list)
    """The grids that are given to a prior, in order, each described by a record with its name, its kind, and the settings that determine its ids. All
    other grids are drawn."""
    order_seed: int | None = None
    """Seed that permutes the sources before they are divided into shards, so that each shard holds a random part of the data set.
    None means not permuted, as in shard sets written by version 0.1.0."""
    schema_version: int = SCHEMA_VERSION
    """Version of this record and of the layout of the shards."""

    def __post_init__(self):
        object.__setattr__(self, "grids", [grid.relative_to(self.token_fingerprint) for grid in self.grids])
        check_name("split", self.split, SPLITS)
        check_range("images_per_shard", self.images_per_shard, at_least=1)
        check_range("num_sources", self.num_sources, at_least=1)
        if self.order_seed is not None:
            check_range("order_seed", self.order_seed, at_least=0)
        names = [grid.name for grid in self.grids]
        if not names or len(set(names)) < len(names):
            raise InputError(f"The grids are named {names}; there must be at least one grid, and names must be unique.")
        if not (isinstance(self.conditions, list) and all(isinstance(record, dict) and isinstance(record.get("name"), str)
                                                          and isinstance(record.get("kind"), str) for record in self.conditions)):
            raise InputError(f"conditions is {str(self.conditions)[:100]!r}; it must be a list of records with name and kind.")
        given = [record["name"] for record in self.conditions]
        if unknown := [name for name in given if name not in names]:
            raise InputError(f"conditions names the grid {unknown[0]!r}, but the grids are named {names}.")
        if len(set(given)) < len(given) or len(given) == len(names):
            raise InputError(f"conditions names the grids {given} of {names}; each may be named once, and at least one grid must be drawn.")
        if not self.views:
            raise InputError('views is empty; there must be at least one, such as {"name": "original"}.')

    @property
    def drawn_grids(self) -> list[Grid]:
        """The grids that conditions does not name, in order."""
        given = {record["name"] for record in self.conditions}
        return [grid for grid in self.grids if grid.name not in given]

    @property
    def num_tokens(self) -> int:
        """Number of ids of one image in all grids, T."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def token_fingerprints(self) -> dict[str, str]:
        """Grid name -> fingerprint of the tokenizer that made its ids."""
        return {grid.name: grid.token_fingerprint or self.token_fingerprint for grid in self.grids}

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_sources // self.images_per_shard)

    def source_range(self, shard_index: int) -> range:
        """The positions of a shard's sources in the order given by order_seed. Without order_seed, positions are source indices."""
        first = shard_index * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.num_sources))

    def source_indices(self, shard_index: int) -> Sequence[int]:
        """The source indices of a shard in ascending order. Samples are stored in this order, so that the data set is read forwards."""
        positions = self.source_range(shard_index)
        if self.order_seed is None:
            return positions
        return np.sort(permuted_sources(self.num_sources, self.order_seed)[positions.start:positions.stop]).tolist()

    def to_dict(self) -> dict[str, Any]:
        """The header as JSON content. It omits an order_seed of None and empty conditions, because older versions did not write these fields."""
        content = dataclasses.asdict(self) | {"grids": [grid.to_dict() for grid in self.grids]}
        return {name: value for name, value in content.items() if not (name in OPTIONAL_FIELDS and value in (None, []))}

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the canonical JSON of the header."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TokenShardManifest(ShardSetHeader):
    """A header and the list of the written shards. It is written last and marks the folder as complete. `fingerprint` identifies the content."""

    num_samples: int
    """Number of stored images."""
    skipped: list[dict]
    """The images that are not stored: {"index", "source", "reason"}, in index order."""
    sources_sha256: str
    """Digest over one line `index\\tkey\\tsource\\tlabel` for each stored sample, in stored order."""
    shards: list[ShardEntry]
    """The shards, in order."""

    def __post_init__(self):
        super().__post_init__()
        expected = [shard_name(index) for index in range(self.num_shards)]
        if [shard.name for shard in self.shards] != expected:
            raise InputError(f"The manifest lists {counted(len(self.shards), 'shard')}; {self.num_sources} sources with images_per_shard "
                             f"{self.images_per_shard} need {len(expected)}: {expected[0]} to {expected[-1]}, in order.")
        in_shards = sum(shard.count for shard in self.shards)
        if in_shards != self.num_samples:
            raise InputError(f"The shards in the manifest have {in_shards} samples, but its num_samples is {self.num_samples}.")
        if any(record.keys() != {"index", "source", "reason"} for record in self.skipped):
            raise InputError("skipped in the manifest must be a list of records with index, source and reason.")
        if self.num_samples + len(self.skipped) != self.num_sources:
            raise InputError(f"The manifest has {self.num_samples} samples and {len(self.skipped)} skipped sources; "
                             f"the sum must be its num_sources, {self.num_sources}.")

    @property
    def header(self) -> ShardSetHeader:
        """The header fields of the manifest."""
        return ShardSetHeader(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ShardSetHeader)})

    def save(self, folder: str | Path) -> None:
        """Write manifest.json, which marks the folder as complete. All shards must exist already."""
        # ASCII escapes, because a file name that is not valid UTF-8 is a string that UTF-8 cannot encode
        text = json.dumps(self.to_dict(), indent=2)
        write_bytes(Path(folder) / MANIFEST_NAME, (text + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> "TokenShardManifest":
        """The manifest of a complete folder. Raises InputError if it is missing or malformed."""
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        check_readable(path)
        if not folder.is_dir():
            raise InputError(f"The folder of token shards {folder} does not exist; `vqmosaic preprocess` writes it.")
        if not path.is_file():
            splits = [split for split in SPLITS if (folder / split).is_dir()]
            if splits:
                raise InputError(f"{folder} contains no shards; give one of {', '.join(str(folder / split) for split in splits)}.")
            finished = len(list(folder.glob("shard-*.json")))
            raise InputError(f"{folder} is not complete: {MANIFEST_NAME}, which is written last, is missing "
                             f"({counted(finished, 'shard')} {is_or_are(finished)} finished). Run `vqmosaic preprocess` again "
                             "to write the missing shards.")
        return cls.from_dict(read_object(path, "run `vqmosaic preprocess` again"), path)

    @classmethod
    def from_dict(cls, content: dict[str, Any], path: str | Path = MANIFEST_NAME) -> "TokenShardManifest":
        """The manifest for its JSON content. `path` is the file that an InputError names."""
        if not isinstance(content, dict) or "schema_version" not in content:
            raise InputError(f"{path} is not a manifest of token shards: it has no schema_version.")
        if content["schema_version"] != SCHEMA_VERSION:
            raise InputError(f"{path} has schema_version {content['schema_version']}; this version reads {SCHEMA_VERSION}. "
                             "Update vqmosaic, or run `vqmosaic preprocess` again with this version.")
        version = written_by(content)
        content = {name: value for name, value in content.items() if name != VERSION_FIELD}
        known = [field.name for field in dataclasses.fields(cls)]
        check_fields(content, known, str(path), version, required=[name for name in known if name not in OPTIONAL_FIELDS])
        for name, part in (("grids", Grid), ("shards", ShardEntry)):
            if not isinstance(content[name], list):
                raise InputError(f"{path}: {name} is {str(content[name])[:100]!r}; it must be a list.")
            content[name] = [from_fields(part, entry, f"{path}: {name}[{number}]", version) for number, entry in enumerate(content[name])]
        return from_fields(cls, content, str(path), version)

    def check_token_fingerprint(self, expected: str, expected_path: str | Path, own_path: str | Path) -> None:
        """Raise InputError unless the ids come from the tokenizer whose token fingerprint is `expected`. The paths name the two artefacts.

        Grids of other tokenizers, which have their own fingerprints, are not compared.
        """
        if self.token_fingerprint != expected:
            raise InputError(f"The tokens in {own_path} were made by another tokenizer: their token fingerprint is "
                             f"{self.token_fingerprint}, but {expected_path} has {expected}. "
                             "Run `vqmosaic preprocess` with that tokenizer, or use the tokenizer that made the tokens.")
