"""The ids of a prior and the segments of its sequence. Stored in vocabulary.json. Does not import torch.

    [0, num_codes)              codes of the drawn grids, one range for each grid
    [num_codes, num_codes + C)  the C classes; the ids of further given segments follow
    null_id                     no class: guidance, unlabelled data; the null ids of further given segments follow

segments.py describes the order of the segments. Only these two files do arithmetic on ids.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stage2_prior.digests import version_of
from stage2_prior.segments import Condition, GivenGrid, Segment, make_segments, read_segments
from token_shards.manifest import Grid
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, from_fields, read_object, version_hint, written_by
from vqmosaic.files.permissions import check_readable

SCHEMA_VERSION = 2
"""Version of the file format. Version 1 has no conditions: its grids are drawn, and the class is the only given segment."""
VOCABULARY_NAME = "vocabulary.json"
NO_CLASS = -1
"""Class index of the null class. In other given segments, the id -1 stands for the null id."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of a prior, and which ids are possible at each of the T drawn positions, which follow the class and the conditions."""

    grids: list[Grid]
    """The drawn grids of one image. Their tokens are concatenated in this order, each grid row by row."""
    class_names: list[str] | None
    """Name of each class, or None for a prior without classes."""
    token_fingerprint: str
    """Fingerprint of the tokenizer that produces the ids. A grid of another tokenizer has its own."""
    label_drop: float = 0.0
    """Fraction of the training samples in which all given segments were dropped together: the class was replaced by the null class."""
    class_drop: float = 0.0
    """Fraction of the training samples in which the class was dropped independently of the other given segments."""
    conditions: Sequence[Condition] = ()
    """Given segments that follow the class, in order: grids and texts."""

    def __post_init__(self):
        object.__setattr__(self, "grids", [grid.relative_to(self.token_fingerprint) for grid in self.grids])
        object.__setattr__(self, "conditions", tuple(
            dataclasses.replace(condition, grid=condition.grid.relative_to(self.token_fingerprint)) if isinstance(condition, GivenGrid) else condition
            for condition in self.conditions))
        if not self.grids:
            raise InputError("The vocabulary has no grids that are drawn; there must be at least one.")
        if self.class_names is not None and not self.class_names:
            raise InputError("class_names of the vocabulary is empty; give the names, or None for a prior without classes.")
        check_range("label_drop of the vocabulary", self.label_drop, at_least=0, at_most=1)
        check_range("class_drop of the vocabulary", self.class_drop, at_least=0, at_most=1)
        make_segments(self.num_classes, self.class_drop, self.conditions, self.grids)  # checks the names

    @functools.cached_property
    def segments(self) -> list[Segment]:
        """The segments in the order of the sequence: the class, the conditions, the drawn grids."""
        return make_segments(self.num_classes, self.class_drop, self.conditions, self.grids)

    @property
    def given_segments(self) -> list[Segment]:
        """The class and the conditions."""
        return self.segments[:1 + len(self.conditions)]

    @property
    def learned_segments(self) -> list[Segment]:
        """The given segments that the prior has seen in training: without the class if there are no classes, and without those of drop rate 1."""
        return [segment for segment in self.given_segments if len(segment.ids) and segment.drop_rate < 1]

    @property
    def token_fingerprints(self) -> dict[str, str]:
        """Segment name -> fingerprint of the tokenizer that made its ids, for given and drawn grids and for texts whose tokenizer is known."""
        return {segment.name: segment.grid.token_fingerprint or self.token_fingerprint if segment.grid is not None else str(segment.token_fingerprint)
                for segment in self.segments if segment.grid is not None or segment.token_fingerprint is not None}

    @property
    def num_tokens(self) -> int:
        """Drawn tokens per image over all grids, T."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def num_condition_tokens(self) -> int:
        """Number of tokens of the conditions, G."""
        return sum(condition.num_tokens for condition in self.conditions)

    @property
    def num_given_tokens(self) -> int:
        """Number of tokens before the first drawn one: 1 + G, the class and the conditions."""
        return 1 + self.num_condition_tokens

    @property
    def num_codes(self) -> int:
        """Number of codes of all drawn grids."""
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
        return self.null_id + 1 + len(self.conditions)

    @property
    def null_id(self) -> int:
        """The id of the null class."""
        return self.num_codes + self.num_classes + sum(condition.num_ids for condition in self.conditions)

    @property
    def suppressed_ids(self) -> list[int]:
        """The ids that are never sampled: those of given segments, and their null ids."""
        return list(range(self.num_codes, self.size))

    @property
    def code_ranges(self) -> list[tuple[int, int]]:
        """The range of ids [start, stop) of each drawn grid's codes."""
        return [(segment.ids.start, segment.ids.stop) for segment in self.segments if segment.role == "drawn"]

    def position_ranges(self) -> list[tuple[int, int]]:
        """The range of ids [start, stop) that are possible at each of the T drawn positions."""
        return self._position_ranges

    @functools.cached_property
    def _position_ranges(self) -> list[tuple[int, int]]:
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
        """The ids (B,) of class indices; NO_CLASS (-1) gives the null class. Accepts numpy arrays and torch tensors. Does not check the indices.

        If the class was dropped from all training samples, every index gives the null class, because the other ids are not trained.
        """
        if self.class_drop == 1:
            class_indices_B = class_indices_B * 0 + NO_CLASS
        # floor modulo maps -1 to num_classes, the null class unless there are conditions: no branch, no synchronization
        ids_B = self.num_codes + class_indices_B % (self.num_classes + 1)
        if self.conditions:
            ids_B = ids_B + (class_indices_B < 0) * (self.null_id - self.num_codes - self.num_classes)
        return ids_B

    def condition_token_ids(self, given_BG):
        """The ids (B, G) of the conditions' own ids; -1 gives the null id. Accepts numpy arrays and torch tensors. Does not check the ids.

        All ids of a condition that was dropped from all training samples give its null id, because the other ids are not trained.
        """
        segments = [segment for segment in self.given_segments[1:] for _ in segment.places]
        offsets_G, null_ids_G = (np.array(ids, dtype=np.int64) for ids in ([segment.ids.start for segment in segments],
                                                                          [segment.null_id for segment in segments]))
        is_dropped_G = np.array([segment.drop_rate == 1 for segment in segments], dtype=np.int64)
        if hasattr(given_BG, "new_tensor"):
            offsets_G, null_ids_G, is_dropped_G = (given_BG.new_tensor(each_G) for each_G in (offsets_G, null_ids_G, is_dropped_G))
        given_BG = given_BG - (given_BG + 1) * is_dropped_G  # -1 where is_dropped_G is 1
        return given_BG + offsets_G + (given_BG < 0) * (null_ids_G + 1 - offsets_G)

    def check_conditions(self, given: Mapping[str, Any], check_ids: bool = False) -> None:
        """Raise InputError unless each entry of `given` is a condition of this vocabulary and has its shape.

        The ids of a grid have the shape (B, n), (B, height, width, depth) or, if the depth is 1, (B, height, width). `check_ids` also checks their
        range, from -1, the null id. It reads them from their device.
        """
        names = [condition.name for condition in self.conditions]
        if unknown := sorted(given.keys() - {*names}):
            raise InputError(f"given has {', '.join(unknown)}; the conditions of the prior are: {', '.join(names) or 'none'}.")
        for condition in self.conditions:
            if condition.name not in given:
                continue
            ids = given[condition.name]
            if "int" not in str(getattr(ids, "dtype", "")):
                found = getattr(ids, "dtype", type(ids).__name__)
                raise InputError(f"given[{condition.name!r}] is {found}; give a tensor of integer ids.")
            shapes: list[tuple[int, ...]] = [(condition.num_tokens,)]
            if isinstance(condition, GivenGrid):
                grid = condition.grid
                shapes += [(grid.height, grid.width, grid.depth), *([(grid.height, grid.width)] if grid.depth == 1 else [])]
            if tuple(ids.shape[1:]) not in shapes:
                raise InputError(f"given[{condition.name!r}] has the shape {tuple(ids.shape)}; allowed for each image: "
                                 f"{' or '.join(map(str, shapes))}.")
            if check_ids and len(ids) and not -1 <= int(ids.min()) <= int(ids.max()) < condition.num_ids:
                raise InputError(f"given[{condition.name!r}] holds ids from {int(ids.min())} to {int(ids.max())}; allowed: 0 to "
                                 f"{condition.num_ids - 1}, and -1 for the null id.")

    def is_trained(self, given: int) -> bool:
        """Whether some training samples had the first `given` learned segments and the null ids of all others."""
        rates = self.drop_rates
        if given == 0 and self.label_drop > 0:
            return True
        return self.label_drop < 1 and all(rate > 0 for rate in rates[given:])

    @property
    def drop_rates(self) -> list[float]:
        """The drop rate of each learned segment."""
        return [segment.drop_rate for segment in self.learned_segments]

    def why_unguided(self) -> str | None:
        """Why a prior with this vocabulary does not support guidance, to follow "the prior". None if it does."""
        if not self.drop_rates:
            return "was trained without classes"
        if self.is_trained(0):
            return None
        what = "null class" if not self.conditions else "null ids"
        return f"was trained with label_drop 0 and has not learned the {what} that guidance needs"

    def class_id(self, index: int) -> int:
        """The id of one class. Raises InputError, which names the allowed indices, for an unknown one."""
        index = operator.index(index)
        if not 0 <= index < self.num_classes:
            allowed = (f"0 ({self.class_names[0]}) to {self.num_classes - 1} ({self.class_names[-1]})" if self.class_names
                       else "none, because the prior was trained without classes")
            raise InputError(f"The class index is {index}; allowed: {allowed}.")
        return self.num_codes + index

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary as JSON content."""
        return {"class_names": self.class_names, "token_fingerprint": self.token_fingerprint, "label_drop": self.label_drop,
                "segments": [segment.to_dict() for segment in self.segments], "schema_version": SCHEMA_VERSION}

    def save(self, folder: str | Path) -> None:
        """Write vocabulary.json atomically."""
        write_json(Path(folder) / VOCABULARY_NAME, self.to_dict())

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
        schema = content["schema_version"]
        if schema not in (1, SCHEMA_VERSION):
            raise InputError(f"{path} has schema_version {schema}; this version of vqmosaic reads 1 and {SCHEMA_VERSION}.{version_hint(version)}")
        content = {name: value for name, value in content.items() if name != VERSION_FIELD}
        known = ["class_names", "token_fingerprint", "label_drop", "grids" if schema == 1 else "segments", "schema_version"]
        check_fields(content, known, str(path), version, known)
        names = content["class_names"]
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise InputError(f"{path}: class_names is {names!r}; it must be a list of strings, or null.")
        if not isinstance(content["token_fingerprint"], str):
            raise InputError(f"{path}: token_fingerprint is {content['token_fingerprint']!r}; it must be a string.")
        fields = {name: content[name] for name in ("class_names", "token_fingerprint", "label_drop")}
        if schema == 1:
            if not isinstance(content["grids"], list):
                raise InputError(f"{path}: grids is {content['grids']!r}; it must be a list.")
            grids = [from_fields(Grid, grid, f"{path}: grids[{number}]", version) for number, grid in enumerate(content["grids"])]
            return from_fields(cls, fields | {"grids": grids}, str(path), version)
        class_drop, conditions, grids = read_segments(content["segments"], str(path), version)
        vocabulary = from_fields(cls, fields | {"class_drop": class_drop, "conditions": conditions, "grids": grids}, str(path), version)
        for number, (found, expected) in enumerate(zip(content["segments"], vocabulary.to_dict()["segments"], strict=True)):
            if found != expected:
                name = next(name for name in expected if found.get(name) != expected[name])
                raise InputError(f"{path}: segments[{number}] has {name} {found.get(name)!r}; with this order of the segments, it must be "
                                 f"{expected[name]!r}. The file was edited: export the prior again.")
        return vocabulary
