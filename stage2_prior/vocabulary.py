"""What each id of the prior means: the codes of the grids, then the classes, then the null class. Data in vocabulary.json, no torch.

    [0, K)                      codes of the first grid; further grids follow with ranges of their own
    [num_codes, num_codes + C)  the C classes
    null_id                     no class: guidance, unlabelled data

No other file does arithmetic on ids.
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
"""The class index that stands for the null class in arrays of class indices."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of a prior and the T positions at which they stand after the class token."""

    grids: list[Grid]
    """The grids of one image; their tokens stand one grid after another, each row by row."""
    class_names: list[str] | None
    """Name of each class, or None for a prior without classes."""
    token_fingerprint: str
    """Of the tokenizer whose ids these are."""
    label_drop: float = 0.0
    """Share of the training samples whose class was replaced by the null class; 0 makes guidance impossible."""
    schema_version: int = SCHEMA_VERSION
    """Version of this record."""

    def __post_init__(self):
        if not self.grids:
            raise InputError("The vocabulary has no grids; there must be at least one.")
        if self.class_names is not None and not self.class_names:
            raise InputError("class_names of the vocabulary is empty; give the names, or None for a prior without classes.")
        check_range("label_drop of the vocabulary", self.label_drop, at_least=0, at_most=1)

    @property
    def num_tokens(self) -> int:
        """Ids of one image over all grids, T."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def num_codes(self) -> int:
        """Codes over all grids."""
        return sum(grid.codebook_size for grid in self.grids)

    @property
    def most_codes(self) -> int:
        """Codes of the grid that has most: K, the width of the logits that the loss and the sampler see."""
        return max(grid.codebook_size for grid in self.grids)

    @property
    def num_classes(self) -> int:
        """Classes, without the null class."""
        return len(self.class_names or [])

    @property
    def size(self) -> int:
        """All ids, V."""
        return self.num_codes + self.num_classes + 1

    @property
    def null_id(self) -> int:
        """The id of the null class."""
        return self.num_codes + self.num_classes

    @property
    def suppressed_ids(self) -> list[int]:
        """The ids that are never drawn: classes and null class."""
        return list(range(self.num_codes, self.size))

    @property
    def code_ranges(self) -> list[tuple[int, int]]:
        """The ids [start, stop) of each grid's codes."""
        ranges, start = [], 0
        for grid in self.grids:
            ranges.append((start, start + grid.codebook_size))
            start += grid.codebook_size
        return ranges

    def position_ranges(self) -> list[tuple[int, int]]:
        """The ids [start, stop) that can stand at each of the T positions."""
        return [ids for grid, ids in zip(self.grids, self.code_ranges, strict=True) for _ in range(grid.num_tokens)]

    @property
    def offsets_T(self) -> np.ndarray:
        """What is added to the grids' own ids (int64) to get ids of the vocabulary."""
        return np.array([start for start, _ in self.position_ranges()], dtype=np.int64)

    def to_vocabulary(self, ids_BT):
        """The vocabulary's ids (B, T) for the grids' own ids; numpy and torch integers alike."""
        return ids_BT if len(self.grids) == 1 else ids_BT + self._offsets_like(ids_BT)

    def to_vocabulary_at(self, position: int, ids_B):
        """The vocabulary's ids (B) for the grid's own ids that all stand at one position."""
        return ids_B if len(self.grids) == 1 else ids_B + self.position_ranges()[position][0]

    def to_grid_ids(self, ids_BT):
        """The grids' own ids (B, T) for ids of the vocabulary; the inverse of `to_vocabulary`."""
        return ids_BT if len(self.grids) == 1 else ids_BT - self._offsets_like(ids_BT)

    def _offsets_like(self, ids_BT):
        return ids_BT.new_tensor(self.offsets_T) if hasattr(ids_BT, "new_tensor") else self.offsets_T

    def condition_ids(self, class_indices_B):
        """The id (B,) of each class index, NO_CLASS (-1) meaning the null class; numpy and torch integers alike, not checked."""
        # floor modulo takes -1 to num_classes, and the null class is the id after the last class: no branch, no synchronization
        return self.num_codes + class_indices_B % (self.num_classes + 1)

    def class_id(self, index: int) -> int:
        """The id of one class. Raises InputError that says which indices there are."""
        index = operator.index(index)
        if not 0 <= index < self.num_classes:
            allowed = (f"0 ({self.class_names[0]}) to {self.num_classes - 1} ({self.class_names[-1]})" if self.class_names
                       else "none, because the prior was trained without classes")
            raise InputError(f"The class index is {index}; allowed: {allowed}.")
        return self.num_codes + index

    def save(self, folder: str | Path) -> None:
        """Write vocabulary.json, whole or not at all."""
        write_json(Path(folder) / VOCABULARY_NAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> "Vocabulary":
        """The vocabulary in a folder. Raises InputError for a missing file, another schema, unknown or missing fields."""
        path = Path(folder) / VOCABULARY_NAME
        check_readable(path)
        if not path.is_file():
            raise InputError(f"{path} is missing; it is written last, so this is not the complete folder of a prior.")
        return cls.from_dict(read_object(path, "export the prior again"), path, version_of(Path(folder)))

    @classmethod
    def from_dict(cls, content: dict[str, Any], path: str | Path = VOCABULARY_NAME, version: str | None = None) -> "Vocabulary":
        """The vocabulary for its JSON content. Errors name `path` and `version`, the version of vqmosaic that wrote it."""
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
            raise InputError(f"{path}: class_names is {names!r}; it must be a list of texts, or null.")
        if not isinstance(content["token_fingerprint"], str):
            raise InputError(f"{path}: token_fingerprint is {content['token_fingerprint']!r}; it must be a text.")
        if not isinstance(content["grids"], list):
            raise InputError(f"{path}: grids is {content['grids']!r}; it must be a list.")
        grids = [from_fields(Grid, grid, f"{path}: grids[{number}]", version) for number, grid in enumerate(content["grids"])]
        return from_fields(cls, content | {"grids": grids}, str(path), version)
