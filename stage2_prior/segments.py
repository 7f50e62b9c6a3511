"""The segments of a prior's sequence: which places hold the class, a grid or a text, and which ids they use. Does not import torch.

    name    kind    role     ids                     places     null_id
    class   class   given    [K, K + C)              [0, 1)     K + C + L
    low     grid    given    [K + C, K + C + L)      [1, 17)    K + C + L + 1
    image   grid    drawn    [0, K)                  [17, 81)   none

The class comes first, then the other given segments, then the drawn grids. Ids have another order: the codes of the drawn grids, then the ids of the
given segments, then one null id for each given segment. A segment that is dropped keeps its length and holds its null id at every place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from token_shards.manifest import Grid
from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.files.json_files import check_fields, from_fields

CLASS_NAME = "class"
"""Name of the class segment, which no other segment may have."""
KINDS = ("class", "grid", "text")
SEGMENT_FIELDS = ("name", "kind", "role", "ids", "places", "drop_rate", "null_id")
"""Fields of every segment in vocabulary.json. Grids also have `grid`, and texts may have `token_fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class GivenGrid:
    """A grid whose ids are given, such as the image at low resolution."""

    grid: Grid
    """The grid. Its name is the name of the segment."""
    drop_rate: float = 0.0
    """Fraction of the training samples in which the segment was dropped independently of the others."""
    kind = "grid"

    def __post_init__(self):
        check_range(f"drop_rate of the segment {self.name!r}", self.drop_rate, at_least=0, at_most=1)

    @property
    def name(self) -> str:
        """Name of the segment."""
        return self.grid.name

    @property
    def num_ids(self) -> int:
        """Number of ids, without the null id."""
        return self.grid.codebook_size

    @property
    def num_tokens(self) -> int:
        """Number of places."""
        return self.grid.num_tokens


@dataclass(frozen=True, kw_only=True)
class GivenText:
    """A text of fixed length. Shorter texts are padded with an id of its own, the last one, to which later places attend."""

    name: str = "text"
    """Name of the segment."""
    text_ids: int
    """Number of ids of the text, without the padding id. The padding id is this number."""
    num_tokens: int
    """Number of places."""
    drop_rate: float = 0.0
    """Fraction of the training samples in which the segment was dropped independently of the others."""
    token_fingerprint: str | None = None
    """How the text becomes ids: text:bytes, or text: and the digest of a tokenizer of transformers. None if it is not known."""
    kind = "text"

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,29}", self.name):
            raise InputError(f"The name of a text is {self.name!r}; allowed: at most 30 lower case letters, digits and underscores, starting with a "
                             "letter.")
        check_range(f"text_ids of the segment {self.name!r}", self.text_ids, at_least=1)
        check_range(f"num_tokens of the segment {self.name!r}", self.num_tokens, at_least=1)
        check_range(f"drop_rate of the segment {self.name!r}", self.drop_rate, at_least=0, at_most=1)

    @property
    def num_ids(self) -> int:
        """Number of ids with the padding id, without the null id."""
        return self.text_ids + 1

    @property
    def grid(self) -> Grid:
        """The text as a grid of one row, in which token shards store it. The padding id is its last id."""
        return Grid(self.name, self.num_ids, 1, self.num_tokens, token_fingerprint=self.token_fingerprint)

    @classmethod
    def from_grid(cls, grid: Grid, drop_rate: float) -> "GivenText":
        """The text that token shards store as this grid. Raises InputError for a grid of several rows."""
        if (grid.height, grid.depth) != (1, 1):
            raise InputError(f"The text {grid.name!r} is stored as a grid of {grid.height} x {grid.width} x {grid.depth} ids; it must have one row.")
        return cls(name=grid.name, text_ids=grid.codebook_size - 1, num_tokens=grid.width, drop_rate=drop_rate,
                   token_fingerprint=grid.token_fingerprint)


Condition = GivenGrid | GivenText
"""A given segment that follows the class."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive places of the sequence with their own range of ids."""

    name: str
    """Name of the segment."""
    kind: str
    """class, grid or text."""
    role: str
    """given or drawn. The loss covers only drawn segments."""
    ids: range
    """The ids that the segment can hold, without its null id."""
    places: range
    """The places of the segment in the sequence."""
    drop_rate: float = 0.0
    """Fraction of the training samples in which the segment was dropped independently of the others."""
    null_id: int | None = None
    """The id at every place of a dropped segment. None for drawn segments."""
    grid: Grid | None = None
    """The grid of a segment of the kind `grid`."""
    token_fingerprint: str | None = None
    """How a segment of the kind `text` becomes ids, if it is known."""

    def to_dict(self) -> dict[str, Any]:
        """The segment as JSON content."""
        content = {name: getattr(self, name) for name in SEGMENT_FIELDS}
        content |= {name: [getattr(self, name).start, getattr(self, name).stop] for name in ("ids", "places")}
        content |= {} if self.token_fingerprint is None else {"token_fingerprint": self.token_fingerprint}
        return content if self.grid is None else content | {"grid": self.grid.to_dict()}


def make_segments(num_classes: int, class_drop: float, conditions: Sequence[Condition], grids: Sequence[Grid]) -> list[Segment]:
    """The segments in the order of the sequence, with their ids and places. Raises InputError for a name that is used twice."""
    names = [CLASS_NAME, *(condition.name for condition in conditions), *(grid.name for grid in grids)]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InputError(f"The segments are named {', '.join(names)}; {', '.join(sorted(repeated))} is there twice, but names must be unique.")
    num_codes = sum(grid.codebook_size for grid in grids)
    given: list[tuple[str, str, int, int, float, dict[str, Any]]] = [(CLASS_NAME, "class", num_classes, 1, class_drop, {})]
    for condition in conditions:
        own = {"grid": condition.grid} if isinstance(condition, GivenGrid) else {"token_fingerprint": condition.token_fingerprint}
        given.append((condition.name, condition.kind, condition.num_ids, condition.num_tokens, condition.drop_rate, own))
    first_null_id = num_codes + sum(num_ids for _, _, num_ids, *_ in given)
    segments, first_id, place = [], num_codes, 0
    for number, (name, kind, num_ids, num_tokens, drop_rate, own) in enumerate(given):
        segments.append(Segment(name=name, kind=kind, role="given", ids=range(first_id, first_id + num_ids), places=range(place, place + num_tokens),
                                drop_rate=drop_rate, null_id=first_null_id + number, **own))
        first_id, place = first_id + num_ids, place + num_tokens
    first_id = 0
    for grid in grids:
        segments.append(Segment(name=grid.name, kind="grid", role="drawn", ids=range(first_id, first_id + grid.codebook_size),
                                places=range(place, place + grid.num_tokens), grid=grid))
        first_id, place = first_id + grid.codebook_size, place + grid.num_tokens
    return segments


def read_segments(content: Any, where: str, version: str | None) -> tuple[float, list[Condition], list[Grid]]:
    """The drop rate of the class, the conditions and the drawn grids from the JSON content of the segments.

    Ids, places and null ids follow from these. The caller compares them with the content. Raises InputError for other content.
    """
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise InputError(f"{where}: segments is {str(content)[:100]!r}; it must be a list of objects.")
    if not content:
        raise InputError(f"{where}: segments is empty; there must be a class and at least one drawn grid.")
    class_drop: float = 0.0
    conditions: list[Condition] = []
    grids: list[Grid] = []
    for number, entry in enumerate(content):
        at = f"{where}: segments[{number}]"
        required = (*SEGMENT_FIELDS, "grid") if entry.get("kind") == "grid" else SEGMENT_FIELDS
        check_fields(entry, (*required, "token_fingerprint") if entry.get("kind") == "text" else required, at, version, required)
        check_name(f"{at}: kind", entry["kind"], KINDS)
        check_name(f"{at}: role", entry["role"], ("given", "drawn"))
        if (entry["kind"] == "class") != (number == 0) or (entry["role"] == "given" and grids) or (entry["kind"], entry["role"]) in (
                ("class", "drawn"), ("text", "drawn")):
            raise InputError(f"{at} is a {entry['role']} {entry['kind']}; allowed: the class first, then given grids and texts, then drawn grids.")
        if entry["kind"] == "class":
            class_drop = entry["drop_rate"]
        elif entry["kind"] == "text":
            start, stop = _read_range(entry, "ids", at)
            first, last = _read_range(entry, "places", at)
            fields_of_text = {"name": entry["name"], "text_ids": stop - start - 1, "num_tokens": last - first, "drop_rate": entry["drop_rate"],
                              "token_fingerprint": entry.get("token_fingerprint")}
            conditions.append(from_fields(GivenText, fields_of_text, at, version))
        else:
            grid = from_fields(Grid, entry["grid"], f"{at}: grid", version)
            if entry["role"] == "drawn":
                grids.append(grid)
            else:
                conditions.append(from_fields(GivenGrid, {"grid": grid, "drop_rate": entry["drop_rate"]}, at, version))
    return class_drop, conditions, grids


def _read_range(entry: dict[str, Any], field: str, where: str) -> tuple[int, int]:
    value = entry[field]
    if not (isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)):
        raise InputError(f"{where}: {field} is {value!r}; it must be two integers, the first and one past the last.")
    return value[0], value[1]
