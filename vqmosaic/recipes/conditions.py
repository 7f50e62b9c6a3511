"""What is given to a prior beside the class: a low resolution, edges, a paired image, a caption. Checks the records of data.conditions.

    data:
      conditions:
        - {name: low, kind: low_resolution, factor: 4}
        - {name: text, kind: caption, length: 48, templates: ["a photo of a {class}", "{class}"]}

The image of a condition is made from the view of an image (after crop, flip and shift). Its tokenizer is trained by `vqmosaic run`, or given by path.
Loads no torch.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.files.given_paths import check_path
from vqmosaic.recipes.field_types import check_types
from vqmosaic.recipes.image_sizes import SIDES, ImageSize, checked_image_size, height_and_width
from vqmosaic.recipes.pixel_values import checked_channels, checked_value_range

MAX_CAPTION_LENGTH = 4096
"""Largest number of places of a caption. All of them are part of the prior's sequence."""
DERIVED_KINDS = ("low_resolution", "edges", "grey")
"""Kinds whose images are computed from the image itself."""
IMAGE_KINDS = (*DERIVED_KINDS, "paired_folder")
"""Kinds whose images have a tokenizer of their own."""
KINDS = (*IMAGE_KINDS, "caption")
EDGE_METHODS = ("sobel", "canny")
CLASS_PLACEHOLDER = "{class}"
"""The part of a template that stands for the class name."""
RESERVED_NAMES = ("class", "image", "top", "bottom", "json")
"""Names of other segments and grids, and of the record of each sample in a shard."""
_COMMON_FIELDS = ("name", "kind", "drop_rate")
_TOKENIZER_FIELDS = ("tokenizer", "network", "training")
FIELDS_OF_KIND = {
    "low_resolution": ("factor", *_TOKENIZER_FIELDS),
    "edges": ("method", *_TOKENIZER_FIELDS),
    "grey": _TOKENIZER_FIELDS,
    "paired_folder": ("path", "channels", "value_range", *_TOKENIZER_FIELDS),
    "caption": ("length", "column", "text_tokenizer", "templates", "held_out_templates"),
}
"""Kind -> the fields of its records beside name, kind and drop_rate."""
REQUIRED_FIELDS = {"low_resolution": ("factor",), "paired_folder": ("path",), "caption": ("length",)}
PATH_FIELDS_OF_CONDITIONS = ("path", "tokenizer", "text_tokenizer")
"""Fields that hold a path on this machine."""
IDS_FIELDS = ("factor", "method", "channels", "value_range", "length", "column", "templates", "held_out_templates")
"""Fields that determine the ids of a condition, together with its tokenizer and the data."""


@dataclass(kw_only=True)
class ConditionConfig:
    """One condition: an image or a caption that is given to the prior."""

    name: str
    """Name of its grid in the shards and of its segment in the prior."""
    kind: str
    """low_resolution (area mean), edges, grey, paired_folder (images with the same names in another folder) or caption."""
    drop_rate: float = 0.0
    """Fraction of the training samples of the prior in which this condition is dropped, independently of the others."""
    factor: int = 1
    """low_resolution: side of the square of pixels that becomes one pixel. It must divide the sides of data.image_size."""
    method: str = "sobel"
    """edges: sobel (gradient magnitude) or canny (needs the package scikit-image)."""
    path: str | None = None
    """paired_folder: the folder with the paired images. Pairs have the same path relative to their folder, without the suffix."""
    channels: int | None = None
    """paired_folder: channels of the paired images; null uses data.channels."""
    value_range: list[float] | None = None
    """paired_folder: as data.value_range, for the paired images. null reads 8 bits. It must be given if data.value_range is."""
    length: int = 0
    """caption: number of places. Longer captions are cut, shorter ones are padded."""
    column: str | None = None
    """caption: the text column of a Hugging Face data set, or of metadata.csv or metadata.jsonl; null reads a .txt file beside each image."""
    text_tokenizer: str | None = None
    """caption: the folder of a tokenizer of transformers; null uses the bytes of UTF-8."""
    templates: list[str] = field(default_factory=list)
    """caption: sentences with {class}, from which captions are made. A hash chooses one for each image."""
    held_out_templates: list[str] = field(default_factory=list)
    """caption: templates for validation images only."""
    tokenizer: str | None = None
    """Image kinds: the folder of a trained tokenizer; null trains one in `vqmosaic run`."""
    network: dict[str, Any] = field(default_factory=dict)
    """Image kinds: fields of the section tokenizer that differ for the condition's tokenizer."""
    training: dict[str, Any] = field(default_factory=dict)
    """Image kinds: fields of the section tokenizer_training that differ for the condition's tokenizer."""

    @property
    def is_caption(self) -> bool:
        """Whether the condition is a text. All others are images."""
        return self.kind == "caption"

    def to_record(self) -> dict[str, Any]:
        """The record in a recipe: name, kind, and the fields that differ from their defaults."""
        fields = [entry for entry in dataclasses.fields(self) if entry.name in ("name", "kind") or getattr(self, entry.name) != _default(entry)]
        return {entry.name: getattr(self, entry.name) for entry in fields}

    def ids_record(self) -> dict[str, Any]:
        """The record in a manifest: name, kind, and the fields that determine the ids. Without paths and drop_rate."""
        names = ("name", "kind", *(name for name in FIELDS_OF_KIND[self.kind] if name in IDS_FIELDS))
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value not in (None, [])}

    def derivation(self) -> dict[str, Any]:
        """How its image is made, the value of data.derived: kind and factor, method, or path, channels and value_range."""
        names = ("kind", "factor", "method", "path", "channels", "value_range")
        given = {name: getattr(self, name) for name in names if name == "kind" or name in FIELDS_OF_KIND[self.kind]}
        return {name: value for name, value in given.items() if value is not None}


def _default(entry: dataclasses.Field) -> Any:
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default


def read_conditions(field_name: str, records: Sequence[Any], image_size: ImageSize) -> list[ConditionConfig]:
    """The checked conditions of data.conditions. Raises InputError that names the entry by its index, the field and what is allowed."""
    conditions: list[ConditionConfig] = []
    for index, record in enumerate(records):
        entry = f"{field_name}[{index}]"
        condition = _read_condition(entry, record)
        if condition.name in (earlier.name for earlier in conditions):
            raise InputError(f"{entry}.name is {condition.name!r}, which {field_name} has already. Names must be unique.")
        if condition.kind == "low_resolution":
            derived_size(f"{entry}.factor", image_size, condition.derivation())
        conditions.append(condition)
    return conditions


def _read_condition(entry: str, record: Any) -> ConditionConfig:
    if not isinstance(record, Mapping):
        raise InputError(f"{entry} is {record!r}; it must be a record with the fields name and kind, such as "
                         "{name: low, kind: low_resolution, factor: 4}.")
    if not isinstance(record.get("name"), str):
        raise InputError(f"{entry}.name is {record.get('name')!r}; it must be a string, such as low.")
    kind = record.get("kind")
    check_name(f"{entry}.kind", kind, KINDS)
    assert isinstance(kind, str)  # one of KINDS
    allowed = (*_COMMON_FIELDS, *FIELDS_OF_KIND[kind])
    for name in record:
        check_name(f"{entry} (kind {kind}): a field", name, allowed)
    condition = ConditionConfig(**record)
    _check_name(f"{entry}.name", condition.name)
    missing = [name for name in REQUIRED_FIELDS.get(kind, ()) if record.get(name) is None]
    if missing:
        raise InputError(f"{entry}.{missing[0]} is not given; kind {kind!r} needs it.")
    check_types(condition, entry)
    check_range(f"{entry}.drop_rate", condition.drop_rate, at_least=0, at_most=1)
    for name in PATH_FIELDS_OF_CONDITIONS:
        value = getattr(condition, name)
        if value is not None:
            if not isinstance(value, str) or not value:
                raise InputError(f"{entry}.{name} is {value!r}; it must be the path of a folder.")
            check_path(f"{entry}.{name}", value)
    if condition.is_caption:
        _check_caption(entry, condition)
    else:
        _check_image(entry, condition)
    return condition


def _check_name(field_name: str, name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,29}", name):
        raise InputError(f"{field_name} is {name!r}; allowed: at most 30 lower case letters, digits and underscores, starting with a letter.")
    if name in RESERVED_NAMES:
        raise InputError(f"{field_name} is {name!r}, which has another meaning in the shards; choose a name other than "
                         f"{', '.join(RESERVED_NAMES)}.")


def _check_image(entry: str, condition: ConditionConfig) -> None:
    if condition.kind == "low_resolution":
        check_range(f"{entry}.factor", condition.factor, at_least=2)
    check_name(f"{entry}.method", condition.method, EDGE_METHODS)
    if condition.channels is not None:
        condition.channels = checked_channels(f"{entry}.channels", condition.channels)
    condition.value_range = checked_value_range(f"{entry}.value_range", condition.value_range)
    for name in ("network", "training"):
        if not isinstance(getattr(condition, name), Mapping):
            section = {"network": "tokenizer", "training": "tokenizer_training"}[name]
            raise InputError(f"{entry}.{name} is {getattr(condition, name)!r}; it must be a mapping of fields of the section {section}.")
    overrides = [name for name in ("network", "training") if getattr(condition, name)]
    if condition.tokenizer is not None and overrides:
        raise InputError(f"{entry} has both tokenizer and {overrides[0]}, but a given tokenizer is not trained. Remove one of them.")


def _check_caption(entry: str, condition: ConditionConfig) -> None:
    check_range(f"{entry}.length", condition.length, at_least=1, at_most=MAX_CAPTION_LENGTH)
    if condition.column is not None and not isinstance(condition.column, str):
        raise InputError(f"{entry}.column is {condition.column!r}; it must be the name of a column.")
    for name in ("templates", "held_out_templates"):
        templates = getattr(condition, name)
        if not isinstance(templates, list) or not all(isinstance(template, str) for template in templates):
            raise InputError(f"{entry}.{name} is {templates!r}; it must be a list of sentences such as 'a photo of a {CLASS_PLACEHOLDER}'.")
        for template in templates:
            if CLASS_PLACEHOLDER not in template:
                raise InputError(f"{entry}.{name}: {template!r} does not contain {CLASS_PLACEHOLDER}, the place of the class name.")
    if condition.templates and condition.column is not None:
        raise InputError(f"{entry} has both templates and column; captions come from one of them. Remove the other.")
    if condition.held_out_templates and not condition.templates:
        raise InputError(f"{entry} has held_out_templates, but no templates to train on; add templates.")
    if repeated := [template for template in condition.held_out_templates if template in condition.templates]:
        raise InputError(f"{entry}.held_out_templates: {repeated[0]!r} is also in templates, so it would be used in training. Remove one of them.")


# --- images that are made from others ------------------------------------------------------------------------------------------


def checked_derivation(field_name: str, derived: Mapping[str, Any]) -> dict[str, Any]:
    """The checked value of data.derived: kind, and factor, method, or path, channels and value_range."""
    if not isinstance(derived, Mapping):
        raise InputError(f"{field_name} is {derived!r}; it must be a record such as {{kind: low_resolution, factor: 4}}, or null.")
    check_name(f"{field_name}.kind", derived.get("kind", ""), IMAGE_KINDS)
    for name in derived:
        check_name(f"{field_name}: a field", name, ("kind", "factor", "method", "path", "channels", "value_range"))
    return _read_condition(field_name, {"name": "derived", **derived}).derivation()


def derived_size(field_name: str, image_size: ImageSize, derived: Mapping[str, Any] | None) -> int | list[int]:
    """The size of an image that is made from one of `image_size`. Raises InputError, which names the field, if the factor does not divide it."""
    size = checked_image_size("data.image_size", image_size)
    factor = (derived or {}).get("factor", 1)
    sides = height_and_width(size)
    for name, side in zip(SIDES, sides, strict=True):
        if side % factor:
            divisors = [number for number in range(2, side + 1) if all(side % number == 0 for side in sides)]
            raise InputError(f"{field_name} is {factor}, which does not divide the {name} of data.image_size, {side}. "
                             f"Set it to one of {', '.join(map(str, divisors))}.")
    return checked_image_size("data.image_size", [side // factor for side in sides])


def derived_channels(channels: int, derived: Mapping[str, Any] | None) -> int:
    """The channels of an image that is made from one with `channels`."""
    if derived is None or derived["kind"] == "low_resolution":
        return channels
    return derived.get("channels", channels) if derived["kind"] == "paired_folder" else 1
