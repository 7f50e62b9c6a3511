"""The ids of a prior: codes of the grids, then classes, then the null class. Stored in vocabulary.json. Does not import torch.

    [0, K)                      codes of the first grid; each further grid has its own range after it
    [num_codes, num_codes + C)  the C classes
    null_id                     no class: guidance, unlabelled data

Only this file does arithmetic on ids.
"""

import dataclasses
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stage2_prior.digests import version_of
from token_shards.manifest import Grid
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, from_fields, read_object, version_hint, written_by
from vqmosaic.files.permissions import check_readable

SCHEMA_VERSION = 1
VOCABULARY_NAME = "vocabulary.json"
NO_CLASS = -1
"""Class index of the null class."""


def why_unguided(class_names: list[str] | None, label_drop: float) -> str | None:
    """Why a prior does not support guidance, to follow "the prior". None if it does."""
    if class_names is None:
        return "was trained without classes"
    return "was trained with label_drop 0 and has not learned the null class that guidance needs" if label_drop == 0 else None


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of a prior, and which ids are possible at each of the T positions after the class token."""

    grids: list[Grid]
    """The grids of one image. Their tokens are concatenated in this order, each grid row by row."""
    class_names: list[str] | None
    """Name of each class, or None for a prior without classes."""
    token_fingerprint: str
    """Fingerprint of the tokenizer that produces the ids."""
    label_drop: float = 0.0
    """Fraction of the training samples whose class was replaced by the null class. With 0, guidance is not possible."""
    schema_version: int = SCHEMA_VERSION
    """Version of the file format."""

    def __post_init__(self):
        if not self.grids:
            raise InputError("The vocabulary has no grids; there must be at least one.")
        if self.class_names is not None and not self.class_names:
            raise InputError("class_names of the vocabulary is empty; give the names, or None for a prior without classes.")
        check_range("label_drop of the vocabulary", self.label_drop, at_least=0, at_most=1)

    @property
    def num_tokens(self) -> int:
        """Tokens per image over all grids, T."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def num_codes(self) -> int:
        """Number of codes of all grids."""
        return sum(grid.codebook_size for grid in self.grids)

    @property
    def most_codes(self) -> int:
        """Number of codes of the largest grid, K: the width of the logits in the loss and in sampling."""
        return max(grid.codebook_size for grid in self.grids)

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null class."""
        return len(self.class_names or [])

    @property
    def size(self) -> int:
        """Number of ids, V."""
        return self.num_codes + self.num_classes + 1

    @property
    def null_id(self) -> int:
        """The id of the null class."""
        return self.num_codes + self.num_classes

    @property
    def suppressed_ids(self) -> list[int]:
        """The ids that are never sampled: the classes and the null class."""
        return list(range(self.num_codes, self.size))

    @property
    def code_ranges(self) -> list[tuple[int, int]]:
        """The range of ids [start, stop) of each grid's codes."""
        ranges, start = [], 0
        for grid in self.grids:
            ranges.append((start, start + grid.codebook_size))
            start += grid.codebook_size
        return ranges

    def position_ranges(self) -> list[tuple[int, int]]:
        """The range of ids [start, stop) that are possible at each of the T positions."""
        return [code_range for grid, code_range in zip(self.grids, self.code_ranges, strict=True) for _ in range(grid.num_tokens)]

    @property
    def offsets_T(self) -> np.ndarray:
        """The offset (int64) at each position from the grid's own ids to ids of the vocabulary."""
        return np.array([start for start, _ in self.position_ranges()], dtype=np.int64)

    def to_vocabulary(self, ids_BT):
        """Convert the grids' own ids (B, T) to ids of the vocabulary. Accepts numpy arrays and torch tensors."""
        return ids_BT if len(self.grids) == 1 else ids_BT + self._offsets_like(ids_BT)

    def to_vocabulary_at(self, position: int, ids_B):
        """Convert a grid's own ids (B,), all at one position, to ids of the vocabulary."""
        return ids_B if len(self.grids) == 1 else ids_B + self.position_ranges()[position][0]

    def to_grid_ids(self, ids_BT):
        """Convert ids of the vocabulary (B, T) to the grids' own ids; the inverse of `to_vocabulary`."""
        return ids_BT if len(self.grids) == 1 else ids_BT - self._offsets_like(ids_BT)

    def _offsets_like(self, ids_BT):
        return ids_BT.new_tensor(self.offsets_T) if hasattr(ids_BT, "new_tensor") else self.offsets_T

    def condition_ids(self, class_indices_B):
        """The ids (B,) of class indices; NO_CLASS (-1) gives the null class. Accepts numpy arrays and torch tensors. Does not check the indices."""
        # floor modulo maps -1 to num_classes, the null class: no branch, no synchronization
        return self.num_codes + class_indices_B % (self.num_classes + 1)

    def class_id(self, index: int) -> int:
        """The id of one class. Raises InputError, which names the allowed indices, for an unknown one."""
        index = operator.index(index)
        if not 0 <= index < self.num_classes:
            allowed = (f"0 ({self.class_names[0]}) to {self.num_classes - 1} ({self.class_names[-1]})" if self.class_names
                       else "none, because the prior was trained without classes")
            raise InputError(f"The class index is {index}; allowed: {allowed}.")
        return self.num_codes + index

    def save(self, folder: str | Path) -> None:
        """Write vocabulary.json atomically."""
        write_json(Path(folder) / VOCABULARY_NAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> "Vocabulary":
        """Load the vocabulary of a folder. Raises InputError for a missing file, another schema version, and unknown or missing fields."""
        path = Path(folder) / VOCABULARY_NAME
        check_readable(path)
        if not path.is_file():
            raise InputError(f"{path} is missing. It is written last, so the prior in this folder is incomplete.")
        return cls.from_dict(read_object(path, "export the prior again"), path, version_of(Path(folder)))

    @classmethod
    def from_dict(cls, content: dict[str, Any], path: str | Path = VOCABULARY_NAME, version: str | None = None) -> "Vocabulary":
        """The vocabulary from its JSON content. Errors name `path` and `version`, the version of vqmosaic that wrote it."""
        version = written_by(content) or version
        if not isinstance(content, dict) or "schema_version" not in content:
            raise InputError(f"{path} is not a vocabulary: it has no schema_version.")
        if content["schema_version"] != SCHEMA_VERSION:
            raise InputError(f"{path} has schema_version {content['schema_version']}; this version of vqmosaic reads {SCHEMA_VERSION}."
                             f"{version_hint(version)}")
        content = {name: value for name, value in content.items() if name != VERSION_FIELD}
        known = [field.name for field in dataclasses.fields(cls)]
        check_fields(content, known, str(path), version, known)
        names = content["class_names"]
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise InputError(f"{path}: class_names is {names!r}; it must be a list of strings, or null.")
        if not isinstance(content["token_fingerprint"], str):
            raise InputError(f"{path}: token_fingerprint is {content['token_fingerprint']!r}; it must be a string.")
        if not isinstance(content["grids"], list):
            raise InputError(f"{path}: grids is {content['grids']!r}; it must be a list.")
        grids = [from_fields(Grid, grid, f"{path}: grids[{number}]", version) for number, grid in enumerate(content["grids"])]
        return from_fields(cls, content | {"grids": grids}, str(path), version)
