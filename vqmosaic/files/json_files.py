"""Reads JSON files strictly: the error for unknown fields names the fields and the version that wrote the file."""

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.permissions import explain_permission_errors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Dataclass = TypeVar("Dataclass", bound="DataclassInstance")
VERSION_FIELD = "vqmosaic"
"""The field with the version of vqmosaic that wrote the file."""


@explain_permission_errors()
def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The mapping in a JSON file. Raises FileNotFoundError, or InputError with `remedy` at its end if the file contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); {remedy}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain a JSON object; {remedy}.")
    return content


def written_by(content: Any) -> str | None:
    """The version of vqmosaic that wrote a file, from its content; None if it has none."""
    version = content.get(VERSION_FIELD) if isinstance(content, Mapping) else None
    return version if isinstance(version, str) else None


def version_hint(version: str | None) -> str:
    """Sentences about the version that wrote a file, to append to an error. Empty if it is this version. None is an unknown version."""
    if version == __version__:
        return ""
    writer = "another version of vqmosaic" if version is None else f"vqmosaic {version}"
    return f" The file was written by {writer}; this is {__version__}. Update vqmosaic, or write the file again with this version."


def is_later(version: str | None) -> bool:
    """Whether a version of vqmosaic, such as 0.2.0, is later than this one."""
    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text)[:3]]

    return version is not None and numbers(version) > numbers(__version__)


def check_format(content: Mapping[str, Any], name: str, version: int, where: str) -> None:
    """Raise InputError unless the content of the file `where` has this format and format version."""
    if (content.get("format"), content.get("format_version")) != (name, version):
        raise InputError(f"{where} says format {content.get('format')!r} version {content.get('format_version')!r}; this vqmosaic reads {name!r} "
                         f"version {version}.{version_hint(written_by(content))}")


def check_fields(content: Any, known: Iterable[str], where: str, version: str | None = None, required: Collection[str] = ()) -> None:
    """Raise InputError unless `content` is a mapping without unknown fields that has the required ones.

    Args:
        where: the file and the part of it, for the error message.
        version: the version of vqmosaic that wrote the file, if known.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{where} is {str(content)[:100]!r}; expected a mapping of fields.{version_hint(version)}")
    unknown, missing = sorted(content.keys() - {*known}), sorted({*required} - content.keys())
    problems = [f"{words}: {', '.join(names)}" for words, names in (("unknown fields", unknown), ("missing fields", missing)) if names]
    if problems:
        raise InputError(f"{where} has {'; '.join(problems)}.{version_hint(version)}")


def from_fields(cls: type[Dataclass], content: Any, where: str, version: str | None = None, required: Collection[str] | None = None) -> Dataclass:
    """Construct a dataclass object from the fields in a file. Fields that are not in the file keep their defaults.

    Args:
        required: fields that the file must have; by default those without a default value.

    Raises:
        InputError: the file has unknown or missing fields, or values that the class refuses. The message names the file, the fields and the
            version that wrote it.
    """
    fields = dataclasses.fields(cls)
    if required is None:
        required = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
    check_fields(content, [field.name for field in fields], where, version, required)
    try:
        return cls(**content)
    except InputError as error:
        hint = version_hint(version) if version is not None else ""
        raise InputError(f"{where}: {error}{hint}") from None
    except (TypeError, AttributeError) as error:  # such as a number in place of text
        raise InputError(f"{where} is invalid: {error}.{version_hint(version)}") from None
