"""How fields of a recipe may change between runs, and type checks for arguments and fields.

Numbers from other libraries become Python numbers; text in place of a number raises InputError.
"""

import dataclasses
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from vqmosaic.errors import InputError, check_range

TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false"}


def budget(default: Any) -> Any:
    """A field that may grow when a finished or interrupted stage is run again."""
    return field(default=default, metadata={"change_policy": "budget"})


def unrecorded(default: Any) -> Any:
    """A field that affects no result, so it may change when a stage is run again."""
    return field(default=default, metadata={"change_policy": "unrecorded"})


def place(default: Any) -> Any:
    """A field that gives the location of data. It may change when a stage is run again, if the data is the same."""
    return field(default=default, metadata={"change_policy": "place"})


def as_integer(name: str, given: Any) -> int:
    """The argument as an int; numpy and torch integers are accepted. Raises InputError for text, booleans, fractions and anything else."""
    try:
        if not is_boolean(given):
            return operator.index(given)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor on the meta device
        pass
    raise InputError(f"{name} is {given!r}; it must be an integer.")


def as_number(name: str, given: Any) -> int | float:
    """The argument as an int or a float; numpy and torch numbers are accepted. Raises InputError for text, booleans and anything else."""
    if type(given) in (int, float):
        return given
    try:
        if not is_boolean(given) and not isinstance(given, (str, bytes, bytearray)):
            return float(given)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise InputError(f"{name} is {given!r}; it must be a number.")


def as_boolean(name: str, given: Any) -> bool:
    """The argument as a bool. Raises InputError for anything else, because the text "false" would count as true."""
    if not is_boolean(given):
        raise InputError(f"{name} is {given!r}; it must be true or false.")
    return bool(given)


def is_boolean(given: Any) -> bool:
    """Whether a value is a Python or numpy bool."""
    return type(given).__module__.partition(".")[0] in ("builtins", "numpy") and type(given).__name__ in ("bool", "bool_")


CONVERSIONS = {int: as_integer, float: as_number, bool: as_boolean}


def required_type(type_: Any) -> Any:
    """The type of a field without None: int for `int | None`. A union of other types stays a union."""
    kinds = [kind for kind in typing.get_args(type_) if kind is not types.NoneType] if isinstance(type_, types.UnionType) else [type_]
    return kinds[0] if len(kinds) == 1 else type_


def check_types(section: Any, name: str) -> None:
    """Check and convert the fields of a dataclass that are numbers, booleans or lists of these. Errors name the section and the field.

    Fields of other types stay unchanged.
    """
    for entry in dataclasses.fields(section):
        given, type_ = getattr(section, entry.name), required_type(entry.type)
        if isinstance(type_, types.UnionType):
            continue  # the section itself checks a field with several types
        if given is None and types.NoneType in typing.get_args(entry.type):
            continue
        full_name = f"{name}.{entry.name}" if name else entry.name
        if type_ in CONVERSIONS:
            setattr(section, entry.name, CONVERSIONS[type_](full_name, given))
        elif typing.get_origin(type_) is list and typing.get_args(type_)[0] in CONVERSIONS:
            kind = typing.get_args(type_)[0]
            if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
                raise InputError(f"{full_name} is {given!r}; it must be a list, and each entry {TYPE_NAMES[kind]}.")
            setattr(section, entry.name, [CONVERSIONS[kind](f"{full_name}: an entry", value) for value in given])


def checked_numbers(name: str, given: Any, **bounds: float) -> dict[str, float]:
    """A mapping from names to numbers, each within the bounds of check_range. Raises InputError for anything else."""
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise InputError(f"{name} is {given!r}; it must be a mapping from names to numbers, such as {{low: 0.1}}.")
    numbers = {key: float(as_number(f"{name}.{key}", value)) for key, value in given.items()}
    for key, value in numbers.items():
        check_range(f"{name}.{key}", value, **bounds)
    return numbers


def checked_names(name: str, given: Any) -> list[str] | None:
    """A list of names, or None. Raises InputError for anything else, and for a name that is there twice."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(entry, str) for entry in given):
        raise InputError(f"{name} is {given!r}; it must be a list of names, such as [low], or null.")
    if len(set(given)) < len(given):
        raise InputError(f"{name} is {list(given)}; each name may be there only once.")
    return list(given)
